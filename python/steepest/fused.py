"""The step of all parameters on one device by the fused ops: three launches around the direction.

    inspect                                    every gradient
    for every round of matrices
        before                                 every matrix of the round; in the first, all that is elementwise
        d = direction(x)                       bucket by bucket
        after                                  every matrix of the round

A *bucket* is the matrices of one shape and recipe, whose inputs lie in one tensor; a *round* is as many buckets, or
parts of one, as max_workspace_bytes has room for. What depends only on shapes, dtypes and recipes is laid out once
(`Layout`); a step hands the tensors over. Their addresses travel in the launch, so there is no table of pointers that a
new gradient could make stale, and inputs are borrowed from torch's allocator, so that between steps the memory is free
for activations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from .matrices import Piece
from .ops import multi_tensor
from .ops.multi_tensor import Groups, Item, Items, Scaling, Table
from .ops.program import Power, Program
from .parts import Diagonal, Frobenius, Hyper, Identity, Sign, shape_ratio
from .recipe import Recipe, State

_POWERS: dict[float, Power] = {0.25: "quarter", 0.5: "half", 1 / 6: "sixth"}


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

    @property
    def momentum(self) -> Tensor:
        return self.state[self.recipe.momentum.key]


def program(recipe: Recipe, *, maximize: bool = False) -> Program | str:
    """The recipe as the fused ops take it, or the reason why they do not."""
    momentum, precondition, direction = recipe.momentum, recipe.precondition, recipe.direction
    whole = Program(
        heavy_ball=momentum.kind == "heavy_ball",
        nesterov=momentum.nesterov,
        momentum_correction=momentum.bias_correction,
        cautious=recipe.decay.cautious,
        rounding=recipe.rounding.mode,
        maximize=maximize,
    )
    if recipe.scale == "dual" and isinstance(direction, Frobenius):
        whole = replace(whole, direction="identity")
    if recipe.scale == "lmo" and isinstance(direction, Sign):
        whole = replace(whole, direction="sign")
    if isinstance(precondition, Identity):
        return whole
    if not isinstance(precondition, Diagonal):
        return f"the preconditioner {type(precondition).__name__} is not elementwise"
    power = _POWERS.get(precondition.power)
    if power is None:
        return f"the preconditioner's power is {precondition.power}; the kernels have 1/4, 1/2 and 1/6"
    return replace(
        whole,
        power=power,
        sum=precondition.average == "sum",
        second_correction=precondition.bias_correction,
        eps_inside=precondition.eps_inside,
    )


@dataclass(frozen=True)
class Member:
    """A piece of an entry, one item of `before` and `after`; no piece: the whole parameter, by its elements."""

    entry: int
    piece: Piece | None

    @property
    def narrow(self) -> bool:
        """Whether it is less than its parameter."""
        return self.piece is not None and self.piece.narrow

    def view(self, t: Tensor) -> Tensor:
        return self.piece.view(t) if self.piece is not None and t.numel() else t

    def part(self, entry: Entry, keys: Sequence[str]) -> Tensor:
        """Of the state under the first key; without elements where there is none."""
        return self.view(entry.state[keys[0]]) if keys else entry.param.new_empty(0)


@dataclass(frozen=True)
class Bucket:
    """Matrices that share a direction call: x is (sum of sizes, rows, cols) in dtype.

    group_of: the group of each matrix, rising; row_of: its parameter's row, on the device; slack: what the direction
    says of it, fp32.
    """

    recipe: Recipe
    dtype: torch.dtype
    rows: int
    cols: int
    sizes: list[int]
    group_of: list[int]
    row_of: Tensor
    slack: Tensor

    def empty(self, device: torch.device) -> Tensor:
        return torch.empty((sum(self.sizes), self.rows, self.cols), dtype=self.dtype, device=device)

    def slack_of(self, group: int) -> list[Tensor]:
        at = [i for i, own in enumerate(self.group_of) if own == group]
        return [self.slack[at[0] : at[-1] + 1]] if at else []

    def towards(self, x: Tensor, table: Table) -> tuple[Tensor, list[Tensor] | None]:
        """The direction and, where it is to be scaled by its dual norm, that norm for every matrix, by members."""
        direction = self.recipe.direction
        d = direction.unit(x, slack=self.slack)
        if self.recipe.scale == "lmo":
            return d, None
        norm = direction.dual_norm(x, d).flatten().double()
        if self.dtype is torch.float16:  # x was multiplied by a power of two
            norm = norm / table.column("input_scale").index_select(0, self.row_of)
        return d, list(norm.split(self.sizes))


class Round:
    """Members of a `before` and, but for the first `whole` of them, of an `after`: bucket after bucket."""

    def __init__(self, entries: Sequence[Entry], members: list[Member], items: list[Item], buckets: list[Bucket]):
        self.members = members
        self.buckets = buckets
        self.whole = sum(m.piece is None for m in members)
        self.before, self.after = Items(tuple(items)), Items(tuple(items[self.whole :]))
        self.entries = own = [entries[m.entry] for m in members]
        absent = own[0].param.new_empty(0)
        self.no_inputs = [absent] * self.whole
        self.no_params = [absent] * len(items[self.whole :])
        self.no_mantissas = [absent.to(torch.int16)] * len(items[self.whole :])
        self.momenta = [m.view(e.momentum) for m, e in zip(members, own, strict=True)]
        self.seconds = _present_or([m.part(e, e.recipe.precondition.keys) for m, e in zip(members, own, strict=True)])
        self.mantissas = _present_or([m.part(e, e.recipe.rounding.keys) for m, e in zip(members, own, strict=True)])

    def of_members(self, stacks: Sequence[Tensor]) -> list[Tensor]:
        """Each member's matrices in its bucket's tensor."""
        return [part for t, bucket in zip(stacks, self.buckets, strict=True) for part in t.split(bucket.sizes)]


def _present_or(tensors: list[Tensor]) -> list[Tensor]:
    """No list at all where every tensor is absent."""
    return tensors if any(t.numel() for t in tensors) else []


class Layout:
    """What a step over these entries does, but for its tensors; all of them on one device, with elements."""

    def __init__(self, entries: Sequence[Entry], skipped: Tensor, backend: str, max_workspace_bytes: int) -> None:
        self.entries = entries
        self.device = skipped.device
        self.backend = backend
        self.programs = [entry.program.packed() for entry in entries]
        self.group_of = [entry.group for entry in entries]
        members = [[Member(i, piece) for piece in _pieces(entry)] for i, entry in enumerate(entries)]
        self.first_sums = list(accumulate((sum(map(self._matrices, each)) for each in members), initial=0))
        sizes = [entry.param.numel() for entry in entries]
        items = [(self._matrices(m), self._size(m)) for each in members for m in each]
        self.table = Table.empty(skipped, sizes, items)
        self.absent = torch.empty(0, device=self.device)
        self.steps = [entry.state.get("step", self.absent) for entry in entries]
        self.rounds = list(self._rounds(members, max_workspace_bytes))
        self._remember_momentum()

    def _matrices(self, member: Member) -> int:
        return 1 if member.piece is None else member.piece.batch

    def _size(self, member: Member) -> int:
        piece = member.piece
        return self.entries[member.entry].param.numel() if piece is None else piece.rows * piece.cols

    # ---- laying out -----------------------------------------------------------------------------------------------

    def _rounds(self, members: list[list[Member]], max_bytes: int) -> Iterator[Round]:
        elementwise = [m for each in members for m in each if m.piece is None]
        line_of, row_of = {}, {}
        for first, each in zip(self.first_sums, members, strict=False):
            for m in each:
                line_of[m], row_of[m] = first, m.entry
                first += self._matrices(m)
        buckets: dict[tuple[object, ...], list[Member]] = {}
        for m in (m for each in members for m in each if m.piece is not None):
            buckets.setdefault(self._bucket_key(m), []).append(m)
        chosen: list[list[Member]] = []
        used = 0
        for part in (part for bucket in buckets.values() for part in self._parts(bucket, max_bytes)):
            size = sum(map(self._input_bytes, part))
            if chosen and used + size > max_bytes:
                yield self._round(elementwise, chosen, line_of)
                elementwise, chosen, used = [], [], 0
            chosen.append(part)
            used += size
        if elementwise or chosen:
            yield self._round(elementwise, chosen, line_of)

    def _bucket_key(self, member: Member) -> tuple[object, ...]:
        entry, piece = self.entries[member.entry], member.piece
        assert piece is not None
        return entry.recipe, piece.rows, piece.cols, self._input_dtype(member)

    def _input_dtype(self, member: Member) -> torch.dtype:
        entry = self.entries[member.entry]
        wide = torch.promote_types(entry.grad_dtype, torch.float32)
        return entry.recipe.direction.compute_dtype(wide, self.device)

    def _input_bytes(self, member: Member) -> int:
        """Of the input and of the direction made from it."""
        return 2 * self._matrices(member) * self._size(member) * self._input_dtype(member).itemsize

    def _workspace_bytes(self, member: Member) -> int:
        piece, direction = member.piece, self.entries[member.entry].recipe.direction
        assert piece is not None
        return piece.batch * direction.workspace_bytes(piece.rows, piece.cols, self._input_dtype(member))

    def _parts(self, bucket: list[Member], max_bytes: int) -> Iterator[list[Member]]:
        """A bucket cut so that inputs, directions and what the direction call needs stay within max_bytes."""
        part: list[Member] = []
        used = 0
        for member in bucket:
            size = self._input_bytes(member) + self._workspace_bytes(member)
            if part and used + size > max_bytes:
                yield part
                part, used = [], 0
            part.append(member)
            used += size
        yield part

    def _round(self, elementwise: list[Member], parts: list[list[Member]], line_of: dict[Member, int]) -> Round:
        members = elementwise + [m for part in parts for m in part]
        items = [self._item(m, line_of[m]) for m in members]
        return Round(self.entries, members, items, [self._bucket(part) for part in parts])

    def _item(self, member: Member, line: int) -> Item:
        entry, piece = self.entries[member.entry], member.piece
        number = 0 if piece is None else entry.pieces.index(piece)
        ratio = 1.0 if piece is None else shape_ratio(entry.recipe.adjust_lr, piece.rows, piece.cols)
        return Item(entry.program, member.entry, self._matrices(member), line, (*entry.place, number), ratio)

    def _bucket(self, part: list[Member]) -> Bucket:
        piece = part[0].piece
        assert piece is not None
        sizes = list(map(self._matrices, part))
        rows = [m.entry for m in part for _ in range(self._matrices(m))]
        return Bucket(
            self.entries[part[0].entry].recipe,
            self._input_dtype(part[0]),
            piece.rows,
            piece.cols,
            sizes,
            [self.entries[row].group for row in rows],
            torch.tensor(rows, device=self.device),
            torch.full((sum(sizes),), float("nan"), device=self.device),
        )

    def _remember_momentum(self) -> None:
        """The largest entries of the momenta there are, from which a fp16 input's power of two is bounded."""
        largest = self.table.column("momentum_max")
        for round_ in self.rounds:
            for member, item in zip(round_.members[round_.whole :], round_.after.items, strict=True):
                if self._input_dtype(member) is torch.float16:
                    m = member.view(self.entries[member.entry].momentum).reshape(item.matrices, -1)
                    largest[item.first_sum : item.first_sum + item.matrices] = m.abs().amax(-1)

    # ---- what a step measured ---------------------------------------------------------------------------------------

    def sums_of(self, group: int) -> dict[str, Tensor]:
        """Sums of squares over a group's parameters here, and the slack of its matrices; empty where it has none.

        The momentum, update and parameter of a step that was not taken are those of the last that was.
        """
        rows = [i for i, entry in enumerate(self.entries) if entry.group == group]
        if not rows:
            return {}
        begin, end = rows[0], rows[-1] + 1  # a group's entries follow one another, and so do their lines
        squares = self.table.column("grad_sq")[begin:end]
        taken = self.table.column("finite")[begin:end] > 0
        found = {"grad_sq": torch.where(taken, squares, 0).sum()}
        lines = slice(self.first_sums[begin], self.first_sums[end])
        for name in ("momentum_sq", "update_sq", "param_sq"):
            found[name] = self.table.column(name)[lines].sum()
        slack = [part for round_ in self.rounds for bucket in round_.buckets for part in bucket.slack_of(group)]
        return found | ({"slack": torch.cat(slack)} if slack else {})

    # ---- the step -------------------------------------------------------------------------------------------------

    def step(self, hypers: Sequence[Hyper], scaling: Scaling) -> None:
        """One step; hypers[group] are the numbers of a group. The gradients are the parameters' own."""
        grads = [_present(entry.param.grad) for entry in self.entries]
        groups = _groups(hypers, self.group_of, self.device)
        arguments = (self.steps, self.table, self.programs, self.first_sums, groups, scaling)
        multi_tensor.inspect(grads, *arguments, backend=self.backend)
        for round_ in self.rounds:
            self._run(round_)

    def _run(self, round_: Round) -> None:
        # Views of a parameter are made anew: its `data` may have been exchanged, and its gradient is another one.
        pairs = list(zip(round_.members, round_.entries, strict=True))
        params = [m.view(e.param) if m.narrow else e.param for m, e in pairs]
        grads = [m.view(_present(e.param.grad)) if m.narrow else _present(e.param.grad) for m, e in pairs]
        stacks = [bucket.empty(self.device) for bucket in round_.buckets]
        whole = round_.whole
        multi_tensor.before(
            grads,
            round_.momenta,
            round_.seconds,
            round_.no_inputs + round_.of_members(stacks),
            params[:whole] + round_.no_params,
            round_.mantissas[:whole] + round_.no_mantissas if whole and round_.mantissas else [],
            self.table,
            round_.before,
            backend=self.backend,
        )
        if not stacks:
            return
        lengths: list[Tensor] = []
        for i, bucket in enumerate(round_.buckets):
            stacks[i], length = bucket.towards(stacks[i], self.table)  # the input is free from here on
            lengths += length or [self.absent] * len(bucket.sizes)
        multi_tensor.after(
            round_.of_members(stacks),
            round_.seconds[whole:],
            params[whole:],
            round_.mantissas[whole:],
            _present_or(lengths),
            self.table,
            round_.after,
            backend=self.backend,
        )


def _pieces(entry: Entry) -> tuple[Piece | None, ...]:
    return (None,) if entry.program.whole else entry.pieces


def _present(grad: Tensor | None) -> Tensor:
    assert grad is not None
    return grad


def _groups(hypers: Sequence[Hyper], of: list[int], device: torch.device) -> Groups:
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
    return number.detach().to(device, wanted, non_blocking=True)
