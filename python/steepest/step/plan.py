"""One step for all parameters: the order is `Plan.step`, the same for every recipe and backend.

A `Plan` is made once for a set of parameters with gradients and serves every step until one of them changes. It shares
the parameters out among executors: the fused ops, device by device, and torch operations. Nothing in a step reads a
tensor on the host, so it neither waits for the device nor depends on the data's values, but for a refresh of
eigenbases, which reads the status of the one before it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..chunking import chunk_by_bytes
from ..ops import multi_tensor
from ..ops.backend import prepare, requested
from ..ops.multi_tensor import NOT_SCALED, Scaling
from ..ops.program import Program
from ..parts import Hyper
from ..recipe import Recipe, largest
from .along_polar import AlongPolar, steps_along_polar
from .coupling import Coupling
from .eager import Eager
from .executor import Directed, Executor
from .fused import Fused
from .in_bases import InBases, steps_in_bases
from .parameter import Parameter, store_if
from .program import program
from .retraction import retract
from .warm_up import warm_up
from .whole import Whole, steps_whole
from .working_state import WorkingState, WorkingStates

if TYPE_CHECKING:
    from ..sharding.ranks import Ranks

__all__ = ["Plan", "reason", "route", "scaling_on"]


class Plan:
    """The step of these parameters. skipped: the int64 counters by device.

    coupled: layers wait for one another.   traced: by torch.compile, which fuses torch operations itself.

    An executor has parameters that one set of ranks shares, or none. Its collectives follow from shapes, placements and
    recipes alone, so that they are the same on all ranks and in one order.
    """

    def __init__(
        self,
        parameters: Sequence[Parameter],
        skipped: dict[torch.device, Tensor],
        *,
        coupled: bool = False,
        traced: bool = False,
    ) -> None:
        self.parameters = parameters
        self.recipes: set[Recipe] = {p.recipe for p in parameters}
        #: those whose iterates are averaged
        self.averaged = [p for p in parameters if p.recipe.average is not None]
        self._before: list[Tensor] = []
        self._of_weights = [p for p in parameters if p.recipe.stores_weights]
        self._constrained = [p for p in parameters if p.recipe.constraint is not None]
        self._devices = list(dict.fromkeys(p.source.device for p in parameters))
        by_torch: dict[object, list[Parameter]] = {}
        fused: dict[tuple[Any, ...], list[tuple[Parameter, Program]]] = {}
        for p in parameters:
            packed = program(p.recipe, maximize=p.options.maximize, coupled=coupled)
            backend = "torch" if traced else _backend(p, packed)
            if backend == "torch" or isinstance(packed, str):
                by_torch.setdefault((p.ranks, p.is_coded), []).append(p)
            else:
                kind = Fused if coupled else _kind(p, packed, backend)
                penalizes = p.recipe.decay.method == "l2"
                alike = (p.ranks, p.is_coded, p.recipe.corrects_gradient, penalizes)
                key = (kind, p.source.device, backend, p.options.max_workspace_bytes, *alike)
                fused.setdefault(key, []).append((p, packed))
        self.executors: list[Executor] = []
        #: for every executor the states that are decoded while it is at work
        self._working: list[WorkingStates | None] = []
        for (kind, device, backend, max_bytes, *_), pairs in fused.items():
            programs = {id(p): packed for p, packed in pairs}
            options: dict[str, Any] = {"backend": backend, "max_workspace_bytes": max_bytes, "coupled": coupled}
            for run in _runs([p for p, _ in pairs]):
                working = _decoded(run)
                self._add(kind(run, [programs[id(p)] for p in run], skipped[device], **options), working)
        for some in by_torch.values():
            for run in _runs(some):
                working = _decoded(run)
                self._add(Eager(run, skipped, coupled=coupled), working)
        if not traced:
            self._warm_up()

    def _add(self, executor: Executor, working: WorkingStates | None) -> None:
        self.executors.append(executor)
        self._working.append(working)
        if working is not None:
            working.release()

    @property
    def backends(self) -> set[str]:
        """The backends that the elementwise part runs on."""
        return {executor.backend for executor in self.executors}

    def step(
        self,
        hypers: Sequence[Hyper],
        scaling: Scaling | None = None,
        coupling: Coupling | None = None,
        lacking: Mapping[Executor, Tensor] | None = None,
    ) -> None:
        """One step in place; hypers[i] are the numbers of group i. Gradients are read from the parameters.

        lacking: of executors the parameters that a rank has no gradient of, which are not stepped; see `decide`.
        """
        scalings = {device: scaling_on(scaling or NOT_SCALED, device) for device in self._devices}
        self._before = [_value_before(p) for p in self.averaged]
        self._notice_changed_codes()
        self._ask_weights(scalings, coupling)
        for executor in self.executors:
            executor.decide(hypers, scalings, None if lacking is None else lacking.get(executor))
        for executor, working in zip(self.executors, self._working, strict=True):
            if working is None:
                executor.observe()
        if coupling is not None:
            self._share(coupling.factors(self.executors))
        for executor, working in zip(self.executors, self._working, strict=True):
            if working is not None:
                working.load()
                executor.observe()
            self._move(executor, coupling)
            executor.finish()
            if working is not None:
                working.store([p.stepped for p in executor.parameters])
        if self._constrained:
            retract(self._constrained)

    def _ask_weights(self, scalings: dict[torch.device, Scaling], coupling: Coupling | None) -> None:
        """Lets no step be taken that would store something of a weight that is not finite."""
        allowed = None if coupling is None else coupling.allowed(self.parameters, scalings)
        if allowed is not None:
            for p, flag in zip(self.parameters, allowed, strict=True):
                p.allowed = flag
        for p in self._of_weights:
            finite = largest(p.value()).isfinite()
            p.allowed = finite if allowed is None or p.allowed is None else finite & p.allowed

    def take_averages(self, hypers: Sequence[Hyper]) -> None:
        """The averages take the weights that have moved since `step` began, of those whose step was taken."""
        for p, before in zip(self.averaged, self._before, strict=True):
            assert p.recipe.average is not None
            after = p.value()
            value, fresh = p.recipe.average.observe(p.state, before, after, hypers[p.group])
            if p.recipe.average.moves:
                p.store(torch.where(p.stepped, value, after))
            store_if(p.stepped, p.state, fresh)
        self._before = []

    def _move(self, executor: Executor, coupling: Coupling | None) -> None:
        """Moves the weights batch by batch; while the directions of one are taken, the next and the last travel.

        The order is that of the batches alone, the same on all ranks.
        """
        there: deque[tuple[Any, Callable[[], Directed]]] = deque()
        back: deque[tuple[Any, list[Callable[[], Sequence[Tensor]]], Sequence[Tensor | None]]] = deque()

        def turn() -> None:
            batch, directions = there.popleft()
            directed = directions()
            if coupling is not None:
                coupling.moving(executor, batch, directed)
            back.append((batch, executor.send_back(batch, directed.ds), directed.lengths))
            if len(back) > executor.prefetch:
                executor.apply(*back.popleft())

        for batch in executor.batches():
            directions = self._start(executor, batch, coupling)
            if directions is None:
                continue
            there.append((batch, directions))
            if len(there) > executor.prefetch:
                turn()
        while there:
            turn()
        while back:
            executor.apply(*back.popleft())

    def _start(self, executor: Executor, batch: Any, coupling: Coupling | None) -> Callable[[], Directed] | None:
        """Sends a batch, unless a coupling has its directions; gives what waits for them, or None where the batch is
        without directions and has taken its step.
        """
        known = None if coupling is None else coupling.directed(executor, batch)
        if known is not None:
            return lambda: known
        sent = executor.send(batch)
        return None if not sent else lambda: _directed(executor, batch, sent, coupling is not None)

    def directed(self, executor: Executor, batch: Any) -> Directed:
        """The directions of a batch, with their dual norms."""
        return _directed(executor, batch, executor.send(batch), measure=True)

    def _share(self, factors: Sequence[Any]) -> None:
        for p in self.parameters:
            p.step = replace(p.step_values, hyper=replace(p.step_values.hyper, step_factor=factors[p.group]))

    def _warm_up(self) -> None:
        """Has every kernel of the steps checked and compiled, before one of them writes anything."""
        for p in self.parameters:
            if p.recipe.kronecker is not None:
                prepare(p.recipe.kronecker.families, p.source.device)
            for transform in p.recipe.transforms:
                prepare(transform.families, p.source.device)
        for executor in self.executors:
            if isinstance(executor, Fused):
                for bucket in executor.buckets():
                    if not bucket.shape[0]:  # this rank owns none of its matrices
                        continue
                    weights = bucket.items[0].parameter.tensor.dtype if bucket.moves_weights else None
                    warm_up(bucket.recipe.direction, bucket.shape[1:], bucket.dtype, bucket.device, weights)
                continue
            for item in (item for p in executor.parameters for item in p.owned_matrices()):
                p = item.parameter
                warm_up(item.recipe.direction, item.input_shape[1:], p.wide_dtype, p.source.device)

    def notice_changes(self) -> None:
        """What a step does first, for a graph, which replays only what follows."""
        self._notice_changed_codes()
        for executor in self.executors:
            executor.notice_changes()

    def _notice_changed_codes(self) -> None:
        """Has executors look at state that somebody else has changed, as long as they can see it."""
        for executor, working in zip(self.executors, self._working, strict=True):
            if working is not None and working.changed():
                working.load()
                executor.notice_changes()
                working.release()

    def metrics(self, groups: int) -> list[dict[str, Tensor]]:
        """What the last step measured of each group, as 0-d fp64 tensors; see `MatrixOptimizer.metrics`."""
        sums = [[executor.sums_of(number) for executor in self.executors] for number in range(groups)]
        for i, executor in enumerate(self.executors):
            ranks = executor.parameters[0].ranks
            if ranks is not None:
                _reduce([of_group[i] for of_group in sums], ranks)
        return [_norms(of_group) for of_group in sums]


def _directed(executor: Executor, batch: Any, sent: Sequence[Callable[[], Tensor]], measure: bool) -> Directed:
    xs = [wait() for wait in sent]
    return executor.directed(batch, xs, executor.directions(batch, xs), measure)


def _runs(parameters: Sequence[Parameter]) -> list[list[Parameter]]:
    """What is decoded at once: as much as the workspace has room for, the same on all ranks."""
    if not parameters[0].is_coded:
        return [list(parameters)]
    return list(chunk_by_bytes(parameters, lambda p: p.decoded_bytes, parameters[0].options.max_workspace_bytes))


def _decoded(parameters: Sequence[Parameter]) -> WorkingStates | None:
    """State in codes of these parameters, decoded for an executor that is to look at it; None where there is none."""
    states = [p.state for p in parameters if isinstance(p.state, WorkingState)]
    if not states:
        return None
    working = WorkingStates(states)
    working.load()
    return working


def _kind(p: Parameter, packed: Program, backend: str) -> type[Fused]:
    """Who takes a parameter that waits for no other."""
    if steps_whole(p, packed, backend):
        return Whole
    if steps_along_polar(p, packed, backend):
        return AlongPolar
    return InBases if steps_in_bases(p, backend) else Fused


def route(p: Parameter, *, coupled: bool = False) -> str:
    """The backend of a parameter's step but for its direction; RuntimeError where a forced one cannot run.

    One without elements goes by torch operations, whatever was asked for: there is nothing to run.
    """
    return _backend(p, program(p.recipe, maximize=p.options.maximize, coupled=coupled))


def reason(p: Parameter, packed: Program | str) -> str | None:
    """Why the fused ops do not take a parameter of this program; None where they do."""
    if isinstance(packed, str):
        return packed
    more = any(piece.groups > 1 for piece in p.pieces)  # their views have a dimension more
    return multi_tensor.unsupported(_tensors(p), multi_tensor.STRIDED_DIMS - more)


def _backend(p: Parameter, packed: Program | str) -> str:
    device = p.source.device
    if requested(p.options.backend) == "torch" or not p.source.numel():
        return "torch"
    why = reason(p, packed)
    reasons = {name: of_backend or why for name, of_backend in multi_tensor.reasons(device).items()}
    if reasons["triton"] is None:
        assert not isinstance(packed, str)
        if isinstance(p.state, WorkingState):
            p.state.borrow()  # there are to be views of it
        reasons["triton"] = _triton_reason(p, packed)
        if isinstance(p.state, WorkingState):
            p.state.release()
    return multi_tensor.choose("step", p.options.backend, reasons, device, multi_tensor.FAMILY)


def scaling_on(scaling: Scaling, device: torch.device) -> Scaling:
    def moved(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().to(device, torch.float32, non_blocking=device.type == "cuda")

    return Scaling(moved(scaling.found_inf), moved(scaling.grad_scale))


def _tensors(p: Parameter) -> list[Tensor]:
    """What the fused ops read and write elementwise."""
    state = [p.state[key] for key, layout in p.recipe.layouts.items() if layout == "elementwise" and key in p.state]
    return [p.tensor, *state, *([] if p.source.grad is None else [p.grad])]


def _triton_reason(p: Parameter, packed: Program) -> str | None:
    """Why the Triton kernels, which take less than the compiled ones, do not take a parameter; None where they do."""
    tensors = _tensors(p)
    if p.recipe.rounding.mode == "stochastic" and not all(t.is_contiguous() for t in tensors):
        return "stochastic rounding goes by an element's place, and a tensor is not contiguous"
    if packed.whole:
        return multi_tensor.unsupported_by_triton(tensors, 1)
    for piece in (item.piece for item in p.local_matrices()):
        views = [piece.view(t) for t in tensors]
        stack = torch.empty(views[0].shape, device="meta")  # the direction's input is contiguous whatever p is
        if (why := multi_tensor.unsupported_by_triton([*views, stack], piece.batch)) is not None:
            return why
    return _reason_elsewhere(p)


def _reason_elsewhere(p: Parameter) -> str | None:
    """`_triton_reason` of the shards of all ranks, which have to choose alike: collectives follow the choice."""
    if p.sharding is None:
        return None
    for region in dict.fromkeys(p.sharding.regions):
        shard = torch.empty(region.shape, device="meta")
        for part in (run.part for run in p.sharding.local_parts(p.pieces, p.owners, region)):
            view = part.view(shard)
            stack = torch.empty(view.shape, device="meta")
            if (why := multi_tensor.unsupported_by_triton([view, stack], part.batch)) is not None:
                return f"of another rank's shard, {why}"
    return None


def _reduce(sums: Sequence[dict[str, Tensor]], ranks: Ranks) -> None:
    """Makes sums over what lies here sums over whole parameters, in place, as those of gradients are already; `slack`
    stays that of what is owned here.
    """
    entries = [(each, name) for each in sums for name in each if name not in ("grad_sq", "slack")]
    if entries:
        total = torch.stack([each[name].double() for each, name in entries])
        ranks.sum_parts(total)
        for (each, name), t in zip(entries, total.unbind(), strict=True):
            each[name] = t


def _value_before(p: Parameter) -> Tensor:
    """The weight as it is now, of which an average that moves it asks once it is another one."""
    assert p.recipe.average is not None
    value = p.value()
    return value.clone() if p.recipe.average.moves and value.dtype == p.tensor.dtype else value


def _norms(sums: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Norms from sums of squares, over executors, which for one group are on one device."""
    sums = [each for each in sums if each]
    if not sums:
        return {}
    norms = {}
    for name in ("grad", "momentum", "update", "param"):
        norms[f"{name}_norm"] = torch.stack([each[f"{name}_sq"] for each in sums]).sum().sqrt()
    slack = [each["slack"] for each in sums if "slack" in each]
    if slack:
        norms["polar_slack"] = torch.cat(slack)
    return norms
