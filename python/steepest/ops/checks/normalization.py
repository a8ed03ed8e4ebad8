"""Updates that are normalized over rows and over entries, on their way into weights and by themselves, against the
same in fp64.

Dtypes, second moments that are zero, rows of a warp and of a block, more than one block a matrix, odd sizes, addresses
that are not aligned, more stacks than a launch takes; a step that is not taken, a row of NaN and a matrix of zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from .. import normalize
from ..multi_tensor import Item, Items, Table
from ..program import Program
from ..selfcheck import Check
from .comparison import Comparison

F, B, H, D = torch.float32, torch.bfloat16, torch.float16, torch.float64
EPS, RATES = 1e-8, (0.95, 0.5)
LR, RATIO = 0.5, 0.75
UNIT = {F: 2.0**-17, D: 2.0**-45}  # of sums of some thousand terms, relative


@dataclass(frozen=True)
class Case:
    """``count`` stacks.   dtype: of the updates.   shift: elements behind a multiple of 16 bytes.   refused: their
    step is not taken.   turned: weights have contiguous columns.   in_place: entries are divided where they are.
    plain: they are not normalized.
    """

    shape: tuple[int, int, int]
    dtype: torch.dtype = F
    shift: int = 0
    count: int = 1
    nan: bool = False
    refused: bool = False
    turned: bool = False
    in_place: bool = False
    plain: bool = False


CASES = (
    Case((2, 40, 24), H),
    Case((3, 5, 7), B),
    Case((2, 3, 9), F, shift=1),
    Case((1, 70, 520), B),
    Case((1, 3, 8200), H, shift=1),
    Case((1, 90, 3)),
    Case((2, 6, 10), nan=True),
    Case((1, 4, 8), B, refused=True),
    Case((2, 37, 40), B, turned=True),
    Case((2, 40, 70), in_place=True),
    Case((2, 30, 20), plain=True),
    Case((1, 2, 8), count=200),
)
# Few, as torch's threads wait for one another longer than they work.
ON_A_CPU = (*(case for case in CASES if case.count == 1 and case.shape[-1] < 100), Case((2, 3, 5), D))


def run(backend: str, comparison: Comparison) -> None:
    check(lambda name: getattr(torch.ops.steepest, name), comparison, CASES if backend == "cuda" else ON_A_CPU)


def check(op: Callable[[str], Callable[..., None]], comparison: Comparison, cases: Sequence[Case]) -> None:
    """op: `normalize_and_apply_update` and `normalize_updates` by their names, with the arguments of
    torch.ops.steepest's.
    """
    every = [case for case in cases for _ in range(case.count)]
    meeting = comparison.place(normalize.scratch_for([case.shape for case in every], comparison.device))
    table = _table(every, comparison)
    alone = [case for case in cases if not case.refused and not case.plain and case.count == 1]
    for over, rms in (("rows", 0.0), ("entries", 0.25)):
        works = [_Work(case, over, RATES[i % len(RATES)], comparison) for i, case in enumerate(every)]
        _apply(op, works, table, meeting, rms, comparison)
        for line, work in zip(_lines_of(every), works, strict=True):
            work.expect(rms)
            work.expect_step(table, line)
        works = [_Work(case, over, RATES[i % len(RATES)], comparison) for i, case in enumerate(alone)]
        lists = [[work.update for work in works], [work.second for work in works]]
        lists += [[work.divided for work in works] if over == "entries" else [], [work.factors for work in works]]
        op("normalize_updates")(*lists, meeting, [work.beta2 for work in works], EPS, rms)
        for work in works:
            work.expect(rms)
    counters = 1 + 2 * sum(case.shape[0] for case in every)
    comparison.expect("counters where blocks meet", meeting[:counters], 0.0)
    comparison.expect("counters", table.scratch[: len(table.sums)], 0.0)


def _lines_of(cases: Sequence[Case]) -> list[int]:
    """The line of the first matrix of each."""
    return list(accumulate((case.shape[0] for case in cases), initial=0))[:-1]


def _table(cases: Sequence[Case], comparison: Comparison) -> Table:
    """The table of one parameter a case, whose step is taken or not."""
    sizes = [(case.shape[0], math.prod(case.shape[1:])) for case in cases]
    skipped = comparison.place(torch.zeros((), dtype=torch.int64, device=comparison.device))
    table = Table.empty(skipped, [matrices * size for matrices, size in sizes], sizes)
    rows, sums, scratch = (comparison.place(t) for t in (table.rows, table.sums, table.scratch))
    table = Table(rows, sums, scratch, skipped)
    finite = torch.tensor([0.0 if case.refused else 1.0 for case in cases], dtype=D, device=comparison.device)
    table.column("finite").copy_(finite)
    table.column("lr").fill_(LR)
    return table


def _apply(
    op: Callable[[str], Callable[..., None]],
    works: Sequence[_Work],
    table: Table,
    meeting: Tensor,
    rms: float,
    comparison: Comparison,
) -> None:
    """One call for all."""
    absent = torch.empty(0, dtype=F, device=comparison.device)
    items = [
        Item(Program(), row, work.case.shape[0], line, (0, row, 0), RATIO)
        for row, (work, line) in enumerate(zip(works, _lines_of([work.case for work in works]), strict=True))
    ]
    lists = [[work.update for work in works], [], [work.weight for work in works], [], []]
    normalized = [not work.case.plain for work in works]
    lists += [[work.factors if n else absent for n, work in zip(normalized, works, strict=True)]]
    lists += [[work.second if n else absent for n, work in zip(normalized, works, strict=True)]]
    divides = [n and work.over == "entries" for n, work in zip(normalized, works, strict=True)]
    lists += [[work.divided if d else absent for d, work in zip(divides, works, strict=True)]]
    rates = [rate for work in works for rate in (work.beta2, EPS, rms)]
    tables = (table.rows, table.sums, table.scratch)
    op("normalize_and_apply_update")(*lists, *tables, meeting, *Items(tuple(items)).numbers, rates)


class _Work:
    """The tensors of one stack."""

    def __init__(self, case: Case, over: str, beta2: float, comparison: Comparison) -> None:
        self.case, self.over, self.beta2, self.comparison = case, over, beta2, comparison
        shape, wide = case.shape, torch.promote_types(case.dtype, F)
        of_second = shape[:2] if over == "rows" else shape
        self.update = comparison.normal(*shape, dtype=case.dtype, shift=case.shift)
        self.second = comparison.normal(*of_second, dtype=wide, shift=case.shift).square_()
        self.factors = comparison.empty(*(shape[:2] if over == "rows" else (shape[0], 1)), dtype=wide)
        self.divided = self.update
        if over == "entries" and not case.in_place:
            self.divided = comparison.empty(*shape, dtype=wide, shift=case.shift)
        batch, rows, columns = shape
        in_memory = (batch, columns, rows) if case.turned else shape
        self.weight = comparison.normal(*in_memory, dtype=wide, shift=case.shift)
        if case.turned:
            self.weight = self.weight.mT
        self.second[0, :1] = 0
        if shape[0] > 1:  # a matrix of zeros, behind one without
            self.update[-1] = 0
            self.second[-1] = 0
        if case.nan:
            self.update[0, 1] = math.nan
        self.given, self.old, self.old_weight = self.update.clone(), self.second.clone(), self.weight.clone()

    def expect(self, rms: float) -> None:
        """What must have become of them."""
        expect, what = self.comparison.expect, f"{self.case.shape}, {self.case.dtype}, over {self.over}"
        if self.case.refused or self.case.plain:
            expect(f"second moments of {what}", self.second, self.old)
            self.made = self.given.double()
            return
        u, old, unit = self.given.double(), self.old.double(), UNIT[self.second.dtype]
        square = u.square().mean(-1) if self.over == "rows" else u.square()
        second = self.beta2 * old + (1 - self.beta2) * square
        second = torch.where(second.isnan(), old, second)
        expect(f"second moments of {what}", self.second, second, second * unit + 1e-37)
        scale = 1 / (second.sqrt() + EPS)
        by_scale = u * (scale.unsqueeze(-1) if self.over == "rows" else scale)
        before = u.flatten(1).norm(dim=-1) if rms == 0 else rms * u[0].numel() ** 0.5
        ratio = (before / by_scale.flatten(1).norm(dim=-1)).nan_to_num(nan=0.0, posinf=0.0)
        factors = scale * ratio[:, None] if self.over == "rows" else ratio[:, None]
        expect(f"factors of {what}", self.factors, factors, factors * unit)
        self.made = by_scale * ratio[:, None, None]
        if self.over == "entries":
            made, wanted = self.divided.double().nan_to_num(nan=0.0), by_scale.nan_to_num(nan=0.0)
            expect(f"updates of {what}", made, wanted, wanted.abs() * unit)

    def expect_step(self, table: Table, line: int) -> None:
        """What must have become of the weight, and of the sums of its matrices from this line on."""
        expect, what = self.comparison.expect, f"{self.case.shape}, {self.case.dtype}, over {self.over}"
        if self.case.refused:
            expect(f"weights of {what}", self.weight, self.old_weight)
            return
        step = LR * RATIO * self.made
        wanted, unit = self.old_weight.double() - step, 2 * UNIT[self.second.dtype]
        bound = (step.abs() + wanted.abs()) * unit
        finite = step.isfinite()  # a row of NaN is one of the weight's
        found = torch.where(finite, self.weight.double(), 0.0)
        expect(f"weights of {what}", found, torch.where(finite, wanted, 0.0), torch.where(finite, bound, 0.0))
        if not self.case.nan:
            sums = step.square().flatten(1).sum(-1)
            column = table.column("update_sq")[line : line + len(sums)]
            expect(f"length of the step of {what}", column, sums, sums * 2.0**-12)


def _static(backend: str, device: torch.device) -> str | None:
    from .. import backend as _backend

    if backend == "cuda":
        return _backend.cuda_reason(device.index)
    return _backend.extension_reason


CHECK = Check(_static, run)
