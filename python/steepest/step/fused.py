"""Steps by the fused ops: three ops around the direction, or four.

    grad_stats                                 every gradient
    for every batch of matrices
        update_moments                         every item of the batch; in the first, all that is elementwise
        d = direction(x)                       buckets of all shapes at once
        apply_update                           every item of the batch, but those whose direction moved the weights;
                                               updates that a running size of theirs divides are divided here

What depends only on shapes, dtypes and recipes is laid out once; a step hands the tensors over. Their addresses travel
in the launch (Triton's table of them is keyed by its contents), so no new gradient makes them stale, and inputs are
borrowed from torch's allocator, so that between steps their memory is free for activations.

Recipes with Kronecker factors or other transforms of the update have torch operations between the ops and the
direction. Of a recipe with a submatrix they choose its rows of what `update_moments` has stored, and damp the momentum
of these with the updates; where ranks share the matrices all moments come first, so that one sum serves all choices.
Gradients that a recipe corrects are made by torch operations, and the ops read what these gave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ops import multi_tensor
from ..ops.multi_tensor import Groups, Scaling, Table
from ..ops.program import COLUMNS, Program
from ..parts import Direction, Hyper
from ..recipe import Recipe
from .buckets import Bucket, FusedBatch, FusedItem, batches_of, bucket_key, in_batches, items_of
from .corrections import Corrections
from .executor import Directed
from .factors import Factors, advance_clocks
from .parameter import LocalMatrices, Matrices, OwnedMatrices, Parameter, StepValues, signed_gradient, store_if

if TYPE_CHECKING:
    from ..sharding.ranks import Ranks
    from .shared_matrices import SharedMatrices

__all__ = ["Fused", "groups_of"]


class Fused:
    """The `Executor` (step/executor.py) by the fused ops. Parameters have elements and are on one device; gradients of
    all of them are corrected or of none, and weight decay is in all of these or in none.

    skipped: the int64 counter of that device.   coupled: layers wait for one another, so that all moments are updated
    before the first direction is taken.
    """

    def __init__(
        self,
        parameters: Sequence[Parameter],
        programs: Sequence[Program],
        skipped: Tensor,
        *,
        backend: str,
        max_workspace_bytes: int,
        coupled: bool,
    ) -> None:
        self.parameters = parameters
        self.device = skipped.device
        self.backend = backend
        self._max_bytes, self._coupled = max_workspace_bytes, coupled
        #: ranks that share the parameters, all of them or none
        self._ranks = parameters[0].ranks
        #: those whose momentum is damped once a step has been taken by it
        self._damped = [p for p in parameters if p.recipe.submatrix is not None]
        #: whether all moments are updated before a direction is taken: ranks choose rows of all matrices at once
        self._moments_first = coupled or bool(self._ranks and self._damped)
        self._packed = [program.packed() for program in programs]
        self._group_of = [p.group for p in parameters]
        self._items = items_of(parameters, programs)
        lines = [0] * len(parameters)
        for item in self._items:
            lines[item.row] += item.count
        self._first_sums = list(accumulate(lines, initial=0))
        sizes = [max(p.tensor.numel(), 1) for p in parameters]
        self.table = Table.empty(skipped, sizes, [(item.count, item.size) for item in self._items])
        #: views of the table, which a step asks for many times
        self._column = cache(self.table.column)
        self._absent = torch.empty(0, device=self.device)
        self._steps = [p.state.get("step", self._absent) for p in parameters]
        self.prefetch = 0 if self._ranks is None else 1
        self._whole = {row for row, program in enumerate(programs) if program.whole}
        sharing = [p for row, p in enumerate(parameters) if self._ranks and row not in self._whole]
        self._owned = [item for p in sharing for item in p.owned_matrices() if isinstance(item, OwnedMatrices)]
        self._batches = self._new_batches(set())
        #: those of this step: fewer where a parameter's first gradient only makes its metric; and the rows of such
        self._present, self._waiting = self._batches, set[int]()
        #: parameters with torch operations around the direction, by their rows, and their matrices
        self._by_torch = {row: p for row, p in enumerate(parameters) if p.recipe.by_matrix}
        self._corrections = Corrections(parameters)
        self._penalizes = parameters[0].recipe.decay.method == "l2"
        #: those whose gradients are clipped by their norms
        self._clipped = [p for p in parameters if p.recipe.variance_reduction is not None]
        clipped = [row for row, p in enumerate(parameters) if p.recipe.variance_reduction is not None]
        # Now, as a CUDA graph may not bring numbers to the device.
        self._rows_clipped = torch.tensor(clipped, dtype=torch.int64, device=self.device)
        self._limits = self._limits_of_rows() if self._by_torch or clipped else None
        #: rows of those whose gradients and decisions are looked at outside of the ops
        self._valued = list(range(len(parameters)) if coupled or self._corrections else self._by_torch)
        here = [item.matrices for item in self._items if item.matrices is not None]
        ours: Sequence[Matrices] = self._owned if self._ranks else here
        by_matrix = [item for item in ours if item.by_matrix]
        self._factors = Factors(by_matrix)
        #: recipes whose statistics are left to their buckets
        self._at_once = {recipe for recipe in {p.recipe for p in parameters} if self._is_stepped_at_once(recipe)}
        self._observed = [item for item in by_matrix if item.recipe not in self._at_once]
        limits = [p.recipe.largest_gradient(p.grad_dtype) for p in parameters]
        self._column("largest_taken").copy_(torch.tensor(limits, dtype=torch.float64, device=self.device))
        for p, flag in zip(parameters, self._column("finite").unbind(), strict=True):
            p.flag = flag
        measuring = [p for p in self._by_torch.values() if p.recipe.measures_gradients]
        self._measuring = list(self._shared(measuring)) if self._ranks else []
        self._watched = [p.momentum for p in parameters if p.input_dtype is torch.float16]
        self._versions: list[int] = []
        self._damped_items = [item for item in self._items if item.parameter.recipe.submatrix is not None]
        lines = [line for item in self._damped_items for line in range(item.lines.start, item.lines.stop)]
        self._damped_lines = torch.tensor(lines, dtype=torch.int64, device=self.device)
        self._rows = {group: self._span(group) for group in set(self._group_of)}
        self._remember_state()

    def _new_batches(self, waiting: set[int]) -> list[FusedBatch]:
        """The batches of all parameters but those in these rows."""
        items = [item for item in self._items if item.row not in waiting]
        if self._ranks is None:
            return list(batches_of(items, self._max_bytes, self._coupled, self.backend != "triton"))
        return self._shared_batches(items, waiting)

    def _shared_batches(self, items: Sequence[FusedItem], waiting: set[int]) -> list[FusedBatch]:
        from .shared_batches import bytes_at_once
        from .shared_bucket import SharedBucket

        rows = {(p.group, p.index): row for row, p in enumerate(self.parameters)}
        whole = [item for item in items if item.matrices is None]
        of_part = {item.place: item for item in items}
        travelling = [p for row, p in enumerate(self.parameters) if row not in waiting | self._whole]
        sized: list[tuple[Bucket, int]] = []
        for shared in self._shared(travelling):
            parts = [of_part[part.place] for part in shared.parts]
            places = [rows[item.parameter.group, item.parameter.index] for item in shared.matrices]
            sized.append((SharedBucket(shared, parts, places), shared.input_bytes))
        batches = list(in_batches([], sized, bytes_at_once(travelling, self._max_bytes), self._moments_first))
        if whole:
            batches.insert(1, FusedBatch(whole, [], moments_first=False))  # while the first travels
        return batches

    def _shared(self, parameters: Sequence[Parameter]) -> Iterator[SharedMatrices]:
        """The matrices of these parameters as ranks take their directions together."""
        from .shared_batches import shared_buckets

        parts = [item.matrices for item in self._items if isinstance(item.matrices, LocalMatrices)]
        return shared_buckets(parameters, parts, self._owned, bucket_key, self._max_bytes)

    def _span(self, group: int) -> slice:
        """The rows of a group's parameters, which follow one another."""
        first = self._group_of.index(group)
        return slice(first, first + self._group_of.count(group))

    def buckets(self) -> list[Bucket]:
        return [bucket for batch in self._batches for bucket in batch.buckets]

    def _remember_state(self) -> None:
        """Sums as a step that is not taken leaves them; the momenta's largest entries bound the next fp16 input."""
        for item in self._items:
            lines = item.lines
            m, p = item.parameter.momentum, item.parameter.tensor
            self._column("momentum_max")[lines] = item.view(m).reshape(item.count, -1).abs().amax(-1)
            for name, t in (("momentum_sq", m), ("param_sq", p)):
                self._column(name)[lines] = _norms(item, t).double().square()
            if item.moves_weights:
                for name in ("update_sq", "param_sq"):  # nobody measures them
                    self._column(name)[lines] = torch.nan
        self._versions = [m._version for m in self._watched]

    def notice_changes(self) -> None:
        """Looks at momenta anew that somebody else changed: a user, or a compiled step."""
        if [m._version for m in self._watched] != self._versions:
            self._remember_state()

    # ---- the step ---------------------------------------------------------------------------------------------------

    def decide(
        self, hypers: Sequence[Hyper], scaling: dict[torch.device, Scaling], lacking: Tensor | None = None
    ) -> None:
        self.notice_changes()
        phases = {row: self.parameters[row].recipe.phase(self.parameters[row].state) for row in self._valued}
        waiting = {row for row, phase in phases.items() if not phase.steps}
        self._waiting, steps = waiting, self._steps
        if waiting:
            steps = [self._absent if row in waiting else step for row, step in enumerate(steps)]
        scaled = scaling[self.device]
        if self._corrections:
            self._correct(hypers, scaled)
            scaled = replace(scaled, grad_scale=None)
        groups = groups_of(self._of_ops(hypers), self._group_of, self.device)
        arguments = (steps, self.table, self._packed, self._first_sums, groups, scaled)
        grads = [p.grad_of_ops if p.tensor.numel() else p.grad.new_zeros(1) for p in self.parameters]  # an empty shard
        allowed = [p.allowed for p in self.parameters]
        asked = any(flag is not None for flag in allowed)
        at_once = self._ranks is None and self._limits is None and not asked
        multi_tensor.grad_stats(grads, *arguments, decide=at_once, backend=self.backend)
        if self._clipped:
            squares = torch.stack([p.recipe.square(p.grad_of_ops) for p in self._clipped])
            self._column("grad_sq").index_copy_(0, self._rows_clipped, squares)
        if self._ranks is not None:
            if lacking is not None:
                self._column("finite").masked_fill_(lacking, 0)
            self._reduce(self._ranks)
        if not at_once:
            self._refuse(allowed if asked else [])
            multi_tensor.decide_steps(*arguments, backend=self.backend)
        if self._clipped:
            self._clip()
        flags = (self._column("finite") != 0).unbind() if phases else ()
        for row, phase in phases.items():
            p = self.parameters[row]
            g = p.corrected if p.corrected is not None else self._signed(p, scaled)
            p.step = StepValues(g, flags[row], phase, hypers[p.group])

    def _of_ops(self, hypers: Sequence[Hyper]) -> list[Hyper]:
        """The numbers as the ops go by them: without what torch operations do of a step."""
        some = list(hypers)
        if self._penalizes:  # the gradient has the decay
            some = [replace(hyper, weight_decay=0.0) for hyper in some]
        for group in {p.group for p in self._damped}:
            some[group] = replace(some[group], beta1=1.0)
        return some

    def _signed(self, p: Parameter, scaled: Scaling) -> Tensor:
        return signed_gradient(p.grad, p.options.maximize, scaled.grad_scale)

    def _correct(self, hypers: Sequence[Hyper], scaled: Scaling) -> None:
        """Has the ops of this step read what the recipes make of gradients."""
        grads = [self._signed(p, scaled) for p in self.parameters]
        self._corrections.correct(grads, hypers)
        self._read(grads)

    def _clip(self) -> None:
        """Divides them by their norms, which have been measured."""
        grads = [p.grad_of_ops for p in self.parameters]
        self._corrections.clip(grads, self._column("grad_sq").unbind())
        self._read(grads)

    def _read(self, grads: Sequence[Tensor]) -> None:
        for p, g in zip(self.parameters, grads, strict=True):
            p.corrected = g.to(p.wide_dtype)

    def _reduce(self, ranks: Ranks) -> None:
        """Makes what was measured of the shards here that of whole gradients, and the bounds of fp16 inputs."""
        ranks.reduce_stats(self.table.rows[:, : COLUMNS.index("grad_max") + 1])
        if self._watched:
            largest = self._column("momentum_max")
            bounds = torch.zeros(len(self.parameters), dtype=torch.float64, device=self.device)
            bounds.scatter_reduce_(0, self._row_of_line, largest, "amax")
            ranks.shards.all_reduce(bounds, "max")
            largest.copy_(bounds[self._row_of_line])

    @cached_property
    def _row_of_line(self) -> Tensor:
        """The parameter's row in the table of each line of sums."""
        rows = [item.row for item in self._items for _ in range(item.count)]
        return torch.tensor(rows, dtype=torch.int64, device=self.device)

    def _limits_of_rows(self) -> Tensor:
        """The largest sum of squares and entry of a gradient that each parameter takes, (rows, 2)."""
        limits = [p.recipe.limits(p.grad_dtype)[::-1] for p in self.parameters]
        return torch.tensor(limits, dtype=torch.float64, device=self.device)

    @cached_property
    def _measured(self) -> Tensor:
        """The sums of squares and the largest entries of gradients, (rows, 2)."""
        first = COLUMNS.index("grad_sq")
        return self.table.rows[:, first : first + 2]

    @cached_property
    def _asked(self) -> list[tuple[Recipe, torch.dtype, list[Parameter], Tensor]]:
        """Parameters whose state is asked too, those of one recipe and dtype of gradients together, and for each of
        their factors the row of its parameter.
        """
        alike: dict[tuple[Recipe, torch.dtype], list[tuple[int, Parameter]]] = {}
        for row, p in self._by_torch.items():
            if p.recipe.accepts_by_state and p.factor_names:
                alike.setdefault((p.recipe, p.grad_dtype), []).append((row, p))
        asked = []
        for (recipe, dtype), some in alike.items():
            rows = [row for row, p in some for _ in p.factor_names]
            asked.append((recipe, dtype, [p for _, p in some], torch.tensor(rows, device=self.device)))
        return asked

    @cached_property
    def _yes(self) -> Tensor:
        return torch.ones((), dtype=torch.bool, device=self.device)

    def _refuse(self, allowed: Sequence[Tensor | None]) -> None:
        """Takes no step where what torch operations make of a gradient, or of a weight, would not stay finite."""
        finite = self._column("finite")
        if self._limits is not None:
            finite.mul_((self._measured <= self._limits).all(1))
        for recipe, dtype, parameters, rows in self._asked:
            factors = [of_piece for p in parameters for of_piece in p.factors()]
            accepted = recipe.accepts_in(self._column("grad_sq")[rows], factors, dtype)
            finite.scatter_reduce_(0, rows, accepted.to(finite.dtype), "amin")
        if allowed:
            finite.mul_(torch.stack([self._yes if flag is None else flag for flag in allowed]))
        if self._ranks is not None and (self._by_torch or allowed):
            self._ranks.all_reduce(finite, "min")

    def observe(self) -> None:
        self._present = self._new_batches(self._waiting) if self._waiting else self._batches
        for shared in self._measuring:
            shared.receive_gradients()
        self._factors.update(after=False)
        for p in self._by_torch.values():
            step = p.step_values
            hyper = step.hyper.beginning(p.state["step"] - step.finite) if p.recipe.starts_first else step.hyper
            if step.phase.steps:
                store_if(step.finite, p.state, p.recipe.observe(p.state, step.grad, hyper))
        self._corrections.remember()
        self._factors.observe(self._observed)
        for batch in self._present:
            if not batch.moments_first or not batch.items:  # nothing of it lies here
                continue
            grads, rest = batch.grads(), len(batch.items)
            multi_tensor.update_moments(
                grads,
                batch.momenta,
                batch.seconds,
                [self._absent] * rest,
                [],
                [],
                self.table,
                batch.observed,
                backend=self.backend,
            )
        if self._ranks and self._damped:
            self._choose()

    def _choose(self) -> None:
        """Says which rows travel, of the matrices that step by some of theirs."""
        from .shared_bucket import SharedBucket
        from .shared_submatrix import choose

        buckets = [bucket for batch in self._present for bucket in batch.buckets]
        choose([bucket.shared for bucket in buckets if isinstance(bucket, SharedBucket)])

    def batches(self) -> list[FusedBatch]:
        return self._present

    def items(self, batch: FusedBatch) -> list[list[Matrices]]:
        return [bucket.matrices() for bucket in batch.buckets]

    def send(self, batch: FusedBatch) -> list[Callable[[], Tensor]]:
        stacks, whole = [bucket.empty() for bucket in batch.buckets], batch.whole
        if batch.items:
            multi_tensor.update_moments(
                batch.grads(),
                batch.momenta,
                batch.seconds,
                batch.no_inputs + batch.stored(stacks) if stacks else [],
                batch.weights(whole) + batch.no_params if whole else [],
                batch.remainders[:whole] + batch.no_remainders if whole and batch.remainders else [],
                self.table,
                batch.read,
                backend=self.backend,
            )
        for bucket, t in zip(batch.buckets, stacks, strict=True):
            if bucket.recipe in self._at_once and not bucket.precondition(t):
                self._factors.observe(bucket.matrices())
        return [bucket.send(t) for bucket, t in zip(batch.buckets, stacks, strict=True)]

    def _is_stepped_at_once(self, recipe: Recipe) -> bool:
        """Whether a bucket of this recipe observes its gradients with its step, as nothing comes between them."""
        alone = self.device.type == "cpu" and self._ranks is None and not self._coupled
        part = recipe.kronecker
        return alone and part is not None and part.steps_at_once and recipe.leaves_directions

    def directions(self, batch: FusedBatch, xs: list[Tensor]) -> list[Tensor]:
        """The directions, of length 1 but where torch operations go on with them.

        Buckets that differ only in shape share a call. Those that move their weights do so now.
        """
        alike: dict[tuple[Direction, bool, bool], list[int]] = {}
        ds = list(xs)
        for i, bucket in enumerate(batch.buckets):
            if not len(xs[i]):  # of what ranks share this one may own nothing
                continue
            if bucket.by_torch and bucket.recipe.scale == "dual":
                ds[i] = bucket.recipe.direction.scaled(xs[i])
            else:
                key = (bucket.recipe.direction, bucket.moves_weights, bucket.sharded_dim is not None)
                alike.setdefault(key, []).append(i)
        for (direction, moves, together), some in alike.items():
            inputs, slacks = [xs[i] for i in some], [batch.buckets[i].slack_for(xs[i]) for i in some]
            if moves:
                direction.move(inputs, slacks, [batch.buckets[i].weight_update(self.table) for i in some])
                continue
            if together:
                assert self._ranks is not None
                dims = [dim for i in some if (dim := batch.buckets[i].sharded_dim) is not None]
                units = direction.sharded_units(inputs, dims, slacks, self._ranks.all_reduce)
            else:
                units = direction.units(inputs, slacks)
            for i, d in zip(some, units, strict=True):
                ds[i] = d
        return ds

    def directed(self, batch: FusedBatch, xs: list[Tensor], ds: list[Tensor], measure: bool) -> Directed:
        lengths: list[Tensor | None] = []
        norms: list[Tensor] = []
        for bucket, x, d in zip(batch.buckets, xs, ds, strict=True):
            scales = bucket.recipe.scale == "dual" and not bucket.by_torch
            of_matrices, of_items = bucket.measured(x, d, self.table) if measure or scales else ([], [])
            norms += of_matrices
            lengths += of_items if scales else [None] * len(bucket.items)
        return Directed(ds, lengths, norms if measure else None)

    def send_back(self, batch: FusedBatch, ds: Sequence[Tensor]) -> list[Callable[[], Sequence[Tensor]]]:
        return [bucket.send_back(d) for bucket, d in zip(batch.buckets, ds, strict=True)]

    def apply(
        self, batch: FusedBatch, sent: Sequence[Callable[[], Sequence[Tensor]]], norms: Sequence[Tensor | None]
    ) -> None:
        updates = [u for wait in sent for u in wait()]
        if not batch.late:
            return
        lengths: list[Tensor | None] = []
        if self._coupled or any(norm is not None for norm in norms):
            lengths = [_length(item, norm) for item, norm in zip(batch.items[batch.whole :], norms, strict=True)]
        if all(length is None for length in lengths):
            lengths = []
        normalizations = batch.of_late(batch.take_normalizations())
        multi_tensor.apply_update(
            batch.of_late([*batch.no_inputs, *updates]),
            batch.of_late(batch.seconds),
            batch.of_late(batch.weights()),
            batch.of_late(batch.remainders),
            batch.of_late([*batch.no_inputs, *(self._absent if t is None else t for t in lengths)] if lengths else []),
            batch.of_late(batch.take_factors()),
            self.table,
            batch.stepped,
            normalizations=normalizations,
            meeting=batch.meeting if normalizations else None,
            backend=self.backend,
        )

    def finish(self) -> None:
        self._factors.update(after=True)
        advance_clocks(list(self._by_torch.values()))
        if self._damped:
            self._measure_damped()
        for row in self._valued:
            self.parameters[row].step = self.parameters[row].corrected = None
        self._present = self._batches
        self._versions = [m._version for m in self._watched]

    def _measure_damped(self) -> None:
        """Measures momenta as they are now, of which the ops have seen those before they were damped."""
        norms = [_norms(item, item.parameter.momentum).double() for item in self._damped_items]
        if norms:  # something of them lies here
            self._column("momentum_sq").index_copy_(0, self._damped_lines, torch.cat(norms).square())

    # ---- what a step measured ---------------------------------------------------------------------------------------

    def sums_of(self, group: int) -> dict[str, Tensor]:
        """Sums of squares over a group's parameters here, and the slack of its matrices; empty where it has none.

        The momentum, update and parameter of a step that was not taken are those of the last that was.
        """
        rows = self._rows.get(group)
        if rows is None:
            return {}
        stepped = self._column("finite")[rows] > 0
        sums = {"grad_sq": torch.where(stepped, self._column("grad_sq")[rows], 0).sum()}
        lines = slice(self._first_sums[rows.start], self._first_sums[rows.stop])
        for name in ("momentum_sq", "update_sq", "param_sq"):
            sums[name] = self._column(name)[lines].sum()
        slack = [part for bucket in self.buckets() for part in bucket.slack_of(group)]
        return sums | ({"slack": torch.cat(slack)} if slack else {})


def _norms(item: FusedItem, t: Tensor) -> Tensor:
    """The norms of an item's matrices in a tensor of the parameter's shape, fp32 (fp64 for fp64)."""
    wide = torch.promote_types(t.dtype, torch.float32)
    return torch.linalg.vector_norm(item.view(t).reshape(item.count, -1), dim=-1, dtype=wide)


def _length(item: FusedItem, norm: Tensor | None) -> Tensor | None:
    """What an item's directions are multiplied by, (matrices,) fp64; None: by 1."""
    factor = 1.0 if item.parameter.step is None else item.parameter.step.hyper.step_factor
    if norm is None:
        plain = not isinstance(factor, Tensor) and factor == 1
        ones = None if plain else torch.ones(item.count, dtype=torch.float64, device=item.parameter.tensor.device)
        return None if ones is None else ones * factor
    return norm * factor


def groups_of(hypers: Sequence[Hyper], of: list[int], device: torch.device) -> Groups:
    values: list[float] = []
    tensors: list[Tensor] = []
    at: list[int] = []
    for hyper in hypers:
        for number in (hyper.lr, hyper.weight_decay, hyper.beta1, hyper.beta2, hyper.eps):
            if isinstance(number, Tensor):
                at.append(len(values))
                tensors.append(_on(number, device))
                number = 0.0
            values.append(float(number))
    return Groups(values, tensors, at, of)


def _on(number: Tensor, device: torch.device) -> Tensor:
    wanted = number.dtype if number.dtype in (torch.float32, torch.float64) else torch.float64
    # A copy to the host must have arrived when the host reads it.
    return number.detach().to(device, wanted, non_blocking=device.type == "cuda")
