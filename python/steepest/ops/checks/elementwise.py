"""The fused elementwise ops on a list of items that has every path of theirs, against their formulas in fp64.

Dtypes, both averages, every power, kind of direction and way to round; several matrices, more elements than a chunk,
addresses that are not aligned, transposed memory, more items than a launch takes; one gradient with a NaN, whose
parameter and state must stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from .. import multi_tensor
from ..multi_tensor import CHUNK, COLUMNS, Item, Items, Table
from ..program import Program
from ..selfcheck import Check
from .comparison import Comparison, rounded

F, B, H, D = torch.float32, torch.bfloat16, torch.float16, torch.float64
POWERS = {"quarter": 1 / 4, "half": 1 / 2, "sixth": 1 / 6}
#: lr, weight_decay, beta1, beta2, eps of two groups; `lerp` goes from the other end for the second.
GROUPS = ((0.02, 0.1, 0.9, 0.95, 1e-6), (0.3, 0.2, 0.4, 0.3, 1e-3))
RATIO = 0.75
MEASURED = ("grad_sq", "input_scale", "momentum_sq", "momentum_max", "update_sq", "param_sq")
UNIT = {F: 2.0**-18, D: 2.0**-44}  # of the arithmetic: see `rounded`

MUADAM = Program(momentum_correction=True, power="quarter", second_correction=True, eps_inside=True)
FIRST = Program(nesterov=True, power="half", start_first=True, decay_after=True, decay_scaled=True)
INTERPOLATED = Program(nesterov=True, interpolated=True)
ADAMW = Program(momentum_correction=True, power="quarter", second_correction=True, direction="identity")


@dataclass(frozen=True)
class Case:
    """``count`` items of one shape. types: of gradient, momentum, second moment, input or direction, parameter.

    step: the one that is taken.   nan: in a gradient.   largest: the limit of gradients that are taken, 0: none.
    rows: of all matrices of an item, where the directions of rows have factors.
    """

    program: Program
    types: tuple[torch.dtype, ...]
    shape: tuple[int, ...]
    matrices: int = 1
    count: int = 1
    shift: int = 0
    turned: bool = False
    nan: bool = False
    largest: float = 0.0
    step: int = 3
    rows: int = 0

    @property
    def refused(self) -> bool:
        """Whether its step is not taken; of noise some entry is larger than any limit here."""
        return self.nan or self.largest > 0


CASES = (
    Case(Program(nesterov=True), (F, F, F, H, F), (40, 24), rows=40),
    Case(MUADAM, (F, B, F, H, F), (2, CHUNK + 3), matrices=2),
    Case(
        Program(nesterov=True, power="half", second_correction=True, cautious=True, rounding="stochastic"),
        (B, B, F, H, B),
        (131,),
        shift=1,
    ),
    Case(
        Program(heavy_ball=True, nesterov=True, power="sixth", sum=True),
        (H, H, F, H, H),
        (3, 5, 7),
        matrices=3,
        rows=15,
    ),
    Case(ADAMW, (F, F, F, F, F), (CHUNK + 5,), shift=1),
    Case(replace(ADAMW, cautious=True, rounding="mantissa"), (B, F, F, B, B), (131,)),
    Case(Program(power="half", direction="sign"), (F, B, F, B, B), (9,)),
    Case(Program(heavy_ball=True, direction="identity", maximize=True), (F, F, F, F, F), (24, 17), turned=True),
    Case(replace(MUADAM, rounding="mantissa"), (B, B, F, B, B), (17, 24), turned=True, rows=17),
    Case(MUADAM, (F, F, F, H, F), (16, 9), nan=True),
    Case(ADAMW, (F, F, F, F, F), (16, 8), largest=0.1),
    Case(FIRST, (F, F, F, H, F), (16, 9), step=1),
    Case(INTERPOLATED, (F, F, F, H, F), (16, 9)),
    Case(replace(MUADAM, frozen_moments=True, decay_independent=True), (F, F, F, H, F), (16, 9)),
    Case(Program(), (F, F, F, H, F), (8,), count=300),
)
# One thread's worth of elements: several would wait for one another longer than they work.
ON_A_CPU = (
    *(case for case in CASES if case.count == 1 and case.shape != (2, CHUNK + 3)),
    Case(MUADAM, (F, B, F, H, F), (CHUNK + 3,)),
    Case(MUADAM, (D, D, D, D, D), (33,), rows=3),
)
# Every other combination of types, alignment and absent tensors would be compiled for this check alone.
IN_TRITON = (
    Case(MUADAM, (F, F, F, H, F), (2, CHUNK + 3), matrices=2),
    Case(Program(nesterov=True, rounding="stochastic"), (B, B, F, H, B), (40, 24)),
    Case(ADAMW, (F, F, F, F, F), (CHUNK + 8,)),
    Case(ADAMW, (F, F, F, F, F), (16, 8), nan=True),
    Case(ADAMW, (F, F, F, F, F), (16, 8), largest=0.1),
    *(case for case in CASES if case.program in (FIRST, INTERPOLATED) or case.program.frozen_moments),
    Case(ADAMW, (F, F, F, F, F), (8,), count=300),
)


def run(backend: str, comparison: Comparison) -> None:
    cases = {"cpu": ON_A_CPU, "cuda": CASES, "triton": IN_TRITON}[backend]
    check(lambda name: multi_tensor._op(name, backend), cases, comparison)


def check(op: Callable[[str], Callable[..., None]], cases: Sequence[Case], comparison: Comparison) -> None:
    """op: each of the four by its name, with the arguments of torch.ops.steepest's."""
    works = [_Work(case, GROUPS[i % len(GROUPS)], comparison) for i, case in enumerate(cases)]
    every = [(i, work) for i, work in enumerate(works) for _ in range(work.case.count)]  # one an item
    first_sums = list(accumulate((work.case.matrices for _, work in every), initial=0))
    sizes = [(work.case.matrices, math.prod(work.case.shape) // work.case.matrices) for _, work in every]
    skipped = comparison.place(torch.zeros((), dtype=torch.int64, device=comparison.device))
    table = Table.empty(skipped, [matrices * size for matrices, size in sizes], sizes)
    place = comparison.place
    table = Table(place(table.rows), place(table.sums), place(table.scratch), skipped)
    limits = [work.case.largest for _, work in every]
    table.column("largest_taken").copy_(torch.tensor(limits, dtype=D, device=comparison.device))
    table.column("momentum_max").copy_(torch.cat([work.lines("momentum").abs().amax(-1) for work in works]))
    counts = [work.case.step - 1.0 for _, work in every]
    steps, again = (comparison.place(torch.tensor(counts, dtype=F, device=comparison.device)) for _ in range(2))

    rate = comparison.numbers(GROUPS[0][:1], dtype=D)  # as a tensor, which stands for the first group's
    values = [math.nan, *GROUPS[0][1:], *GROUPS[1]]
    programs, groups = [work.case.program.packed() for _, work in every], [i % len(GROUPS) for i, _ in every]
    slots = ("grad", "momentum", "second", "input", "direction", "param", "mantissa", "lengths", "factors")
    lists = {name: [t for work in works for t in work.items(name)] for name in slots}
    grads = lists["grad"]
    numbers = (programs, first_sums, groups, values, [rate], [0])
    memory = (table.sums, table.skipped, table.scratch)
    op("grad_stats")(grads, list(steps.unbind()), table.rows, *memory, *numbers, None, None)
    # Once more in two calls.
    unknown = torch.zeros_like(table.rows)
    unknown[:, -1] = table.column("largest_taken")
    apart = Table(place(unknown), table.sums, table.scratch, place(torch.zeros_like(skipped)))
    memory = (apart.sums, apart.skipped, apart.scratch)
    op("grad_stats")(grads, list(again.unbind()), apart.rows, *memory, *numbers, None, None, False)
    op("decide_steps")(list(again.unbind()), apart.rows, *memory[:2], *numbers, None)

    absent = torch.empty(0, dtype=F, device=comparison.device)
    whole = [work.case.program.whole for _, work in every]
    items = [
        Item(work.case.program, i, work.case.matrices, first_sums[i], (group, i, 0), RATIO)
        for i, ((_, work), group) in enumerate(zip(every, groups))
    ]
    moved = {name: [t if kept else absent for t, kept in zip(lists[name], whole)] for name in ("param", "mantissa")}
    tables = (table.rows, table.sums, table.scratch)
    lists["input"] = [absent if kept else t for t, kept in zip(lists["input"], whole)]
    all_of_it = (grads, lists["momentum"], lists["second"], lists["input"], moved["param"], moved["mantissa"])
    op("update_moments")(*all_of_it, *tables, *Items(tuple(items)).numbers)
    late = [i for i, kept in enumerate(whole) if not kept]
    if late:
        some = (
            [lists[name][i] for i in late]
            for name in ("direction", "second", "param", "mantissa", "lengths", "factors")
        )
        op("apply_update")(*some, *tables, *Items(tuple(items[i] for i in late)).numbers)

    taken = torch.cat([steps.new_full((work.case.count,), 0.0 if work.case.refused else 1.0) for work in works])
    comparison.expect("whether steps are taken", table.column("finite"), taken)
    comparison.expect("step counts", steps, taken + steps.new_tensor(counts))
    comparison.expect("steps not taken", skipped, len(every) - taken.sum())
    known, apart_known = (each.clamp(max=1e300) for each in (table.rows, apart.rows))  # of NaN they are infinite
    comparison.expect("rows that are decided apart", apart_known, known)
    comparison.expect("step counts that are decided apart", again, steps)
    comparison.expect("steps not taken when decided apart", apart.skipped, skipped)
    row = 0
    for work in works:
        end = row + work.case.count
        if work.case.refused:
            work.expect_nothing()
        else:
            rows, lines = slice(row, end), slice(first_sums[row], first_sums[end])
            work.expect({name: table.column(name)[rows if name in COLUMNS else lines] for name in MEASURED})
        row = end


class _Work:
    """The tensors of a case, (count, *shape) each, and those that kernels write as they were before."""

    def __init__(self, case: Case, group: Sequence[float], comparison: Comparison) -> None:
        self.case, self.group, self.comparison = case, group, comparison
        program, (grad, momentum, second, into, param) = case.program, case.types
        self.tensors = {"grad": self._normal(grad), "momentum": self._normal(momentum, 0.3)}
        self.tensors["param"] = self._normal(param)
        if program.power != "none":
            self.tensors["second"] = self._normal(second).square_()
        if program.rounding == "mantissa" and param == B:
            low = self._normal(F).mul_(9000).clamp_(-(2**15), 2**15 - 1)
            self.tensors["mantissa"] = self._turned(comparison.place(self._turned(low.to(torch.int16))))
        if not program.whole:
            shape = (case.count, *case.shape)
            self.tensors["input"] = comparison.empty(*shape, dtype=into)
            self.tensors["direction"] = comparison.normal(*shape, dtype=into, scale=0.5)
            if case.matrices > 1:
                lengths = torch.linspace(0.5, 1.5, case.count * case.matrices, dtype=D, device=comparison.device)
                self.tensors["lengths"] = comparison.place(lengths.view(case.count, case.matrices))
            if case.rows:
                wide = D if D in case.types else F
                factors = torch.linspace(0.5, 1.5, case.count * case.rows, dtype=wide, device=comparison.device)
                self.tensors["factors"] = comparison.place(factors.view(case.count, case.rows))
        if case.nan:
            self.tensors["grad"].view(-1)[-1:] = math.nan
        written = ("momentum", "second", "param")
        self.old = {name: t.clone() for name, t in self.tensors.items() if name in written}
        self.old_weight = self.weight()

    def _normal(self, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        case = self.case
        shape = case.shape[::-1] if case.turned else case.shape
        return self._turned(self.comparison.normal(case.count, *shape, dtype=dtype, scale=scale, shift=case.shift))

    def _turned(self, t: Tensor) -> Tensor:
        return t.mT if self.case.turned else t

    def items(self, name: str) -> list[Tensor]:
        """One tensor for each item; without elements where its program has no use for it."""
        t = self.tensors.get(name)
        if t is not None:
            return list(t.unbind())
        dtype = torch.int16 if name == "mantissa" else D if name == "lengths" else F
        return [torch.empty(0, dtype=dtype, device=self.comparison.device)] * self.case.count

    def lines(self, name: str) -> Tensor:
        """A line for each matrix, in fp64."""
        return self.tensors[name].reshape(self.case.count * self.case.matrices, -1).double()

    def weight(self) -> Tensor:
        """The parameter's value: with its mantissa the fp32 number that they make."""
        param, low = self.tensors["param"], self.tensors.get("mantissa")
        if low is None:
            return param.to(D, copy=True)
        return (param.float().view(torch.int32) + low.to(torch.int32)).view(torch.float32).double()

    def expect_nothing(self) -> None:
        """A step that is not taken leaves everything as it was, bit for bit, and its input is zero."""
        for name, t in self.old.items():
            self._expect(name, self.tensors[name], t, 0.0)
        if "input" in self.tensors:
            self._expect("input", self.tensors["input"], 0.0, 0.0)

    def expect(self, columns: dict[str, Tensor]) -> None:
        """What the step must have made of the old tensors; columns: of the rows and lines of these items."""
        p, step, (lr, decay, beta1, beta2, eps) = self.case.program, self.case.step, self.group
        begun = not (p.start_first and step == 1)
        g, m, v = self.tensors["grad"].double(), self.old["momentum"].double(), None
        g = -g if p.maximize else g
        if not p.frozen_moments:
            old, b = m, beta1 * begun
            m = b * old + g if p.heavy_ball else b * old + (1 - b) * g
            self._expect_rounded("momentum", self.tensors["momentum"], m, old.abs() + g.abs())
        m = self.tensors["momentum"].double()  # as it was stored
        inverse: Tensor | float = 1.0
        if p.power != "none":
            v = self.old["second"].double()
            if not p.frozen_moments:
                b = beta2 * begun
                v = v + g * g if p.sum else b * v + (1 - b) * (g * g)
            self._expect_rounded("second moment", self.tensors["second"], v, v)
            power = 2 * POWERS[p.power]
            mass = (1 - beta2**step) ** power if p.second_correction else 1.0
            v = self.tensors["second"].double()
            v = v.sqrt() if p.power == "quarter" else v**power
            inverse = ((v + eps) / mass if p.eps_inside else v / mass + eps).rsqrt()
        y, terms = m, m.abs()
        if p.nesterov:
            read = beta2 / beta1 if p.interpolated else beta1
            y, terms = read * m + (g if p.heavy_ball else (1 - read) * g), m.abs() + g.abs()
        if p.momentum_correction:
            y, terms = y / (1 - beta1**step), terms / (1 - beta1**step)
        length: Tensor | float = 1.0
        if p.direction == "given":
            scale: Tensor | float = 1.0
            if self.case.types[3] == H:  # a power of two for each item, which keeps the input in range
                scale = columns["input_scale"].view(-1, *[1] * len(self.case.shape))
            x = (y * inverse * scale).clamp(-65504, 65504) if self.case.types[3] == H else y * inverse
            self._expect_rounded("input", self.tensors["input"], x, terms * inverse * scale)
            u = self.tensors["direction"].double()
            if "factors" in self.tensors:
                factors = self.tensors["factors"].unsqueeze(-1)
                u = (u.view(*factors.shape[:2], -1) * factors).view_as(u)
            u = u * inverse
            terms = u.abs()
            if "lengths" in self.tensors:
                length = self.tensors["lengths"].view(self.case.count, self.case.matrices, *[1] * (u.ndim - 2))
        elif p.direction == "identity":
            u, terms = y * inverse * inverse, terms * inverse * inverse
        else:
            u = y.sign() * inverse
            terms = u.abs()
        w = self.old_weight
        length = length * (lr * RATIO)
        u = u * length
        kept = torch.where(u * w >= 0, w, 0.0) if p.cautious else w - u if p.decay_after else w
        decay *= 1.0 if p.decay_independent else lr
        moved = w - decay * (RATIO if p.decay_scaled else 1.0) * kept - u
        self._expect_rounded("parameter", self.weight(), moved, terms * length + w.abs(), self.case.types[4])
        for column, t in {"momentum_sq": m, "param_sq": moved, "update_sq": u}.items():
            wanted = t.square().reshape(len(columns[column]), -1).sum(-1)
            self._expect(column, columns[column], wanted, wanted * 2.0**-12)
        self._expect("momentum_max", columns["momentum_max"], self.lines("momentum").abs().amax(-1), 0.0)
        wanted = g.square().reshape(self.case.count, -1).sum(-1)
        self._expect("grad_sq", columns["grad_sq"], wanted, wanted * 2.0**-12)

    def _expect(self, name: str, result: Tensor, wanted: Tensor | float, bound: Tensor | float) -> None:
        types = "-".join(str(dtype).removeprefix("torch.") for dtype in self.case.types)
        self.comparison.expect(f"{name} of {self.case.shape}, {types}", result, wanted, bound)

    def _expect_rounded(
        self, name: str, result: Tensor, wanted: Tensor, terms: Tensor, dtype: torch.dtype | None = None
    ) -> None:
        dtype = dtype or result.dtype
        if "mantissa" in self.tensors and name == "parameter":
            dtype = F
        unit = UNIT[D if D in self.case.types else F]
        self._expect(name, result, wanted, rounded(wanted, dtype, terms, unit))


def _static(backend: str, device: torch.device) -> str | None:
    return multi_tensor.reasons(device)[backend]


CHECK = Check(_static, run)
