"""Steps by torch operations: recipes that the fused ops do not have, and what torch.compile traces and fuses itself.

A batch is matrices of one group, shape and dtype, at most max_workspace_bytes at a time: they share a direction call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..chunking import chunk_by_bytes
from ..ops.multi_tensor import Scaling
from ..parts import Hyper
from ..recipe import largest, square_sum
from .coupling import Directed
from .factors import advance_clocks, update_factors, update_rotated_moments
from .parameter import Matrices, Parameter, StepValues, signed_gradient, store_if
from .seams import Reduce

__all__ = ["Eager"]

Batch = list[Matrices]


class Eager:
    """The executor by torch operations; see `steepest.step.plan.Executor`. skipped: the int64 counters by device."""

    backend = "torch"

    def __init__(self, parameters: Sequence[Parameter], skipped: dict[torch.device, Tensor]) -> None:
        self.parameters = parameters
        self._skipped = skipped
        self._matrices = [item for parameter in parameters for item in parameter.matrices()]
        self._batches: list[Batch] = []
        self._sums: dict[tuple[int, str], list[Tensor]] = {}

    def decide(self, hypers: Sequence[Hyper], scaling: dict[torch.device, Scaling], reduce: Reduce | None) -> None:
        scales = [scaling[p.tensor.device] for p in self.parameters]
        grads = [
            signed_gradient(p.grad, p.options.maximize, scale.grad_scale)
            for p, scale in zip(self.parameters, scales, strict=True)
        ]
        ours = [(largest(g).double(), square_sum(g)) for g in grads]
        measured = _reduced(ours, reduce) if reduce is not None and ours else ours
        self._sums = {}
        rows = zip(self.parameters, grads, ours, measured, scales, strict=True)
        for p, g, (_, square_here), (most, square), scale in rows:
            finite = p.takes(most, square)
            if scale.found_inf is not None:
                finite = finite & (scale.found_inf.reshape(()) == 0)
            self._skipped[p.tensor.device].add_(finite.logical_not())
            p.step, p.flag = StepValues(g, finite, p.recipe.phase(p.state), hypers[p.group]), finite
            self._add(p, "grad", torch.where(finite, square_here, 0))

    def observe(self) -> None:
        update_factors([item for item in self._matrices if item.phase.before])
        for p in self.parameters:
            if p.taken.phase.steps:
                store_if(p.taken.finite, p.state, p.recipe.update_moments(p.state, p.taken.grad, p.taken.hyper))
        stepping = [item for item in self._matrices if item.phase.steps]
        update_rotated_moments(stepping)
        self._batches = self._new_batches(stepping)

    def batches(self) -> list[Batch]:
        return self._batches

    def _new_batches(self, stepping: Sequence[Matrices]) -> list[Batch]:
        buckets: dict[tuple[object, ...], Batch] = {}
        for number, item in enumerate(stepping):
            p, alone = item.parameter, -1 if item.recipe.direction.batched else number
            key = (p.group, item.piece.rows, item.piece.cols, p.tensor.dtype, p.grad_dtype, p.tensor.device, alone)
            buckets.setdefault(key, []).append(item)
        return [
            batch
            for bucket in buckets.values()
            for batch in chunk_by_bytes(bucket, _workspace_bytes, bucket[0].parameter.options.max_workspace_bytes)
        ]

    def items(self, batch: Batch) -> list[list[Matrices]]:
        return [batch]

    def inputs(self, batch: Batch) -> list[Tensor]:
        """A lone item is reshaped, several are stacked."""
        first, dtype = batch[0], _work_dtype(batch[0])
        if len(batch) == 1:
            return [_input(first).to(dtype).reshape(first.input_shape)]
        sizes = [item.input_shape[0] for item in batch]
        x = torch.empty((sum(sizes), *first.input_shape[1:]), dtype=dtype, device=first.parameter.tensor.device)
        for item, part in zip(batch, x.split(sizes), strict=True):
            of_item = _input(item)
            part.view(of_item.shape).copy_(of_item)
        return [x]

    def directions(self, batch: Batch, xs: list[Tensor]) -> list[Tensor]:
        return [batch[0].recipe.descent_direction(xs[0], batch[0].parameter.taken.hyper)]

    def directed(self, batch: Batch, xs: list[Tensor], ds: list[Tensor], measure: bool) -> Directed:
        """Directions are scaled already where the recipe says so."""
        lengths = [None] * len(batch)
        if not measure:
            return Directed(ds, lengths)
        inner = batch[0].recipe.direction.dual_norm(xs[0], ds[0]).flatten()
        return Directed(ds, lengths, inner.split([item.input_shape[0] for item in batch]))

    def apply(self, batch: Batch, directed: Directed) -> None:
        for item, d in zip(batch, directed.ds[0].split([item.input_shape[0] for item in batch]), strict=True):
            self._apply(item, d)

    def _apply(self, item: Matrices, d: Tensor) -> None:
        recipe, p, weight, finite = item.recipe, item.parameter, item.weight, item.finite
        state, g, hyper = item.recipe_state(), item.elementwise(item.grad), p.taken.hyper
        u, remembered = recipe.update(state, d if item.by_matrix else d.reshape(g.shape), g, hyper)
        value = recipe.rounding.value(weight, item.state)
        u = torch.where(finite, u.reshape(weight.shape), 0).to(value.dtype)  # 0 NaN is NaN
        moved = recipe.moved(value, u, hyper, item.ratio)
        stored, remainder = recipe.rounding.store(moved, weight.dtype, item.state.get("step"), item.place)
        weight.copy_(torch.where(finite, stored, weight))
        item.keep({**remainder, **remembered})
        self._add(p, "update", square_sum(u * (hyper.lr * item.ratio * hyper.step_factor)))

    def finish(self) -> None:
        update_factors([item for item in self._matrices if item.phase.after])
        advance_clocks(self.parameters)
        for p in self.parameters:
            self._add(p, "update", torch.zeros((), dtype=torch.float64, device=p.tensor.device))
            self._add(p, "momentum", square_sum(p.momentum))
            self._add(p, "param", square_sum(p.tensor))
            p.step = None

    def sums_of(self, group: int) -> dict[str, Tensor]:
        return {f"{name}_sq": torch.stack(parts).sum() for (at, name), parts in self._sums.items() if at == group}

    def notice_changes(self) -> None:
        """Nothing is remembered of the state between steps."""

    def _add(self, p: Parameter, name: str, square: Tensor) -> None:
        self._sums.setdefault((p.group, name), []).append(square)


def _reduced(measured: Sequence[tuple[Tensor, Tensor]], reduce: Reduce) -> list[tuple[Tensor, Tensor]]:
    """(largest magnitude, sum of squares) of all ranks; infinite where a rank's is not finite.

    `reduce` takes what the fused ops measure of each gradient.
    """
    rows = torch.stack([torch.stack([most.isfinite().double(), square, most]) for most, square in measured])
    reduce(rows)
    finite = rows[:, 0] != 0
    return [
        (torch.where(flag, most, torch.inf), square)
        for flag, most, square in zip(finite.unbind(), rows[:, 2].unbind(), rows[:, 1].unbind(), strict=True)
    ]


def _input(item: Matrices) -> Tensor:
    """What the direction is asked about, of one item."""
    recipe, state, g = item.recipe, item.recipe_state(), item.elementwise(item.grad)
    w = item.elementwise(recipe.rounding.value(item.weight, item.state)) if recipe.reads_weight else None
    return recipe.direction_input(state, g, item.parameter.taken.hyper, w)


def _work_dtype(item: Matrices) -> torch.dtype:
    # fp16 has no room for what the fused op scales into its range.
    dtype = item.parameter.input_dtype
    return item.parameter.wide_dtype if dtype == torch.float16 else dtype


def _workspace_bytes(item: Matrices) -> int:
    """Memory of the input, of what the direction needs, of the direction and of an update in fp32."""
    batch, rows, cols = item.shape
    dtype = _work_dtype(item)
    return batch * (item.recipe.direction.workspace_bytes(rows, cols, dtype) + rows * cols * (2 * dtype.itemsize + 4))
