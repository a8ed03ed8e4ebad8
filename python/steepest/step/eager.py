"""Steps by torch operations: recipes that the fused ops do not have, and what torch.compile traces and fuses itself.

A batch is matrices of one group, shape and dtype, at most max_workspace_bytes at a time: they share a direction call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..chunking import chunk_by_bytes
from ..ops.multi_tensor import Scaling
from ..parts import Hyper
from ..recipe import Recipe, largest, square_sum
from .corrections import Corrections
from .executor import Directed
from .factors import Factors, advance_clocks
from .parameter import LocalMatrices, Matrices, OwnedMatrices, Parameter, StepValues, signed_gradient, store_if
from .program import is_elementwise

if TYPE_CHECKING:
    from ..sharding.ranks import Ranks
    from .shared_matrices import SharedMatrices

__all__ = ["Eager"]


class Batch:
    """Matrices whose directions are taken together; `parts` are what their elementwise work is done on."""

    def __init__(self, items: Sequence[Matrices]) -> None:
        self.recipe: Recipe = items[0].recipe
        self.matrices = self.parts = items
        self.hyper = items[0].parameter.step_values.hyper
        self._sizes = [item.input_shape[0] for item in items]

    def send(self) -> Callable[[], Tensor]:
        """Gives what waits for the directions' input."""
        return self.inputs

    def send_back(self, d: Tensor) -> Callable[[], list[Tensor]]:
        """Gives what waits for the update of every part, in the shape of `Matrices.elementwise`; d: the directions."""
        return lambda: self.updates(d)

    def inputs(self) -> Tensor:
        """A lone item is reshaped, several are stacked."""
        first, dtype = self.parts[0], _work_dtype(self.parts[0])
        if len(self.parts) == 1:
            return _input(first).to(dtype).reshape(first.input_shape)
        x = torch.empty((sum(self._sizes), *first.input_shape[1:]), dtype=dtype, device=first.parameter.tensor.device)
        for item, part in zip(self.parts, x.split(self._sizes), strict=True):
            of_item = _input(item)
            part.view(of_item.shape).copy_(of_item)
        return x

    def directions(self, x: Tensor) -> Tensor:
        return self.recipe.descent_direction(x, self.hyper)

    def measured(self, x: Tensor, d: Tensor) -> Sequence[Tensor]:
        """The dual norms of the inputs of each of `matrices`, from their directions."""
        return self._dual_norms(x, d).split(self._sizes)

    def _dual_norms(self, x: Tensor, d: Tensor) -> Tensor:
        return self.recipe.dual_norm(x, d).flatten().double()

    def updates(self, d: Tensor) -> list[Tensor]:
        """The update of every part."""
        updates = []
        for item, of_item in zip(self.parts, d.split(self._sizes), strict=True):
            state, g, hyper = item.recipe_state(), item.elementwise(item.grad), self.hyper
            m = self.recipe.momentum_of(state, g, hyper)
            of_item = of_item if item.by_matrix else of_item.reshape(g.shape)
            u, remembered = self.recipe.update(state, of_item, m, hyper, g, item.chosen)
            item.keep(remembered)
            item.chosen = None
            updates.append(u)
        return updates


class SharedBatch(Batch):
    """Matrices whose parts here are worked on, and whose directions their owners take."""

    def __init__(self, shared: SharedMatrices) -> None:
        self.recipe, self.matrices, self.parts = shared.recipe, shared.matrices, shared.parts
        self.hyper = shared.matrices[0].parameter.step_values.hyper
        self._shared, self._dtype = shared, _work_dtype(shared.matrices[0])

    def send(self) -> Callable[[], Tensor]:
        wide = self.matrices[0].parameter.wide_dtype
        stored = wide if self.recipe.by_matrix else self._dtype
        here = [(_momentum if self.recipe.by_matrix else _input)(part) for part in self.parts]
        return self._shared.send(self._shared.packed(here, stored), self._dtype)

    def directions(self, x: Tensor) -> Tensor:
        dim = self._shared.sharded_dim
        if dim is not None:
            slack = torch.empty(len(x), dtype=torch.float32, device=x.device)
            return self.recipe.direction.sharded_units([x], [dim], [slack], self._shared.ranks.all_reduce)[0]
        return super().directions(x) if len(x) else x  # a rank may own nothing

    def measured(self, x: Tensor, d: Tensor) -> Sequence[Tensor]:
        return self._shared.of_all(self._dual_norms(x, d))[0]

    def send_back(self, d: Tensor) -> Callable[[], list[Tensor]]:
        wide = self.matrices[0].parameter.wide_dtype
        wait = self._shared.send_back(d, wide if self.recipe.by_matrix else d.dtype)
        return wait if self.recipe.by_matrix else lambda: self._elementwise(wait())

    def _elementwise(self, ds: Sequence[Tensor]) -> list[Tensor]:
        """The updates of the parts, from their directions."""
        updates = []
        for item, d in zip(self.parts, ds, strict=True):
            m = _momentum(item)
            updates.append(self.recipe.update(item.recipe_state(), d.reshape(m.shape), m, self.hyper)[0])
        return updates


class Eager:
    """The `Executor` (step/executor.py) by torch operations. skipped: the int64 counters by device."""

    backend = "torch"

    def __init__(self, parameters: Sequence[Parameter], skipped: dict[torch.device, Tensor], *, coupled: bool) -> None:
        self.parameters = parameters
        self._skipped = skipped
        self._coupled = coupled
        #: ranks that share the parameters, all of them or none
        self._ranks = parameters[0].ranks
        self.prefetch = 0 if self._ranks is None else 1
        self._matrices = [item for parameter in parameters for item in parameter.owned_matrices()]
        self._factors = Factors(self._matrices)
        self._parts = [item for p in parameters if self._ranks for item in p.local_matrices()]
        self._known: dict[tuple[tuple[int, int], ...], list[SharedMatrices]] = {}
        self._batches: list[Batch] = []
        self._corrections = Corrections(parameters)
        self._sums: dict[tuple[int, str], list[Tensor]] = {}

    def decide(
        self, hypers: Sequence[Hyper], scaling: dict[torch.device, Scaling], lacking: Tensor | None = None
    ) -> None:
        scales = [scaling[p.tensor.device] for p in self.parameters]
        grads = [
            signed_gradient(p.grad, p.options.maximize, scale.grad_scale)
            for p, scale in zip(self.parameters, scales, strict=True)
        ]
        self._corrections.correct(grads, hypers)
        measured = [(largest(g).double(), p.recipe.square(g)) for p, g in zip(self.parameters, grads, strict=True)]
        if self._ranks is not None:
            measured = _reduced(measured, self._ranks)
        self._corrections.clip(grads, [square for _, square in measured])
        self._sums = {}
        flags = [None] * len(grads) if lacking is None else lacking.unbind()
        for p, g, (most, square), scale, lacks in zip(self.parameters, grads, measured, scales, flags, strict=True):
            finite = p.accepts(most, square)
            if lacks is not None:
                finite = finite & ~lacks
            if p.allowed is not None:
                finite = finite & p.allowed
            if scale.found_inf is not None:
                finite = finite & (scale.found_inf.reshape(()) == 0)
            p.step, p.flag = StepValues(g, finite, p.recipe.phase(p.state), hypers[p.group]), finite
        if self._ranks is not None:
            self._agree(self._ranks)
        for p, (_, square) in zip(self.parameters, measured, strict=True):
            self._skipped[p.tensor.device].add_(p.step_values.finite.logical_not())
            self._add(p, "grad", torch.where(p.step_values.finite, square, 0))

    def _agree(self, ranks: Ranks) -> None:
        """Takes no step where a rank refuses it."""
        flags = torch.stack([p.step_values.finite for p in self.parameters]).to(torch.float64)
        ranks.all_reduce(flags, "min")
        for p, flag in zip(self.parameters, (flags != 0).unbind(), strict=True):
            p.step, p.flag = replace(p.step_values, finite=flag), flag

    def _shared(self, parameters: Sequence[Parameter]) -> list[SharedMatrices]:
        """The matrices of these parameters as ranks take their directions together."""
        from .shared_batches import shared_buckets

        places = tuple((p.group, p.index) for p in parameters)
        if places not in self._known:
            parts = [item for item in self._parts if isinstance(item, LocalMatrices)]
            owned = [item for item in self._matrices if isinstance(item, OwnedMatrices)]
            max_bytes = parameters[0].options.max_workspace_bytes if parameters else 0
            self._known[places] = list(shared_buckets(parameters, parts, owned, _bucket_key, max_bytes))
        return self._known[places]

    def observe(self) -> None:
        if self._ranks is not None:
            for shared in self._shared([p for p in self.parameters if p.recipe.measures_gradients]):
                shared.receive_gradients()
        self._factors.update(after=False)
        for p in self.parameters:
            if p.step_values.phase.steps:
                store_if(
                    p.step_values.finite,
                    p.state,
                    p.recipe.update_moments(p.state, p.step_values.grad, p.step_values.hyper),
                )
        self._corrections.remember()
        self._factors.observe(self._matrices)
        self._batches = self._new_batches()

    def batches(self) -> list[Batch]:
        return self._batches

    def _new_batches(self) -> list[Batch]:
        shared: list[Batch] = []
        matrices = self._matrices
        if self._ranks is not None:
            from .shared_submatrix import choose

            here = {(p.group, p.index) for p in self.parameters if is_elementwise(p.recipe) and not self._coupled}
            away = [p for p in self.parameters if p.step_values.phase.steps and (p.group, p.index) not in here]
            travelling = self._shared(away)
            choose(travelling)
            shared = [SharedBatch(each) for each in travelling]
            matrices = [item for item in self._parts if item.place[:2] in here]
        buckets: dict[tuple[object, ...], list[Matrices]] = {}
        for number, item in enumerate(matrices):
            if item.phase.steps:
                alone = -1 if item.recipe.direction.batched else number
                buckets.setdefault((*_bucket_key(item), alone), []).append(item)
        return shared + [
            Batch(batch)
            for bucket in buckets.values()
            for batch in chunk_by_bytes(bucket, _workspace_bytes, bucket[0].parameter.options.max_workspace_bytes)
        ]

    def items(self, batch: Batch) -> list[list[Matrices]]:
        return [list(batch.matrices)]

    def send(self, batch: Batch) -> list[Callable[[], Tensor]]:
        return [batch.send()]

    def directions(self, batch: Batch, xs: list[Tensor]) -> list[Tensor]:
        return [batch.directions(xs[0])]

    def directed(self, batch: Batch, xs: list[Tensor], ds: list[Tensor], measure: bool) -> Directed:
        """Directions are scaled already where the recipe says so."""
        lengths = [None] * len(batch.parts)
        return Directed(ds, lengths, batch.measured(xs[0], ds[0]) if measure else None)

    def send_back(self, batch: Batch, ds: Sequence[Tensor]) -> list[Callable[[], Sequence[Tensor]]]:
        return [batch.send_back(ds[0])]

    def apply(
        self, batch: Batch, sent: Sequence[Callable[[], Sequence[Tensor]]], norms: Sequence[Tensor | None]
    ) -> None:
        """Moves the weights; without norms, as directions are scaled already where the recipe says so."""
        for item, u in zip(batch.parts, (u for wait in sent for u in wait()), strict=True):
            self._apply(item, u)

    def _apply(self, item: Matrices, u: Tensor) -> None:
        recipe, p, weight, finite, hyper = (
            item.recipe,
            item.parameter,
            item.weight,
            item.finite,
            item.parameter.step_values.hyper,
        )
        value = recipe.rounding.value(weight, item.state)
        u = torch.where(finite, u.reshape(weight.shape), 0).to(value.dtype)  # 0 NaN is NaN
        moved = recipe.moved(value, u, hyper, item.ratio)
        stored, remainder = recipe.rounding.store(moved, weight.dtype, item.state.get("step"), item.place)
        weight.copy_(torch.where(finite, stored, weight))
        item.keep(remainder)
        self._add(p, "update", square_sum(u * (hyper.lr * item.ratio * hyper.step_factor)))

    def finish(self) -> None:
        self._factors.update(after=True)
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


def _reduced(measured: Sequence[tuple[Tensor, Tensor]], ranks: Ranks) -> list[tuple[Tensor, Tensor]]:
    """(largest magnitude, sum of squares) of whole gradients from those of shards; infinite where not finite."""
    rows = torch.stack([torch.stack([most.isfinite().double(), square, most]) for most, square in measured])
    ranks.reduce_stats(rows)
    return [
        (torch.where(finite != 0, most, torch.inf), square)
        for finite, square, most in zip(rows[:, 0].unbind(), rows[:, 1].unbind(), rows[:, 2].unbind(), strict=True)
    ]


def _bucket_key(item: Matrices) -> tuple[object, ...]:
    """What matrices must have in common to share a direction call."""
    p = item.parameter
    return p.group, item.piece.rows, item.piece.cols, p.source.dtype, p.grad_dtype, p.source.device


def _momentum(item: Matrices) -> Tensor:
    return item.recipe.momentum_of(item.recipe_state(), item.elementwise(item.grad), item.parameter.step_values.hyper)


def _input(item: Matrices) -> Tensor:
    """What the direction is asked about, of one item."""
    recipe, m = item.recipe, _momentum(item)
    item.chosen = None if recipe.submatrix is None else recipe.submatrix.chosen(m)
    w = item.elementwise(recipe.rounding.value(item.weight, item.state)) if recipe.reads_weight else None
    return recipe.direction_input(item.recipe_state(), m, item.parameter.step_values.hyper, w, item.chosen)


def _work_dtype(item: Matrices) -> torch.dtype:
    # fp16 has no room for what the fused op scales into its range.
    dtype = item.parameter.input_dtype
    return item.parameter.wide_dtype if dtype == torch.float16 else dtype


def _workspace_bytes(item: Matrices) -> int:
    """Memory of the input, of what the direction needs, of the direction and of an update in fp32."""
    batch, rows, cols = item.shape
    dtype = _work_dtype(item)
    return batch * (item.recipe.direction.workspace_bytes(rows, cols, dtype) + rows * cols * (2 * dtype.itemsize + 4))
