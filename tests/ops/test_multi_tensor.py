"""The fused elementwise ops on the CPU: formulas restated in fp64, layouts, isolation, sums, contracts, errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from decimal import Decimal, localcontext
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from problems import FEW, gaussian
from steepest.ops import backend, multi_tensor
from steepest.ops.multi_tensor import CHUNK, COLUMNS, HYPERS, SUMS, Groups, Item, Items, Scaling, Table
from steepest.ops.program import Power, Program
from training import all_same_bits, same_bits

pytestmark = pytest.mark.skipif(backend.extension is None, reason=f"{backend.extension_reason}")

NAN, INF = float("nan"), float("inf")
F, B, H, D = torch.float32, torch.bfloat16, torch.float16, torch.float64
Types = tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype, torch.dtype]
#: lr, weight_decay, beta1, beta2, eps of two groups; `lerp` goes from the other end for the second.
GROUPS = ((0.02, 0.1, 0.9, 0.95, 1e-6), (0.3, 0.0, 0.4, 0.3, 0.0))
POWERS: dict[Power, float] = {"quarter": 0.25, "half": 0.5, "sixth": 1 / 6}

PROGRAMS = {
    "ema": Program(),
    "nesterov": Program(nesterov=True),
    "corrected": Program(momentum_correction=True),
    "heavy ball": Program(heavy_ball=True),
    "heavy ball, nesterov, ascent": Program(heavy_ball=True, nesterov=True, maximize=True),
    "cautious": Program(nesterov=True, cautious=True),
    "muadam": Program(momentum_correction=True, power="quarter", second_correction=True, eps_inside=True),
    "muadam, cautious": Program(power="quarter", second_correction=True, eps_inside=True, cautious=True),
    "sania": Program(momentum_correction=True, power="half", second_correction=True),
    "half, eps inside, sum": Program(nesterov=True, power="half", sum=True, eps_inside=True),
    "sixth": Program(heavy_ball=True, power="sixth", second_correction=True),
    "sixth, eps inside, nesterov": Program(nesterov=True, power="sixth", second_correction=True, eps_inside=True),
    "sgd": Program(heavy_ball=True, direction="identity"),
    "sgd, cautious, ascent": Program(heavy_ball=True, direction="identity", cautious=True, maximize=True),
    "adamw": Program(momentum_correction=True, power="quarter", second_correction=True, direction="identity"),
    "adamw, cautious": Program(
        momentum_correction=True, power="quarter", second_correction=True, direction="identity", cautious=True
    ),
    "adagrad": Program(power="quarter", sum=True, direction="identity"),
    "madgrad": Program(momentum_correction=True, power="sixth", second_correction=True, direction="identity"),
    "sign": Program(nesterov=True, direction="sign"),
    "sign under D": Program(power="half", second_correction=True, direction="sign", cautious=True),
}
#: Gradient, momentum, second moment, input and direction, parameter.
TYPES: tuple[Types, ...] = (
    (F, F, F, F, F),
    (F, B, F, B, B),
    (B, B, F, H, B),
    (H, H, F, H, H),
    (B, F, F, B, F),
    (H, B, B, H, B),
    (D, D, D, D, D),
    (D, F, F, F, D),
    (F, B, F, H, D),
    (D, H, D, B, B),
)
#: Matrices, shape.
SHAPES = ((1, (5,)), (1, (3, 8)), (4, (4, 6, 8)), (3, (3, 5, 7)), (1, ()), (2, (2, 1, 300)))


def ids(types: Types) -> str:
    return "-".join(str(dtype).removeprefix("torch.") for dtype in types)


# ---- items and what the ops do to them ----------------------------------------------------------------------------


@dataclass
class Work:
    """An item and its tensors: a parameter of its own, whose row has its number. Absent tensors have no elements."""

    program: Program
    matrices: int
    grad: Tensor
    momentum: Tensor
    second: Tensor
    input: Tensor
    direction: Tensor
    param: Tensor
    mantissa: Tensor
    lengths: Tensor
    step: Tensor
    ratio: float = 1.0
    group: int = 0

    def copy(self) -> Work:
        """In other memory, of the same strides and distance from 16 bytes."""
        return replace(self, **{name: twin(t) for name, t in self.tensors().items()})

    def contiguous(self) -> Work:
        return replace(self, **{name: t.clone(memory_format=CONTIGUOUS) for name, t in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}

    def weight(self) -> Tensor:
        """The parameter's value: with its mantissa the fp32 number that they make."""
        if not self.mantissa.numel():
            return self.param
        return (self.param.float().view(torch.int32) + self.mantissa.to(torch.int32)).view(torch.float32)

    def lines(self, t: Tensor) -> Tensor:
        """One line for each matrix."""
        return t.reshape(self.matrices, -1)


CONTIGUOUS = torch.contiguous_format
View = Callable[[Tensor], Tensor]


def twin(t: Tensor) -> Tensor:
    offset = t.data_ptr() % 16 // t.element_size()
    room = torch.zeros(offset + 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride())), dtype=t.dtype)
    return room.as_strided(t.shape, t.stride(), offset).copy_(t) if t.numel() else t.clone()


def make(
    program: Program,
    types: Types = TYPES[0],
    shape: Sequence[int] = (3, 8),
    matrices: int = 1,
    seed: int = 0,
    *,
    steps: float | None = 0,
    scaled: bool = True,
    views: Sequence[View] = (lambda t: t,) * 5,
    **numbers: Any,
) -> Work:
    """Random tensors, the views of gradient, momentum, second moment, input and parameter; inputs are NaN."""

    def random(at: int, scale: float = 1.0, kind: int = 0) -> Tensor:
        return views[at](gaussian(*shape, seed=100 * seed + 10 * kind + at).mul(scale).to(types[at]))

    param = random(4)
    keeps = program.rounding == "mantissa" and param.dtype == B
    low = views[4](gaussian(*shape, seed=100 * seed + 50).mul(9000).clamp(-(2**15), 2**15 - 1).to(torch.int16))
    lengths = torch.linspace(0.5, 1.5, matrices, dtype=D) if scaled else torch.empty(0, dtype=D)
    return Work(
        program,
        matrices,
        grad=random(0),
        momentum=random(1, 0.3),
        second=random(2).square_() if program.power != "none" else torch.empty(0),
        input=torch.empty(0) if program.whole else random(3).fill_(NAN),
        direction=torch.empty(0) if program.whole else random(3, 0.5, kind=1),
        param=param,
        mantissa=low if keeps else torch.empty(0, dtype=torch.int16),
        lengths=torch.empty(0, dtype=D) if program.whole else lengths,
        step=torch.empty(0) if steps is None else torch.tensor(float(steps)),
        **numbers,
    )


def table_of(works: Sequence[Work]) -> Table:
    items = [(w.matrices, w.grad.numel() // w.matrices) for w in works]
    return Table.empty(torch.zeros((), dtype=torch.int64), [w.grad.numel() for w in works], items)


def lines_of(works: Sequence[Work]) -> list[int]:
    return list(accumulate((w.matrices for w in works), initial=0))


def items_of(works: Sequence[Work], some: Iterable[int]) -> Items:
    lines = lines_of(works)
    return Items(
        tuple(Item(works[i].program, i, works[i].matrices, lines[i], (works[i].group, i, 0), works[i].ratio) for i in some)
    )


def groups_of(works: Sequence[Work], groups: Sequence[Sequence[float]] = GROUPS) -> Groups:
    return Groups([number for group in groups for number in group], [], [], [w.group for w in works])


def inspect(works: Sequence[Work], table: Table, scaling: Scaling = Scaling(), groups: Groups | None = None) -> None:
    numbers = [w.program.packed() for w in works], lines_of(works), groups or groups_of(works)
    multi_tensor.inspect([w.grad for w in works], [w.step for w in works], table, *numbers, scaling)


def before(works: Sequence[Work], table: Table) -> None:
    absent = torch.empty(0)
    multi_tensor.before(
        [w.grad for w in works],
        [w.momentum for w in works],
        [w.second for w in works],
        [w.input for w in works],
        [w.param if w.program.whole else absent for w in works],
        [w.mantissa if w.program.whole else absent for w in works],
        table,
        items_of(works, range(len(works))),
    )


def after(works: Sequence[Work], table: Table) -> None:
    some = [i for i, w in enumerate(works) if not w.program.whole]
    multi_tensor.after(
        [works[i].direction for i in some],
        [works[i].second for i in some],
        [works[i].param for i in some],
        [works[i].mantissa for i in some],
        [works[i].lengths for i in some],
        table,
        items_of(works, some),
    )


def take(works: Sequence[Work], table: Table | None = None, *numbers: Any) -> Table:
    """A whole step."""
    table = table or table_of(works)
    inspect(works, table, *numbers)
    before(works, table)
    after(works, table)
    return table


def row(table: Table, i: int) -> dict[str, float]:
    return dict(zip(COLUMNS, table.rows[i].tolist(), strict=True))


def same_works(a: Sequence[Work], b: Sequence[Work]) -> bool:
    return all(all_same_bits(x.tensors().values(), y.tensors().values()) for x, y in zip(a, b, strict=True))


# ---- the formulas in fp64 -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exact:
    """A number in fp64 and the sum of the magnitudes that it is made of, to which rounding errors are relative."""

    value: Tensor
    terms: Tensor

    @staticmethod
    def of(*terms: Tensor) -> Exact:
        return Exact(sum(terms[1:], terms[0]), sum((t.abs() for t in terms[1:]), terms[0].abs()))

    def times(self, factor: Tensor | float) -> Exact:
        return Exact(self.value * factor, self.terms * abs(factor))


@dataclass
class Formulas:
    """A step as its formulas say, from the tensors before it; t is counted from 1."""

    old: Work
    t: int
    grad_scale: float = 1.0
    group: Sequence[float] = field(init=False)

    def __post_init__(self) -> None:
        self.group = GROUPS[self.old.group]
        sign = -1 if self.old.program.maximize else 1
        self.g = self.old.grad.double() * sign / self.grad_scale

    def momentum(self) -> Exact:
        beta, m = self.group[2], self.old.momentum.double()
        if self.old.program.heavy_ball:
            return Exact.of(beta * m, self.g)
        return Exact(beta * m + (1 - beta) * self.g, m.abs() + self.g.abs())

    def second(self) -> Exact:
        beta, v = self.group[3], self.old.second.double()
        return Exact.of(v, self.g**2) if self.old.program.sum else Exact.of(beta * v, (1 - beta) * self.g**2)

    def inverse(self, v: Tensor) -> Tensor | float:
        """1 / D."""
        p, eps = self.old.program, self.group[4]
        if p.power == "none":
            return 1.0
        twice = 2 * POWERS[p.power]
        c = (1 - self.group[3] ** self.t) ** twice if p.second_correction else 1.0
        squared = (v**twice + eps) / c if p.eps_inside else v**twice / c + eps
        return torch.where(squared > 0, squared**-0.5, 0.0)

    def input(self, stored_momentum: Tensor) -> Exact:
        p, beta, m = self.old.program, self.group[2], stored_momentum.double()
        y = Exact.of(m)
        if p.nesterov:
            y = Exact.of(self.g if p.heavy_ball else (1 - beta) * self.g, beta * m)
            y = y if p.heavy_ball else Exact(y.value, self.g.abs() + m.abs())
        if p.momentum_correction:
            y = y.times(1 / (1 - beta**self.t))
        return y.times(self.inverse(self.second().value if p.power != "none" else m))

    def update(self, d: Exact, v: Tensor) -> Exact:
        """lr ratio length d / D."""
        length = self.old.lengths if self.old.lengths.numel() else torch.ones(self.old.matrices, dtype=D)
        length = self.old.lines(torch.ones_like(self.g)).mul(length[:, None]).view_as(self.g)
        return d.times(self.inverse(v)).times(self.group[0] * self.old.ratio * length)

    def weight(self, u: Exact) -> Exact:
        w = self.old.weight().double()
        kept = torch.where(u.value * w >= 0, w, 0) if self.old.program.cautious else w
        decay = self.group[0] * self.group[1]
        return Exact(w - decay * kept - u.value, w.abs() + u.terms)


def assert_rounded_once(found: Tensor, wanted: Exact, arithmetic: torch.dtype, name: str, units: float = 0.5) -> None:
    """Half a unit in the last place for the store (a whole one if stochastic) and a few of the arithmetic before it."""
    store, eps = torch.finfo(found.dtype), torch.finfo(arithmetic).eps
    # What is stored in 16 bits goes through fp32.
    relative = units * store.eps + (2.0**-24 if found.dtype in (B, H) else 0)
    bound = relative * wanted.value.abs() + 16 * eps * wanted.terms + store.smallest_normal * store.eps
    off = (found.double() - wanted.value).abs()
    assert bool((off <= bound).all()), f"{name}: off by {(off / bound).max():.3g} of what is allowed"


def assert_sum(found: Tensor, terms: Tensor, arithmetic: torch.dtype, name: str) -> None:
    """Of every line; a few hundred terms at a time are added up as they come."""
    eps = 200 * torch.finfo(arithmetic).eps
    off = (found - terms.sum(-1)).abs()
    assert bool((off <= eps * terms.abs().sum(-1)).all()), name


def assert_before(old: Work, new: Work, table: Table, line: int, at: Formulas, name: str) -> Exact:
    """Momentum, second moment, input and their sums; returns x."""
    arithmetic = D if any(t.dtype == D for t in old.tensors().values() if t.numel() and t is not old.lengths) else F
    assert_rounded_once(new.momentum, at.momentum(), arithmetic, f"{name}: momentum")
    if old.program.power != "none":
        assert_rounded_once(new.second, at.second(), arithmetic, f"{name}: second moment")
    x = at.input(new.momentum)
    if not old.program.whole:
        scale = row(table, line)["input_scale"] if new.input.dtype == H else 1.0
        assert_rounded_once(new.input, x.times(scale), arithmetic, f"{name}: input")
    return x


def arithmetic_of(w: Work) -> torch.dtype:
    slots = (w.grad, w.momentum, w.second, w.input, w.param) if w.program.whole else (w.grad, w.momentum, w.second)
    return D if any(t.dtype == D for t in slots if t.numel()) else F
