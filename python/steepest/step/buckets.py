"""How the matrices of a step meet: buckets that share a direction call, rounds that share the launches around it.

A *member* is an item of the fused ops: a piece of a parameter or, where the program is whole, all of it. A *bucket* is
matrices of one shape and recipe, whose inputs lie in one tensor; a *round* is as many buckets, or parts of one, as the
workspace has room for. The members that take their whole step in `update_moments` go into the first round.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .budget import cut
from .matrices import Piece
from .ops.multi_tensor import Item, Items, Table
from .ops.polar_chain import Update
from .ops.program import Program
from .parts import Direction, Identity, shape_ratio
from .recipe import Recipe, State


@dataclass(frozen=True)
class Entry:
    """One parameter of a step: its group, its recipe and how it is read; place is (group, parameter in the group)."""

    group: int
    place: tuple[int, int]
    recipe: Recipe
    program: Program
    pieces: tuple[Piece, ...]
    param: Tensor
    state: State
    grad_dtype: torch.dtype
    fuse_update: bool = False

    @property
    def fuses(self) -> bool:
        """Whether its directions may go straight into the weights: nothing else is asked of them or of the weights."""
        recipe = self.recipe
        plain = recipe.scale == "lmo" and not recipe.decay.cautious and recipe.rounding.mode == "nearest"
        return (
            self.fuse_update
            and plain
            and recipe.direction.moves
            and isinstance(recipe.precondition, Identity)
            and self.param.is_contiguous()
            and all(piece.dim == 0 for piece in self.pieces)
        )

    @property
    def momentum(self) -> Tensor:
        return self.state[self.recipe.momentum.key]

    @property
    def input_dtype(self) -> torch.dtype:
        """The dtype in which the direction takes its input."""
        wide = torch.promote_types(self.grad_dtype, torch.float32)
        return self.recipe.direction.compute_dtype(wide, self.param.device)


@dataclass(frozen=True)
class Member:
    """One item: `number` is the piece's in its parameter, `line` that of its first matrix in the table of sums."""

    row: int
    entry: Entry
    piece: Piece | None
    number: int
    line: int

    @property
    def matrices(self) -> int:
        return 1 if self.piece is None else self.piece.batch

    @property
    def size(self) -> int:
        """Elements of a matrix."""
        return self.entry.param.numel() // self.matrices if self.piece is None else self.piece.rows * self.piece.cols

    @property
    def narrow(self) -> bool:
        """Whether it is less than its parameter."""
        return self.piece is not None and self.piece.narrow

    @property
    def input_bytes(self) -> int:
        """Of the direction's input and of the direction made from it."""
        return 2 * self.matrices * self.size * self.entry.input_dtype.itemsize

    @property
    def workspace_bytes(self) -> int:
        """Of what the direction needs besides."""
        assert self.piece is not None
        rows, cols = self.piece.rows, self.piece.cols
        return self.matrices * self.entry.recipe.direction.workspace_bytes(rows, cols, self.entry.input_dtype)

    def view(self, t: Tensor) -> Tensor:
        return self.piece.view(t) if self.piece is not None and t.numel() else t

    def state(self, keys: Sequence[str]) -> Tensor:
        """Its part of the state under the first key; without elements where there is none."""
        return self.view(self.entry.state[keys[0]]) if keys else self.entry.param.new_empty(0)

    def item(self) -> Item:
        ratio = 1.0
        if self.piece is not None:
            ratio = shape_ratio(self.entry.recipe.adjust_lr, self.piece.rows, self.piece.cols)
        place = (*self.entry.place, self.number)
        return Item(self.entry.program, self.row, self.matrices, self.line, place, ratio)


class Bucket:
    """Matrices whose inputs are one tensor. sizes: matrices of each member; slack: what the direction says of each."""

    def __init__(self, members: Sequence[Member]) -> None:
        first = members[0]
        assert first.piece is not None
        self.recipe, self.dtype, self.device = first.entry.recipe, first.entry.input_dtype, first.entry.param.device
        self.sizes = [member.matrices for member in members]
        self.shape = (sum(self.sizes), first.piece.rows, first.piece.cols)
        groups = [member.entry.group for member in members for _ in range(member.matrices)]
        self._spans = {own: slice(groups.index(own), groups.index(own) + groups.count(own)) for own in set(groups)}
        self.members = members
        self.fuses = first.entry.fuses
        self.slack = torch.full(self.shape[:1], float("nan"), dtype=torch.float32, device=self.device)

    def empty(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)

    def dual_norms(self, x: Tensor, d: Tensor, table: Table) -> list[Tensor] | None:
        """The dual norm of every matrix of x, with direction d, by members; None where the step is of length 1."""
        if self.recipe.scale == "lmo":
            return None
        norm = self.recipe.direction.dual_norm(x, d).flatten().double()
        if self.dtype is torch.float16:  # an fp16 x was multiplied by a power of two
            norm = norm / self._numbers(table, "input_scale")
        return list(norm.split(self.sizes))

    @cached_property
    def _rows(self) -> Tensor:
        """Of the table, for each matrix; needed by some kinds of step only."""
        return torch.tensor([m.row for m in self.members for _ in range(m.matrices)], device=self.device)

    def _numbers(self, table: Table, name: str) -> Tensor:
        """A column of the table's rows, (matrices,)."""
        return table.column(name).index_select(0, self._rows)

    def update(self, table: Table) -> Update:
        """What this step does to the weights, W <- (1 - decay) W - step d; nothing where a gradient is not finite."""
        taken = self._numbers(table, "finite")
        first = self.members[0].entry
        ratio = shape_ratio(first.recipe.adjust_lr, *self.shape[1:])
        eta = torch.where(taken != 0, -ratio * self._numbers(table, "lr"), 0)
        beta = torch.where(taken != 0, 1 - self._numbers(table, "decay"), 1)
        weights = [m.view(m.entry.param.detach()).view(-1, *self.shape[1:]) for m in self.members]
        wide = torch.promote_types(self.dtype, torch.float32)
        return Update([w for stack in weights for w in stack.unbind()], eta.to(wide), beta.to(wide))

    def slack_of(self, group: int) -> list[Tensor]:
        """The slack of a group's matrices, which follow one another: no tensor or one."""
        return [self.slack[self._spans[group]]] if group in self._spans else []


class Round:
    """Members of an `update_moments`, but for the first `whole` of an `apply_update`: bucket after bucket."""

    def __init__(self, whole: Sequence[Member], parts: Sequence[Sequence[Member]]) -> None:
        self.whole = len(whole)
        self.members = [*whole, *(member for part in parts for member in part)]
        self.buckets = [Bucket(part) for part in parts]
        items = tuple(member.item() for member in self.members)
        #: those that `apply_update` takes
        self.late = [i for i in range(self.whole, len(items)) if not self.members[i].entry.fuses]
        self.before, self.after = Items(items), Items(tuple(items[i] for i in self.late))
        absent, rest = self.members[0].entry.param.new_empty(0), len(items) - self.whole
        self.no_inputs, self.no_params = [absent] * self.whole, [absent] * rest
        self.no_mantissas = [absent.to(torch.int16)] * rest
        self.momenta = [member.view(member.entry.momentum) for member in self.members]
        self.seconds = present([member.state(member.entry.recipe.precondition.keys) for member in self.members])
        self.mantissas = present([member.state(member.entry.recipe.rounding.keys) for member in self.members])

    def towards(self, stacks: list[Tensor], table: Table) -> list[Tensor] | None:
        """Turns the buckets' inputs into their directions; dual norms by members where one is scaled by them.

        Buckets that differ only in shape share the call. Those that fuse their update leave nothing for `apply_update`.
        """
        alike: dict[tuple[Direction, bool], list[int]] = {}
        for i, bucket in enumerate(self.buckets):
            alike.setdefault((bucket.recipe.direction, bucket.fuses), []).append(i)
        norms: dict[int, list[Tensor] | None] = {}
        for (direction, fuses), some in alike.items():
            xs, slacks = [stacks[i] for i in some], [self.buckets[i].slack for i in some]
            if fuses:
                direction.move(xs, slacks, [self.buckets[i].update(table) for i in some])
                continue
            found = direction.units(xs, slacks)
            for i, d in zip(some, found, strict=True):
                norms[i] = self.buckets[i].dual_norms(stacks[i], d, table)
                stacks[i] = d
        if not any(norms.values()):
            return None
        absent = self.no_params[0]
        late = [(i, bucket) for i, bucket in enumerate(self.buckets) if not bucket.fuses]
        return [n for i, bucket in late for n in norms[i] or [absent] * len(bucket.sizes)]

    def of_late(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Those of the members that `apply_update` takes, from a list of all members' or an empty one."""
        return [tensors[i] for i in self.late] if tensors else []

    def of_members(self, stacks: Sequence[Tensor]) -> list[Tensor]:
        """Each member's matrices in its bucket's tensor."""
        return [part for t, bucket in zip(stacks, self.buckets, strict=True) for part in t.split(bucket.sizes)]


def present(tensors: list[Tensor]) -> list[Tensor]:
    """No list at all where every tensor is absent."""
    return tensors if any(t.numel() for t in tensors) else []


def members_of(entries: Sequence[Entry]) -> list[Member]:
    """The members of all entries in their order, with the lines of their matrices one after another."""
    found: list[Member] = []
    line = 0
    for row, entry in enumerate(entries):
        for number, piece in enumerate((None,) if entry.program.whole else entry.pieces):
            found.append(Member(row, entry, piece, number, line))
            line += found[-1].matrices
    return found


def rounds_of(members: Sequence[Member], max_bytes: int) -> Iterator[Round]:
    """Rounds whose inputs and directions take at most max_bytes, and direction calls that with their workspace do."""
    whole = [member for member in members if member.piece is None]
    buckets: dict[tuple[object, ...], list[Member]] = {}
    for member in members:
        if member.piece is not None:
            entry, sides = member.entry, (member.piece.rows, member.piece.cols)
            key = (entry.recipe, *sides, entry.input_dtype, entry.fuses, entry.param.dtype if entry.fuses else None)
            buckets.setdefault(key, []).append(member)
    parts = [part for bucket in buckets.values() for part in cut(bucket, _bytes_of_call, max_bytes)]
    for chosen in cut(parts, lambda part: sum(member.input_bytes for member in part), max_bytes):
        yield Round(whole, chosen)
        whole = []
    if whole:
        yield Round(whole, [])


def _bytes_of_call(member: Member) -> int:
    return member.input_bytes + member.workspace_bytes
