"""Parameters that ranks share: where they lie, who owns their matrices, and their state here and in checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..matrices import Piece
from ..parts import Blockwise
from ..parts.blockwise import scale_key
from ..recipe import Recipe, State
from ..sharding.local import is_partial, is_sharded, local_tensor, whole_tensor
from ..sharding.owners import owned_pieces
from ..state_layout import Codes
from ..step.program import is_elementwise
from .group_options import Group, parameter_name
from .groups import Groups
from .wrappers import is_made_in_backward

if TYPE_CHECKING:
    from ..sharding.agreement import Agreement, Rows
    from ..sharding.layout import Sharding
    from ..sharding.ranks import Ranks

__all__ = ["SAME_STEP", "Shards"]

Owners = tuple[tuple[int, ...], ...]
SAME_STEP = (
    "every rank needs the same parameters, in the same groups and order, with the same options, and gradients of the "
    "same ones"
)


class Shards(Groups):
    """Groups whose parameters may be DTensors: elementwise state is as they are, other state is at owners."""

    _shardings: dict[Tensor, Sharding]
    _meshes: dict[object, Ranks]
    _owners: dict[Tensor, tuple[tuple[Piece, ...], Owners]]
    #: all ranks that have a parameter, replicas too, by what it lies on
    _peers: dict[object, Ranks]
    #: the agreement among so many of them
    _agreed_by: tuple[int, Agreement] | None = None
    #: whether ranks share a parameter, or the work on it
    _has_shards = False

    def _pieces(self, p: Tensor, group: Group) -> tuple[Piece, ...]:
        if is_sharded(p) and p.ndim and not group["use_muon"]:  # one layer, in whose rows shards can be
            return (Piece(0, p.shape[0], 1, p.shape[0], p.shape[1:].numel()),)
        return super()._pieces(p, group)

    # ---- where parameters lie ----------------------------------------------------------------------------------------

    def _begin_shards(self) -> None:
        for name in ("_shardings", "_meshes", "_owners", "_peers"):
            self.__dict__.setdefault(name, {})

    def _sharding(self, p: Any) -> Sharding | None:
        """The place of a DTensor, or who shares the work on a parameter that all ranks have; None of any other."""
        if not is_sharded(p):
            return self._shardings.get(p)
        known = self._shardings.get(p)
        if known is None or (known.mesh, known.placements) != (p.device_mesh, p.placements):
            known = self._shardings[p] = self._new_sharding(
                p, known is not None and len(set(known.ranks.replica_of)) > 1
            )
        return known

    def _new_sharding(self, p: Any, share_work: bool) -> Sharding:
        """The place of a DTensor. share_work: owners are among all ranks of its mesh, those of other copies too."""
        from ..sharding.layout import Sharding
        from ..sharding.ranks import ranks_of_mesh
        from ..sharding.regions import regions, shard_dims

        mesh, placements, shape = p.device_mesh, tuple(p.placements), tuple(p.shape)
        dims = shard_dims(placements)
        copies = tuple(i for i in range(mesh.ndim) if i not in dims) if share_work else ()
        key = (mesh, dims, copies)
        self._note_peers(p)
        if key not in self._meshes:
            self._meshes[key] = ranks_of_mesh(mesh, dims, p.to_local().device, copies=copies)
        ranks, along = self._meshes[key], [placements[i] for i in dims]
        boxes = regions(shape, [mesh.size(i) for i in dims], along)
        return Sharding(shape, ranks, boxes * (ranks.size // len(boxes)), mesh, placements)

    def _shared_work(self, p: Tensor) -> Sharding:
        from ..sharding.layout import Sharding
        from ..sharding.ranks import replicas
        from ..sharding.regions import Region

        if p.device not in self._meshes:
            self._meshes[p.device] = self._peers[p.device] = replicas(p.device)
        ranks, shape = self._meshes[p.device], tuple(p.shape)
        return Sharding(shape, ranks, (Region((0,) * p.ndim, shape),) * ranks.size)

    def _owners_of(self, p: Tensor, group: Group) -> Owners:
        """The rank that owns each matrix of every piece of a sharded parameter; the same on all ranks."""
        if p not in self._owners or self._owners[p][0] != self._pieces(p, group):
            self._assign_owners()
        return self._owners[p][1]

    def _assign_owners(self) -> None:
        """Owners for the matrices of all parameters that have none: the holder of one that is not cut, where several
        copies have it one of these, of the others the rank with the least work (`steepest.sharding.owners`), or all
        ranks (`steepest.step.routes`).
        """
        from ..sharding.owners import assign
        from ..step.costs import cost
        from ..step.routes import EVERYONE, route

        cut: dict[Ranks, list[tuple[Tensor, int, int, float, tuple[int, ...] | None]]] = {}
        fresh: dict[Tensor, list[list[int]]] = {}
        for group in self.param_groups:
            recipe = self._recipe(group)
            for p in group["params"]:
                sharding, pieces = self._sharding(p), self._pieces(p, group)
                if sharding is None or (p in self._owners and self._owners[p][0] == pieces):
                    continue
                fresh[p] = []
                for number, piece in enumerate(pieces):
                    if route(recipe, sharding, piece) == "gram":
                        fresh[p].append([EVERYONE] * piece.batch)
                        continue
                    holders = sharding.holders(piece)
                    fresh[p].append([some[0] if len(some) == 1 else 0 for some in holders])
                    for k, some in enumerate(holders):
                        if len(some) != 1:
                            jobs = cut.setdefault(sharding.ranks, [])
                            of_job = cost(recipe, piece.rows, piece.cols, device=p.device.type)
                            jobs.append((p, number, k, of_job, some or None))
                self._owners[p] = (pieces, ())
        for ranks, jobs in cut.items():
            assigned = assign([job[3] for job in jobs], ranks.size, [job[4] for job in jobs])
            for (p, number, k, *_), owner in zip(jobs, assigned, strict=True):
                fresh[p][number][k] = owner
        for p, owners in fresh.items():
            self._owners[p] = (self._owners[p][0], tuple(map(tuple, owners)))

    def _pieces_here(self, p: Tensor, group: Group) -> tuple[Piece, ...]:
        """The pieces with those of their matrices only that this rank owns."""
        sharding, pieces = self._sharding(p), self._pieces(p, group)
        return pieces if sharding is None else owned_pieces(pieces, self._owners_of(p, group), sharding.ranks.place)

    def _check_shards(self, group: Group) -> None:
        """Notes who shares parameters. ValueError for a DTensor whose directions cannot be taken."""
        shares = bool(group["params"]) and _shares(group, self._recipe(group))
        in_backward = any(map(is_sharded, group["params"])) and is_made_in_backward()
        for i, p in enumerate(group["params"]):
            if not is_sharded(p):
                if shares:
                    self._has_shards = True
                    self._shardings[p] = self._shared_work(p)
                continue
            self._has_shards = True
            self._shardings[p] = self._new_sharding(p, shares)
            what = f"{parameter_name(group, i)} of shape {tuple(p.shape)} with placements {tuple(p.placements)}"
            if any(placement.is_partial() for placement in p.placements):
                raise ValueError(
                    f"{type(self).__name__} steps parameters, not sums of them: {what} is Partial; call "
                    "p.redistribute(placements=[Replicate()]) or Shard(0) before"
                )
            if not self._recipe(group).decay.elementwise:
                raise ValueError(
                    f"{type(self).__name__} measures whole weights and updates and does not take sharded parameters; "
                    f"found {what}: use DistributedDataParallel, which keeps every parameter whole"
                )
            if in_backward:
                raise ValueError(
                    "_apply_optimizer_in_backward waits for autograd to accumulate gradients, which fully_shard does "
                    f"itself, so that sharded parameters would never be stepped; found {what}: make an optimizer for "
                    "each parameter and call its step() in p.register_post_accumulate_grad_hook(...)"
                )
            if p.is_meta:
                raise ValueError(
                    f"{type(self).__name__} makes the state of sharded parameters at once, and {what} is on the meta "
                    "device, without values: call model.to_empty(device=...) and initialize its weights before"
                )
            self._check_blocks(p, group, what)
            sharding = self._sharding(p)
            assert sharding is not None
            try:
                for piece in self._pieces(p, group):
                    sharding.rectangles(piece)
            except ValueError as error:
                raise ValueError(f"{what}: {error}") from error

    def _check_blocks(self, p: Tensor, group: Group, what: str) -> None:
        """ValueError where shards cut the blocks of state in codes."""
        sharding = self._sharding(p)
        if sharding is None or not self._coded(p, group):
            return
        if sharding.blocks(Blockwise().block) is None:
            raise ValueError(
                f"state_bits={group['state_bits']} has blocks of {Blockwise().block} elements of what one index of "
                f"dimension 0 holds, which shards cut; found {what}: shard dimension 0, or give its group "
                "state_bits=None"
            )

    # ---- that ranks do the same --------------------------------------------------------------------------------------

    def _note_peers(self, p: Any) -> None:
        """Notes the ranks that have a DTensor."""
        from ..sharding.ranks import ranks_of_mesh

        mesh, device = p.device_mesh, p.to_local().device
        device = torch.device(mesh.device_type) if device.type == "meta" else device
        if (mesh, device) not in self._peers:
            self._peers[mesh, device] = ranks_of_mesh(mesh, tuple(range(mesh.ndim)), device)

    @property
    def _agreement(self) -> Agreement:
        if self._agreed_by is None or self._agreed_by[0] != len(self._peers):
            from ..sharding.agreement import Agreement

            self._agreed_by = len(self._peers), Agreement(self._peers.values())
        return self._agreed_by[1]

    def _name_collectives(self, call: str) -> None:
        """Has an error of the collectives that follow say in which call this rank waits for the others."""
        for ranks in self._meshes.values():
            ranks.call = ranks.shards.call = call
        if self._peers:
            self._agreement.name(call)

    def _check_agreement(
        self,
        said: object,
        error: Exception | None = None,
        *,
        rows: Callable[[], Rows] | None = None,
        but: tuple[str, str] = ("ranks are about to take different steps", SAME_STEP),
    ) -> None:
        """RuntimeError, on all ranks, where those that share parameters are not about to do the same.

        said: what is compared first, `rows` or something shorter that follows from them.   error: why this rank cannot
        go on.   rows: None: `_sharded_rows`.   but: what is wrong where rows differ, and the way out.
        """
        if not self._peers:
            return
        why = None if error is None else f"{type(error).__name__}: {error}"
        text = self._agreement.difference(said, why, rows or self._sharded_rows, but)
        if text is not None:
            raise RuntimeError(f"{type(self).__name__}: {text}") from error

    @contextlib.contextmanager
    def _telling(self, call: str, params: object = (), share_work: object = False) -> Iterator[None]:
        """Has an error of this rank be one of all that share parameters, which wait for it in `_check_agreement`.

        params, share_work: what is given to the call, which the optimizer may not have yet.
        """
        try:
            yield
        except Exception as error:
            with contextlib.suppress(RuntimeError):  # its own error is the one to see here
                for p in _tensors_in(params):
                    if is_sharded(p):
                        self._note_peers(p)
                    elif share_work is True and p.device not in self._peers:
                        self._shared_work(p)
                self._name_collectives(call)
                self._check_agreement(None, error)
            raise

    def _sharded_rows(self) -> list[tuple[str, ...]]:
        """What must be the same on all ranks, a row for every sharded parameter and every option of a group."""
        rows: list[tuple[str, ...]] = []
        options: list[tuple[str, ...]] = []
        for number, group in enumerate(self.param_groups):
            values = [(key, value) for key, value in group.items() if key not in ("params", "param_names")]
            options += [(f"group {number}", f"with {key}={value!r}") for key, value in values if _is_on_host(value)]
            for i, p in enumerate(group["params"]):
                sharding = self._sharding(p)
                if sharding is not None:
                    has = "no gradient" if p.grad is None else f"a gradient in {p.grad.dtype}"
                    name = f"{parameter_name(group, i)} (group {number})"
                    rows.append((name, f"of shape {sharding.shape}", f"as {sharding.placements}", f"with {has}"))
        return rows + options

    @property
    def _agrees_on_host(self) -> bool:
        """Whether the host may look in every step at what ranks say: a device would have to be waited for."""
        return all(ranks.device.type == "cpu" for ranks in self._meshes.values())

    def _peers_of(self, p: Any) -> Ranks | None:
        """The ranks that have a shared parameter, as `_agreement` knows them; None: this one alone."""
        return self._agreement.one_of(self._peers[(p.device_mesh, p.to_local().device) if is_sharded(p) else p.device])

    def _shared_names(self) -> dict[Tensor, str]:
        """The parameters that ranks share, or share the work on, and how messages call them."""
        every = [(p, group, i) for group in self.param_groups for i, p in enumerate(group["params"])]
        return {p: parameter_name(group, i) for p, group, i in every if self._sharding(p) is not None}

    def _sum_partial_gradients(self, *, compare: bool) -> None:
        """Sums gradients that are `Partial`, as those of `SequenceParallel` layers are, and places them as their
        parameters. Collective among the ranks of such parameters.

        compare: whether ranks have yet to find that they have the same gradients.
        """
        partial = [p for group in self.param_groups for p in group["params"] if is_partial(p)]
        if partial and compare:
            self._check_agreement((len(partial), self._gradients_there()))
        for p in partial:
            p.grad = cast(Any, p.grad).redistribute(placements=cast(Any, p).placements)

    def _gradients_there(self) -> str:
        """Which parameters have a gradient: a digit for each."""
        return "".join("01"[p.grad is not None] for group in self.param_groups for p in group["params"])

    # ---- state -------------------------------------------------------------------------------------------------------

    def _state_here(self, p: Tensor) -> State:
        """A parameter's state as its step sees it: what of it lies here."""
        sharding = self._sharding(p)
        if sharding is None:
            return cast(State, self.state[p])
        from ..sharding.local_state import LocalState

        return cast(State, LocalState(self.state[p], sharding))

    def _like(self, p: Tensor, here: Tensor) -> Tensor:
        """What lies here of a tensor of the parameter's shape, as state: of a sharded parameter a DTensor."""
        sharding = self._sharding(p)
        if sharding is None:
            return here
        from ..sharding.local_state import as_shard

        return as_shard(here, sharding)

    def fresh_state(self, p: Tensor, dtype: torch.dtype, group: Group) -> State:
        """State before the first gradient, which has this dtype."""
        sharding = self._sharding(p)
        if sharding is None:
            return super().fresh_state(p, dtype, group)
        from ..sharding.local_state import as_shard

        recipe, here = self._recipe(group), local_tensor(p.detach())
        state = recipe.init(here, torch.empty_like(here, dtype=dtype), self._pieces_here(p, group))
        elementwise = _elementwise(recipe, p)
        return {key: as_shard(t, sharding) if key in elementwise else t for key, t in state.items()}

    def _shapes_here(self, p: Tensor, group: Group) -> dict[str, torch.Size]:
        """The shapes of a parameter's state here."""
        here = torch.empty(local_tensor(p).shape, dtype=p.dtype, device="meta")
        state = self._recipe(group).init(here, here, self._pieces_here(p, group))
        shapes = {key: value.shape for key, value in state.items()}
        for name in self._coded(p, group):
            if name in shapes:
                shapes[scale_key(name)] = torch.Size(Blockwise().scale_shape(shapes[name]))
        return shapes

    # ---- state in codes ----------------------------------------------------------------------------------------------

    def _coded(self, p: Tensor, group: Group) -> dict[str, Codes]:
        """The names of the state that the group wants in codes; the same on all ranks."""
        return self._recipe(group).coded(p.shape, len(self._pieces(p, group)))

    def _recode(self, p: Tensor, group: Group, state: State) -> bool:
        """Encodes what the group wants in codes and decodes what it does not; whether there was something to do."""
        coded, before = self._coded(p, group), len(state)
        for name, kind in self._recipe(group).names_of_averages(len(self._pieces(p, group))).items():
            scale = scale_key(name)
            if name not in state or (name in coded) == (scale in state):
                continue
            here = local_tensor(state[name])
            like = self._sharding(p) if is_sharded(state[name]) else None
            if name in coded:
                codes, scales = Blockwise().encode(here, kind)
                state[name] = _as_shard(codes, like)
                state[scale] = _as_shard(scales, like, None if like is None else Blockwise().scale_shape(like.shape))
            else:
                state[name] = _as_shard(Blockwise().decode(here, local_tensor(state.pop(scale))), like)
        return len(state) != before

    # ---- state in checkpoints ----------------------------------------------------------------------------------------

    def _saved_state(self, p: Tensor, group: Group) -> dict[str, Any]:
        """The state of a parameter as a checkpoint has it. What only owners have becomes a DTensor over all ranks, of
        the shape it would have in one process.
        """
        state, sharding = self.state[p], self._sharding(p)
        if sharding is None or not state:
            return state
        self._recode(p, group, state)
        from .owned_state import spread

        return spread(state, sharding, self._recipe(group), self._pieces(p, group), self._owners_of(p, group))

    def _whole_state(self, tensors: Mapping[str, Any], p: Tensor, group: Group) -> dict[str, Any]:
        """A checkpoint's state of a parameter: elementwise state cut as the parameter is, everything else whole."""
        sharding = self._sharding(p)
        if sharding is None:
            return {key: whole_tensor(value) for key, value in tensors.items()}
        from .owned_state import whole

        elementwise = _elementwise(self._recipe(group), p)
        kept = set(self.kept_state(p, group))
        return whole(tensors, sharding, elementwise | kept, {scale_key(key) for key in elementwise})

    def _state_kept_here(self, tensors: Mapping[str, Any], p: Tensor, group: Group) -> dict[str, Any]:
        """What this rank keeps of state as `_whole_state` has it."""
        sharding = self._sharding(p)
        if sharding is None:
            return dict(tensors)
        from .owned_state import owned_part

        return owned_part(tensors, sharding, self._recipe(group), self._pieces(p, group), self._owners_of(p, group))


def _tensors_in(params: object) -> Iterator[Tensor]:
    """The tensors of a module, of named ones, of groups or of lists of any of them."""
    if isinstance(params, Tensor):
        yield params
    elif isinstance(params, nn.Module):
        yield from params.parameters()
    elif isinstance(params, Mapping):
        yield from _tensors_in(params["params"] if "params" in params else list(params.values()))
    elif isinstance(params, Iterable) and not isinstance(params, (str, Iterator)):
        for each in params:
            yield from _tensors_in(each)


def _as_shard(here: Tensor, sharding: Sharding | None, shape: tuple[int, ...] | None = None) -> Tensor:
    """What lies here of a state tensor, of a sharded one as a DTensor; shape: its own, None: the parameter's."""
    if sharding is None:
        return here
    from ..sharding.local_state import as_shard

    return as_shard(here, sharding, shape)


def _shares(group: Group, recipe: Recipe) -> bool:
    """Whether replicas share the work on a group."""
    return bool(group.get("share_work")) and group["use_muon"] and not is_elementwise(recipe)


def _is_on_host(value: object) -> bool:
    values = value if isinstance(value, tuple) else (value,)
    return not any(isinstance(each, Tensor) for each in values)


def _elementwise(recipe: Recipe, p: Tensor) -> set[str]:
    """The keys of state that has a number for every element of the parameter."""
    like = torch.empty(p.shape, dtype=p.dtype, device="meta")
    shapes = {key: t.shape for key, t in recipe.init(like).items()}
    return {key for key, layout in recipe.layouts.items() if layout == "elementwise" and shapes.get(key) == p.shape}
