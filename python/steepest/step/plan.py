"""One step for all groups: what the fused ops take goes there, device by device, the rest by the parts of its recipe.

A `Plan` is made once for a set of parameters with gradients and serves every step until one of them changes. Nothing in
a step reads a tensor on the host, so it neither waits for the device nor depends on the data's values, but for a
refresh of eigenbases, which reads the status of the one before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import unfused
from .fused import Layout, gradient, program
from .matrices import Piece
from .ops import multi_tensor, selfcheck
from .ops.backend import prepare, requested
from .ops.multi_tensor import NOT_SCALED, Scaling
from .ops.polar_chain import Update
from .parts import Direction, Hyper
from .recipe import Recipe, State
from .rounds import Entry


@dataclass(frozen=True)
class Group:
    """The parameters of a group that have a gradient, index by index as in `unfused.Batch`."""

    recipe: Recipe
    params: Sequence[Tensor]
    states: Sequence[State]
    pieces: Sequence[tuple[Piece, ...]]
    places: Sequence[tuple[int, int]]
    maximize: bool = False
    backend: str = "auto"
    max_workspace_bytes: int = 1 << 30
    fuse_update: bool = False


def reason(group: Group, i: int) -> str | None:
    """Why the fused ops do not take parameter i; None where they do."""
    p, state = group.params[i], group.states[i]
    packed = program(group.recipe, maximize=group.maximize)
    if isinstance(packed, str):
        return packed
    tensors = [p, *(t for t in state.values() if isinstance(t, Tensor) and t.shape == p.shape)]
    return multi_tensor.takes(tensors if p.grad is None else [*tensors, p.grad])


def route(group: Group, i: int) -> str:
    """The backend of a parameter's step but for its direction; RuntimeError where a forced one cannot run.

    One without elements goes with the parts, whatever was asked for: there is nothing to run.
    """
    device = group.params[i].device
    if requested(group.backend) == "torch" or not group.params[i].numel():
        return "torch"
    why = reason(group, i)
    reasons = {name: own or why for name, own in multi_tensor.reasons(device).items()}
    if reasons["triton"] is None:
        reasons["triton"] = _triton_reason(group, i)
    return multi_tensor.choose("step", group.backend, reasons, device, multi_tensor.FAMILY)


def _triton_reason(group: Group, i: int) -> str | None:
    """Why the Triton kernels, which take less than the compiled ones, do not take parameter i; None where they do."""
    p = group.params[i]
    own = (t for t in group.states[i].values() if isinstance(t, Tensor) and t.shape == p.shape)
    tensors = [p, *own, *([] if p.grad is None else [p.grad])]
    if group.recipe.rounding.mode == "stochastic" and not all(t.is_contiguous() for t in tensors):
        return "stochastic rounding goes by an element's place, and a tensor is not contiguous"
    packed = program(group.recipe)
    if isinstance(packed, str) or packed.whole:
        return multi_tensor.triton_takes(tensors, 1)
    for piece in group.pieces[i]:
        views = [piece.view(t) for t in tensors]
        stack = torch.empty(views[0].shape, device="meta")  # the direction's input is contiguous whatever p is
        if (why := multi_tensor.triton_takes([*views, stack], piece.batch)) is not None:
            return why
    return None


class Plan:
    """The step of these groups. skipped: the int64 counters by device."""

    def __init__(self, groups: Sequence[Group], skipped: dict[torch.device, Tensor]) -> None:
        self.groups = groups
        self.skipped = skipped
        self._layouts: list[Layout] = []
        self._unfused: list[tuple[int, Group]] = []
        self._unfused_sums: dict[int, unfused.Sums] = {}
        entries: dict[tuple[torch.device, str, int], list[Entry]] = {}
        for number, group in enumerate(groups):
            left = []
            for i, p in enumerate(group.params):
                backend = route(group, i)
                if backend == "torch":
                    left.append(i)
                    continue
                key = (p.device, backend, group.max_workspace_bytes)
                entries.setdefault(key, []).append(_entry(number, group, i))
            if left:
                self._unfused.append((number, _only(group, left)))
        for (device, backend, max_bytes), some in entries.items():
            self._layouts.append(Layout(some, skipped[device], backend, max_bytes))
        self._warm_up()

    def _warm_up(self) -> None:
        """Has every kernel of the steps checked and compiled, before one of them writes anything."""
        for bucket in (bucket for layout in self._layouts for round_ in layout.rounds for bucket in round_.buckets):
            weights = bucket.members[0].entry.param.dtype if bucket.fuses else None
            warm_up(bucket.recipe.direction, bucket.shape[1:], bucket.dtype, bucket.device, weights)
        for _, group in self._unfused:
            for p, pieces in zip(group.params, group.pieces):
                if group.recipe.kronecker is not None:
                    prepare(group.recipe.kronecker.families, p.device)
                wide = torch.promote_types(gradient(p).dtype, torch.float32)
                for piece in pieces if p.numel() else ():
                    warm_up(group.recipe.direction, group.recipe.input_shape(piece.shape)[1:], wide, p.device)

    @property
    def backends(self) -> set[str]:
        """Those that the elementwise part runs on."""
        return {layout.backend for layout in self._layouts} | ({"torch"} if self._unfused else set())

    def step(self, hypers: Sequence[Hyper], scaling: Scaling = NOT_SCALED) -> None:
        """One step in place; hypers[i] are the numbers of group i. Gradients are read from the parameters."""
        for layout in self._layouts:
            layout.step(hypers, scaling_on(scaling, layout.device))
        for number, group in self._unfused:
            batch = unfused.Batch(
                group.params,
                [gradient(p) for p in group.params],
                group.states,
                [self.skipped[p.device] for p in group.params],
                group.pieces,
                group.places,
                group.maximize,
                scaling_on(scaling, group.params[0].device),
                group.max_workspace_bytes,
            )
            self._unfused_sums[number] = unfused.update(group.recipe, hypers[number], batch)

    def remember(self, sums: dict[int, unfused.Sums]) -> None:
        """Sums of a step that was taken elsewhere, by the number of the group, for `metrics`."""
        self._unfused_sums.update(sums)

    def notice_changes(self) -> None:
        """What a step does first, for a graph, which replays only what follows."""
        for layout in self._layouts:
            layout.notice_changes()

    def metrics(self) -> list[dict[str, Tensor]]:
        """For each group what its last step measured, as 0-d fp64 tensors; see `MatrixOptimizer.metrics`."""
        found: list[dict[str, Tensor]] = []
        for number in range(len(self.groups)):
            sums = [layout.sums_of(number) for layout in self._layouts]
            if number in self._unfused_sums:
                sums.append(self._unfused_sums[number].by_name())
            found.append(_norms([each for each in sums if each]))
        return found


_warm: set[tuple[object, ...]] = set()


def warm_up(
    direction: Direction,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    weights: torch.dtype | None = None,
) -> None:
    """Takes the direction of a zero matrix on a GPU, once for every shape.

    Whatever its kernels meet for the first time, they meet here: their self-check, their compilation, a launch that
    fails. weights: the dtype of those that the direction moves itself.
    """
    key = (direction, shape, dtype, device, weights)
    if device.type != "cuda" or not (direction.batched and direction.capturable and selfcheck.enabled) or key in _warm:
        return
    x = torch.zeros(1, *shape, dtype=dtype, device=device)
    slack = torch.empty(1, dtype=torch.float32, device=device)
    if weights is None:
        direction.units([x], [slack])
    else:
        eta = torch.zeros(1, dtype=torch.float32, device=device)
        direction.move([x], [slack], [Update([torch.zeros(shape, dtype=weights, device=device)], eta, eta + 1)])
    _warm.add(key)


def _norms(sums: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Norms from sums of squares, over layouts, which for one group are on one device."""
    if not sums:
        return {}
    found = {}
    for name in ("grad", "momentum", "update", "param"):
        found[f"{name}_norm"] = torch.stack([each[f"{name}_sq"] for each in sums]).sum().sqrt()
    slack = [each["slack"] for each in sums if "slack" in each]
    if slack:
        found["polar_slack"] = torch.cat(slack)
    return found


def _entry(number: int, group: Group, i: int) -> Entry:
    packed = program(group.recipe, maximize=group.maximize)
    assert not isinstance(packed, str)
    p = group.params[i]
    return Entry(
        number,
        group.places[i],
        group.recipe,
        packed,
        group.pieces[i],
        p,
        group.states[i],
        p.dtype if p.grad is None else p.grad.dtype,
        group.fuse_update,
    )


def _only(group: Group, kept: Sequence[int]) -> Group:
    return replace(
        group,
        params=[group.params[i] for i in kept],
        states=[group.states[i] for i in kept],
        pieces=[group.pieces[i] for i in kept],
        places=[group.places[i] for i in kept],
    )


def scaling_on(scaling: Scaling, device: torch.device) -> Scaling:
    def moved(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().to(device, torch.float32, non_blocking=device.type == "cuda")

    return Scaling(moved(scaling.found_inf), moved(scaling.grad_scale))
