"""How the matrices of a fused step meet: buckets that share a direction call, batches that share its launches.

An *item* is what the fused ops call one: a piece of a parameter or, where the program takes the whole step, all of it.
A *bucket* is matrices of one shape and recipe, whose inputs lie in one tensor; a *batch* is as many buckets, or parts
of one, as the workspace has room for. Items that take their whole step in `update_moments` go into the first batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import TypeVar

import torch
from torch import Tensor

from ..chunking import chunk_by_bytes
from ..matrices import Piece
from ..ops.multi_tensor import Item, Items, Table
from ..ops.normalize import MOST, Normalization, scratch_for
from ..ops.polar_chain import Update
from ..ops.program import Program
from ..ops.rotated import Stacks, Way
from ..parts import Identity, Normalize, UpdateTransform
from .parameter import Matrices, Parameter

T = TypeVar("T")

__all__ = ["Bucket", "FusedBatch", "FusedItem", "batches_of", "bucket_key", "in_batches", "items_of"]


@dataclass(frozen=True, eq=False)
class FusedItem:
    """One item of the fused ops: `row` is its parameter's in the table of numbers, `line` that of its first matrix in
    the table of sums. matrices is None where the program takes the whole step of the parameter.
    """

    parameter: Parameter
    program: Program
    row: int
    line: int
    matrices: Matrices | None

    @property
    def count(self) -> int:
        """The number of its matrices; 1 of a whole parameter."""
        return 1 if self.matrices is None else self.matrices.piece.batch

    @property
    def lines(self) -> slice:
        """The lines of its matrices in the table of sums."""
        return slice(self.line, self.line + self.count)

    @property
    def size(self) -> int:
        """Elements of a matrix."""
        return self.parameter.tensor.numel() if self.matrices is None else math.prod(self.matrices.shape[1:])

    @property
    def place(self) -> tuple[int, int, int]:
        return (self.parameter.group, self.parameter.index, 0) if self.matrices is None else self.matrices.place

    @property
    def by_torch(self) -> bool:
        """Whether torch operations stand between the fused ops and the direction."""
        return self.parameter.recipe.by_matrix

    @property
    def input_dtype(self) -> torch.dtype:
        """The dtype of what `update_moments` stores: the direction's own, or that of the torch operations before it."""
        p = self.parameter
        if p.recipe.submatrix is not None:  # which becomes the momentum again, all of its bits
            return torch.promote_types(p.wide_dtype, p.momentum.dtype)
        return p.wide_dtype if self.by_torch else p.input_dtype

    @property
    def moves_weights(self) -> bool:
        """Whether its directions may go straight into the weights: nothing else is asked of them or of the weights."""
        p, recipe = self.parameter, self.parameter.recipe
        plain_decay = not (recipe.decay.cautious or recipe.decay.after or recipe.decay.scaled)
        return (
            p.options.fuse_update
            and self.matrices is not None
            and recipe.scale == "lmo"
            and plain_decay
            and recipe.rounding.mode == "nearest"
            and recipe.direction.moves
            and isinstance(recipe.precondition, Identity)
            and not recipe.transforms
            and recipe.submatrix is None
            and p.tensor.is_contiguous()
            and all(piece.dim == 0 and piece.groups == 1 and not piece.transposed for piece in p.pieces)
        )

    @property
    def input_bytes(self) -> int:
        """Memory of the direction's input and of the direction made from it."""
        return 2 * self.count * self.size * self.input_dtype.itemsize

    @property
    def workspace_bytes(self) -> int:
        """Memory that the direction needs besides, and the torch operations around it."""
        assert self.matrices is not None
        piece, dtype = self.matrices.piece, self.parameter.input_dtype
        around = self.count * self.size * (dtype.itemsize + 4) if self.by_torch else 0
        return around + self.count * self.parameter.recipe.direction.workspace_bytes(piece.rows, piece.cols, dtype)

    def view(self, t: Tensor) -> Tensor:
        """The item's part of a tensor of the parameter's shape; one without elements as it is."""
        return t if self._narrow is None or not t.numel() else self._narrow.view(t)

    @cached_property
    def _narrow(self) -> Piece | None:
        """What makes views of the parameter, where the item is less than that."""
        return None if self.matrices is None or not self.matrices.piece.narrow else self.matrices.piece

    def state(self, keys: Sequence[str]) -> Tensor:
        """The item's part of the elementwise state under the first key; without elements where there is none."""
        return self.view(self.parameter.state[keys[0]]) if keys else self.parameter.tensor.new_empty(0)

    @property
    def second(self) -> Tensor:
        """An elementwise second moment that the fused ops keep."""
        return self.state(() if self.by_torch else self.parameter.recipe.precondition.keys)

    @property
    def remainder(self) -> Tensor:
        """What the weight's dtype drops of it, where it is kept."""
        return self.state(self.parameter.recipe.rounding.keys)

    def item(self, program: Program) -> Item:
        ratio = 1.0 if self.matrices is None else self.matrices.ratio
        return Item(program, self.row, self.count, self.line, self.place, ratio)


class Bucket:
    """Matrices whose inputs are one tensor.

    normalizes: whether `apply_update` can normalize its updates.

    sizes: matrices of each item, shape: of all their inputs, stored_shape: of what `update_moments` stores, which for
    recipes with torch operations before the direction is another one; slack: what the direction says of each matrix.
    """

    def __init__(self, items: Sequence[FusedItem], normalizes: bool) -> None:
        first = items[0]
        assert first.matrices is not None
        self.items = items
        self._normalizes = normalizes
        self.recipe, self.device = first.parameter.recipe, first.parameter.tensor.device
        self.by_torch, self.moves_weights = first.by_torch, first.moves_weights
        self.dtype, self.stored_dtype = first.parameter.input_dtype, first.input_dtype
        self.counts = [item.count for item in items]
        self.stored_shape = (sum(self.counts), first.matrices.piece.rows, first.matrices.piece.cols)
        shapes = [item.matrices.input_shape for item in items if item.matrices is not None]
        self.sizes = [shape[0] for shape in shapes]
        self.shape = (sum(self.sizes), *shapes[0][1:])
        self.slack = torch.full(self.shape[:1], float("nan"), dtype=torch.float32, device=self.device)

    #: the dimension of its matrices that ranks share where all of them take the directions together
    sharded_dim: int | None = None
    #: whether the updates of this step are made and stand where momenta did
    _is_stepped = False
    #: what `update_moments` stored of a step whose updates are yet to be made
    _momenta = torch.empty(0)
    #: the rows or columns of each of its matrices that step, of a recipe with a submatrix
    _chosen: Tensor | None = None
    #: whether `apply_update` can normalize its updates
    _normalizes = False
    #: how each item's update is yet to be normalized; none where they are as they should be
    normalizations: Sequence[Normalization] = ()
    #: what each item's matrices are yet to be multiplied by; none where they are as they should be
    factors: Sequence[Tensor] = ()

    def empty(self) -> Tensor:
        return torch.empty(self.stored_shape, dtype=self.stored_dtype, device=self.device)

    def send(self, stored: Tensor) -> Callable[[], Tensor]:
        """Gives what waits for the direction's input; stored: what `update_moments` has stored."""
        return lambda: self.direction_input(stored)

    def send_back(self, d: Tensor) -> Callable[[], Sequence[Tensor]]:
        """Gives what waits for the updates, in the weight's variables and contiguous; d: the directions."""
        return lambda: self.updates(d)

    def direction_input(self, stored: Tensor) -> Tensor:
        """What the direction is asked about, made from what `update_moments` has stored."""
        if not self.by_torch or self._is_stepped:
            return stored
        self._momenta = stored
        if self.recipe.submatrix is not None:
            self._chosen = self.recipe.submatrix.chosen(stored)
        if isinstance(self.recipe.precondition, Identity):
            hyper = self.items[0].parameter.step_values.hyper
            return self.recipe.direction_input({}, stored, hyper, chosen=self._chosen).to(self.dtype)
        together = self._turned_together("into", stored, self.counts, self.shape, self.sizes)
        if together is not None:
            return together.to(self.dtype)
        parts = []
        for item, m in zip(self.items, stored.split(self.counts), strict=True):
            assert item.matrices is not None
            state, hyper = item.matrices.recipe_state(), item.parameter.step_values.hyper
            parts.append(self.recipe.precondition.into(state, m, hyper, state.get("step")).to(self.dtype))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def precondition(self, stored: Tensor) -> bool:
        """Has matrices whose direction leaves its input as it is take their whole way at once, statistics of their
        gradients included: stored, their momenta, becomes their updates. False where no call does that, and nothing is
        written.
        """
        self._is_stepped = False
        part, stacks, items = self.recipe.kronecker, self._stacks, self.matrices()
        if part is None or stacks is None or self.dtype is not stored.dtype:
            return False
        grads, flags = [item.by_matrices(item.grad) for item in items], [item.finite for item in items]
        xs, hyper = _parts(stored, self.counts), items[0].parameter.step_values.hyper
        self._is_stepped = part.step_in_place(stacks, grads, xs, hyper, xs, flags)
        return self._is_stepped

    def _turned_together(
        self, way: Way, x: Tensor, counts: Sequence[int], shape: Sequence[int], sizes: Sequence[int]
    ) -> Tensor | None:
        """`into` or `back` of all items by one call, where there is one for them, in the dtype that is stored; x: in
        parts of `counts`, as the result, of this shape, in `sizes`.
        """
        part, stacks = self.recipe.kronecker, self._stacks
        if part is None or stacks is None:
            return None
        x = x.to(self.stored_dtype)
        out = torch.empty(shape, dtype=x.dtype, device=x.device)
        xs, hyper = _parts(x.contiguous(), counts), self.items[0].parameter.step_values.hyper
        return out if part.turn_all(way, stacks, xs, hyper, _parts(out, sizes)) else None

    @cached_property
    def _stacks(self) -> Stacks | None:
        """What the state of its matrices gives the calls that take all of them; None where none are for them."""
        part, items = self.recipe.kronecker, self.matrices()
        if part is None or self.device.type != "cpu" or len({item.parameter.group for item in items}) > 1:
            return None
        return part.stacks([item.state for item in items], [item.shape for item in items])

    def parts(self, t: Tensor) -> Sequence[Tensor]:
        """Each item's part of what `update_moments` stores."""
        return _parts(t, self.counts)

    def updates(self, d: Tensor) -> list[Tensor]:
        """The update of every item."""
        parts = list(_parts(d, self.sizes))
        if not self.by_torch:
            return parts
        if self._is_stepped:
            self._is_stepped = False
            return parts
        momenta, self._momenta = self._momenta, self._momenta[:0]
        chosen, self._chosen = self._chosen, None
        if self.normalization is not None:
            d = d.contiguous()
            self.normalizations = self._left_normalizations(self.normalization, d, momenta)
            if self.normalizations:
                return list(_parts(d, self.sizes))
        if self._scales:
            self.factors = self._scaled(momenta)
            return [part.contiguous() for part in parts]
        if self._at_once:
            return self._transformed(d, momenta, chosen)
        together = None
        if not self.recipe.transforms:
            together = self._turned_together("back", d, self.sizes, self.stored_shape, self.counts)
        if together is not None:
            return list(together.split(self.counts))
        updates = []
        places = [None] * len(self.items) if chosen is None else chosen.split(self.counts)
        for item, part, m, some in zip(self.items, parts, momenta.split(self.counts), places, strict=True):
            assert item.matrices is not None
            state, hyper, g = item.matrices.recipe_state(), item.parameter.step_values.hyper, item.matrices.grad
            u, remembered = self.recipe.update(state, part, m, hyper, item.matrices.elementwise(g), some)
            item.matrices.keep(remembered)
            updates.append(u.to(self.stored_dtype).contiguous())
        return updates

    @cached_property
    def normalization(self) -> Normalize | None:
        """What comes between directions and weights, if it is that alone and `apply_update` can do it."""
        if not self._normalizes:
            return None
        part = self._only_transform
        return part if type(part) is Normalize else None

    @property
    def _only_transform(self) -> UpdateTransform | None:
        """What comes between directions and weights, if it is one transform and no more."""
        recipe, parts = self.recipe, self.recipe.transforms
        alone = len(parts) == 1 and recipe.submatrix is None and isinstance(recipe.precondition, Identity)
        return parts[0] if alone else None

    @cached_property
    def _scales(self) -> bool:
        """Whether that only multiplies by a number for each matrix, which is not larger than the ops take."""
        part = self._only_transform
        if part is None or part.reads_gradient or math.prod(self.shape[1:]) > MOST:
            return False
        return type(part).scale is not UpdateTransform.scale

    def _scaled(self, momenta: Tensor) -> list[Tensor]:
        """What the update of every item is multiplied by."""
        (part,), factors = self.recipe.transforms, []
        for item, m in zip(self.matrices(), _parts(momenta, self.counts), strict=True):
            scale = part.scale(item.recipe_state(), m, item.parameter.step_values.hyper)
            assert scale is not None
            factors.append(scale)
        return factors

    def _left_normalizations(self, part: Normalize, d: Tensor, momenta: Tensor) -> list[Normalization]:
        """How `apply_update` makes updates of the directions; nothing where it cannot."""
        items = self.matrices()
        states, hypers = [item.state for item in items], [item.parameter.step_values.hyper for item in items]
        room = d if d.dtype == momenta.dtype else momenta  # whose numbers nobody asks for any more
        return part.fused(d.split(self.sizes), states, hypers, room.split(self.sizes))

    @cached_property
    def _at_once(self) -> bool:
        """Whether its transforms remember numbers of rows and matrices alone, so that one call takes all items."""
        recipe, transforms = self.recipe, self.recipe.transforms
        layouts = {spec.layout for transform in transforms for spec in transform.specs}
        alone = len(self.items) == 1 or recipe.counts_steps or not isinstance(recipe.precondition, Identity)
        return not alone and layouts <= {"row", "matrix"} and not any(each.reads_gradient for each in transforms)

    def _transformed(self, d: Tensor, momenta: Tensor, chosen: Tensor | None) -> list[Tensor]:
        """The updates, by one call of the transforms for all items of a group."""
        updates: list[Tensor] = []
        keys = [spec.key for transform in self.recipe.transforms for spec in transform.specs]
        first = 0
        for _, items in groupby(self.matrices(), key=lambda item: item.parameter.group):
            some = list(items)
            counts = [item.piece.batch for item in some]
            rows = slice(first, first + sum(counts))
            state = {key: torch.cat([item.state[key] for item in some]) for key in keys}
            hyper, places = some[0].parameter.step_values.hyper, None if chosen is None else chosen[rows]
            u, fresh = self.recipe.update(state, d[rows], momenta[rows], hyper, chosen=places)
            for item, *parts in zip(some, *(t.split(counts) for t in fresh.values()), strict=True):
                item.keep(dict(zip(fresh, parts, strict=True)))
            updates += u.to(self.stored_dtype).contiguous().split(counts)
            first = rows.stop
        return updates

    def matrices(self) -> list[Matrices]:
        """What its directions are of, in their order."""
        return [item.matrices for item in self.items if item.matrices is not None]

    def measured(self, x: Tensor, d: Tensor, table: Table) -> tuple[list[Tensor], list[Tensor]]:
        """The dual norms, (n,) fp64, of each of `matrices`, and of each item; x: as the direction took it, d: what it
        gave.
        """
        norms = list(self.dual_norm(x, d, table).split(self.sizes))
        return norms, norms

    def dual_norm(self, x: Tensor, d: Tensor, table: Table) -> Tensor:
        of = self.recipe if self.by_torch else self.recipe.direction  # of steps, or of `Direction.units`
        norm = of.dual_norm(x, d).flatten().double()
        # An fp16 x was multiplied by a power of two.
        return norm / self._numbers(table, "input_scale") if self.dtype is torch.float16 else norm

    @cached_property
    def _rows(self) -> Tensor:
        """The row of the table of each matrix; needed by some kinds of step only."""
        rows = [item.row for item, size in zip(self.items, self.sizes, strict=True) for _ in range(size)]
        return torch.tensor(rows, device=self.device)

    def _numbers(self, table: Table, name: str) -> Tensor:
        """A column of the table's rows, (matrices,)."""
        return table.column(name).index_select(0, self._rows)

    def weight_update(self, table: Table) -> Update:
        """What this step does to the weights, W <- (1 - decay) W - step d; nothing where the step is not taken."""
        stepped, first = self._numbers(table, "finite"), self.items[0].matrices
        assert first is not None
        eta = torch.where(stepped != 0, -first.ratio * self._numbers(table, "lr"), 0)
        beta = torch.where(stepped != 0, 1 - self._numbers(table, "decay"), 1)
        weights = [item.view(item.parameter.tensor.detach()).view(-1, *self.shape[1:]) for item in self.items]
        wide = torch.promote_types(self.dtype, torch.float32)
        return Update([w for stack in weights for w in stack.unbind()], eta.to(wide), beta.to(wide))

    def slack_for(self, x: Tensor) -> Tensor:
        """The tensor for the slack of x, the bucket's own or, for matrices of somebody else, one that is not kept."""
        return self.slack if x.shape == self.shape else x.new_empty(len(x), dtype=torch.float32)

    def slack_of(self, group: int) -> list[Tensor]:
        """The slack of a group's matrices: no tensor or one."""
        parts = zip(self.items, self.slack.split(self.sizes), strict=True)
        some = [slack for item, slack in parts if item.parameter.group == group]
        return [torch.cat(some)] if some else []


class FusedBatch:
    """Items that share launches: the first `whole` of them take their whole step in `update_moments`, the others lie
    in buckets, one after another; `late` are those that `apply_update` moves.

    moments_first: the moments were updated by an earlier call (`observe`), so that this batch's reads them only.
    observed, read, stepped: what `update_moments` is called with by `observe` and by `send`, and `apply_update`.
    """

    def __init__(self, whole: Sequence[FusedItem], buckets: Sequence[Bucket], moments_first: bool) -> None:
        self.whole = len(whole)
        self.moments_first = moments_first
        self.buckets = buckets
        self.items = [*whole, *(item for bucket in buckets for item in bucket.items)]
        self.late = [i for i in range(self.whole, len(self.items)) if not self.items[i].moves_weights]
        programs = [item.program for item in self.items]
        self.observed = Items(tuple(item.item(program) for item, program in zip(self.items, programs, strict=True)))
        reading = [replace(program, frozen_moments=True) if moments_first else program for program in programs]
        self.read = Items(tuple(item.item(program) for item, program in zip(self.items, reading, strict=True)))
        self.stepped = Items(tuple(self.items[i].item(programs[i]) for i in self.late))
        #: the scratch of blocks that normalize updates: zeroed now, as a step may be captured in a graph
        self.meeting: Tensor | None = None
        normalized = [bucket.shape for bucket in buckets if bucket.normalization is not None]
        if normalized:
            self.meeting = scratch_for(normalized, self.items[0].parameter.tensor.device)
        self._absent = absent = self.items[0].parameter.tensor.new_empty(0) if self.items else torch.empty(0)
        rest = len(self.items) - self.whole
        self.no_inputs, self.no_params = [absent] * self.whole, [absent] * rest
        self.no_remainders = [absent.to(torch.int16)] * rest
        self.momenta = [item.view(item.parameter.momentum) for item in self.items]
        self.seconds = _present([item.second for item in self.items])
        self.remainders = _present([item.remainder for item in self.items])

    def weights(self, count: int | None = None) -> list[Tensor]:
        """Views of the weights, of all items or of the first so many; new ones in every step: a parameter's `data` may
        have been exchanged.
        """
        return [item.view(item.parameter.tensor) for item in self.items[:count]]

    def grads(self) -> list[Tensor]:
        """The gradients that the ops read."""
        return [item.view(item.parameter.grad_of_ops) for item in self.items]

    def take_normalizations(self) -> list[Normalization | None]:
        """How the updates that were made last are yet to be normalized, item by item; none at all where none is."""
        if not any(bucket.normalizations for bucket in self.buckets):
            return []
        each: list[Normalization | None] = [None] * self.whole
        for bucket in self.buckets:
            each += bucket.normalizations or [None] * len(bucket.items)
            bucket.normalizations = ()
        return each

    def take_factors(self) -> list[Tensor]:
        """What matrices of the updates that were made last are multiplied by, likewise."""
        if not any(bucket.factors for bucket in self.buckets):
            return []
        factors = [*self.no_inputs]
        for bucket in self.buckets:
            factors += bucket.factors or [self._absent] * len(bucket.items)
            bucket.factors = ()
        return factors

    def of_late(self, every: Sequence[T]) -> list[T]:
        """What the items have that `apply_update` moves, from a list of all items' or an empty one."""
        return [every[i] for i in self.late] if every else []

    def stored(self, stacks: Sequence[Tensor]) -> list[Tensor]:
        """Each item's part of what its bucket stores."""
        return [part for t, bucket in zip(stacks, self.buckets, strict=True) for part in bucket.parts(t)]


def _parts(t: Tensor, counts: Sequence[int]) -> Sequence[Tensor]:
    """`t.split(counts)`, which takes as long as a whole op where there is one."""
    return [t] if len(counts) == 1 else t.split(counts)


def _present(tensors: list[Tensor]) -> list[Tensor]:
    """The list, or none at all where every tensor is absent."""
    return tensors if any(t.numel() for t in tensors) else []


def items_of(parameters: Sequence[Parameter], programs: Sequence[Program]) -> list[FusedItem]:
    """The items of all parameters in their order, with the lines of their matrices one after another."""
    items: list[FusedItem] = []
    line = 0
    for row, (parameter, program) in enumerate(zip(parameters, programs, strict=True)):
        if not parameter.tensor.numel():  # a shard that is empty
            continue
        for matrices in [None] if program.whole else parameter.local_matrices():
            items.append(FusedItem(parameter, program, row, line, matrices))
            line += items[-1].count
    return items


def batches_of(
    items: Sequence[FusedItem], max_bytes: int, coupled: bool, normalizes: bool = False
) -> Iterator[FusedBatch]:
    """Batches whose inputs and directions take at most max_bytes, and direction calls that with their workspace do.

    normalizes: as a `Bucket` has it.
    """
    whole = [item for item in items if item.matrices is None]
    buckets: dict[tuple[object, ...], list[FusedItem]] = {}
    for item in items:
        if item.matrices is not None:
            weights = item.parameter.tensor.dtype if item.moves_weights else None
            key = (*bucket_key(item.matrices), item.moves_weights, weights)
            buckets.setdefault(key, []).append(item)
    parts = [part for bucket in buckets.values() for part in chunk_by_bytes(bucket, _bytes_of_call, max_bytes)]
    sized = [(Bucket(part, normalizes), sum(item.input_bytes for item in part)) for part in parts]
    yield from in_batches(whole, sized, max_bytes, coupled)


def bucket_key(item: Matrices) -> tuple[object, ...]:
    """What matrices must have in common to share a direction call."""
    return item.recipe, item.piece.rows, item.piece.cols, item.parameter.input_dtype


def in_batches(
    whole: Sequence[FusedItem], sized: Sequence[tuple[Bucket, int]], max_bytes: int, moments_first: bool
) -> Iterator[FusedBatch]:
    """Batches of buckets, whose inputs and directions take so many bytes each."""
    # Where layers wait, directions that are cheap are made twice and the others kept: a batch has one kind.
    cheap = [each for each in sized if moments_first and not each[0].recipe.direction.batched]
    for kind in (cheap, [each for each in sized if each not in cheap]):
        for chosen in chunk_by_bytes(kind, lambda each: each[1], max_bytes):
            yield FusedBatch(whole, [bucket for bucket, _ in chosen], moments_first)
            whole = []
    if whole:
        yield FusedBatch(whole, [], moments_first)


def _bytes_of_call(item: FusedItem) -> int:
    return item.input_bytes + item.workspace_bytes
