"""The fused elementwise ops on the CPU: formulas restated in fp64, layouts, isolation, sums, contracts, errors."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from decimal import Decimal, localcontext
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import steepest
from steepest.ops import backend, multi_tensor
from steepest.ops.multi_tensor import CHUNK, COLUMNS, SUMS, Groups, Item, Items, Scaling, Table
from steepest.ops.program import HYPERS, Power, Program
from steepest.parts import Rounding
from support.problems import FEW, gaussian
from support.slow import slow
from support.training import all_same_bits, same_bits

MORE = settings(FEW, max_examples=100)

pytestmark = pytest.mark.skipif(backend.extension is None, reason=f"{backend.extension_reason}")

NAN, INF = float("nan"), float("inf")
PLAIN = Scaling()
F, B, H, D = torch.float32, torch.bfloat16, torch.float16, torch.float64
Types = tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype, torch.dtype]
#: lr, weight_decay, beta1, beta2, eps of two groups; `lerp` goes from the other end for the second.
GROUPS = ((0.02, 0.1, 0.9, 0.95, 1e-6), (0.3, 0.2, 0.4, 0.3, 0.0))
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
    "first": Program(nesterov=True, start_first=True),
    "first, under D": Program(power="quarter", start_first=True, eps_inside=True, maximize=True),
    "first, sum": Program(nesterov=True, power="half", sum=True, start_first=True, direction="identity"),
    "decay after": Program(momentum_correction=True, power="quarter", second_correction=True, decay_after=True),
    "decay after, sgd": Program(heavy_ball=True, direction="identity", decay_after=True),
    "decay scaled": Program(nesterov=True, decay_scaled=True),
    "decay scaled, cautious": Program(power="sixth", sum=True, cautious=True, decay_scaled=True),
    "decay scaled, after, sign": Program(direction="sign", decay_after=True, decay_scaled=True),
    "decay independent": Program(nesterov=True, decay_independent=True),
    "decay independent, adamw": Program(power="quarter", direction="identity", cautious=True, decay_independent=True),
    "interpolated": Program(nesterov=True, interpolated=True),
    "lion": Program(nesterov=True, interpolated=True, direction="sign"),
    "frozen": Program(nesterov=True, power="half", second_correction=True, frozen_moments=True),
    "frozen, adamw": Program(
        momentum_correction=True, power="quarter", second_correction=True, direction="identity", frozen_moments=True
    ),
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
    factors: Tensor
    step: Tensor
    ratio: float = 1.0
    group: int = 0

    def copy(self) -> Work:
        """In other memory, of the same strides and distance from 16 bytes."""
        return self.each(twin)

    def contiguous(self) -> Work:
        return self.each(lambda t: t.clone(memory_format=CONTIGUOUS))

    def each(self, change: View) -> Work:
        changed: dict[str, Any] = {name: change(t) for name, t in self.tensors().items()}
        return replace(self, **changed)

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
    """Random tensors, the views of gradient, momentum, second moment, input and parameter; inputs are NaN.

    Inputs and directions are contiguous, of whatever shape their view has.
    """

    def random(at: int, scale: float = 1.0, kind: int = 0) -> Tensor:
        return views[at](gaussian(*shape, seed=100 * seed + 10 * kind + at).mul(scale).to(types[at]))

    param = random(4)
    keeps = program.rounding == "mantissa" and param.dtype == B
    low = views[4](gaussian(*shape, seed=100 * seed + 50).mul(9000).clamp(-(2**15), 2**15 - 1).to(torch.int16))
    lengths = torch.linspace(0.5, 1.5, matrices, dtype=D) if scaled else torch.empty(0, dtype=D)
    rows = math.prod(shape) // shape[-1] if shape and math.prod(shape[:-1]) % matrices == 0 else matrices
    factors = torch.linspace(0.5, 1.5, rows if scaled and seed % 2 else 0, dtype=D if D in types else F)
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
        factors=torch.empty(0) if program.whole else factors,
        step=torch.empty(0) if steps is None else torch.tensor(float(steps)),
        **numbers,
    )


def table_of(works: Sequence[Work]) -> Table:
    """With the largest entries of the momenta, as if it had been there when they were made."""
    items = [(w.matrices, w.grad.numel() // w.matrices) for w in works]
    table = Table.empty(torch.zeros((), dtype=torch.int64), [w.grad.numel() for w in works], items)
    largest = [w.lines(w.momentum).abs().amax(-1).double() for w in works]
    table.column("momentum_max").copy_(torch.cat([*largest, torch.empty(0)]))
    return table


def lines_of(works: Sequence[Work]) -> list[int]:
    return list(accumulate((w.matrices for w in works), initial=0))


def items_of(works: Sequence[Work], some: Iterable[int]) -> Items:
    lines = lines_of(works)
    return Items(
        tuple(
            Item(works[i].program, i, works[i].matrices, lines[i], (works[i].group, i, 0), works[i].ratio) for i in some
        )
    )


def groups_of(works: Sequence[Work], groups: Sequence[Sequence[float]] = GROUPS) -> Groups:
    return Groups([number for group in groups for number in group], [], [], [w.group for w in works])


def grad_stats(works: Sequence[Work], table: Table, scaling: Scaling = PLAIN, groups: Groups | None = None) -> None:
    numbers = [w.program.packed() for w in works], lines_of(works), groups or groups_of(works)
    multi_tensor.grad_stats([w.grad for w in works], [w.step for w in works], table, *numbers, scaling)


def update_moments(works: Sequence[Work], table: Table) -> None:
    absent = torch.empty(0)
    multi_tensor.update_moments(
        [w.grad for w in works],
        [w.momentum for w in works],
        [w.second for w in works],
        [w.input for w in works],
        [w.param if w.program.whole else absent for w in works],
        [w.mantissa if w.program.whole else absent for w in works],
        table,
        items_of(works, range(len(works))),
    )


def apply_update(works: Sequence[Work], table: Table) -> None:
    some = [i for i, w in enumerate(works) if not w.program.whole]
    multi_tensor.apply_update(
        [works[i].direction for i in some],
        [works[i].second for i in some],
        [works[i].param for i in some],
        [works[i].mantissa for i in some],
        [works[i].lengths for i in some],
        [works[i].factors for i in some],
        table,
        items_of(works, some),
    )


def take(works: Sequence[Work], table: Table | None = None, *numbers: Any) -> Table:
    """A whole step."""
    table = table or table_of(works)
    grad_stats(works, table, *numbers)
    update_moments(works, table)
    apply_update(works, table)
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
        return Exact(self.value * factor, self.terms * (factor.abs() if isinstance(factor, Tensor) else abs(factor)))


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
        self.begun = self.t > 1 or not self.old.program.start_first

    def momentum(self) -> Exact:
        beta, m = self.group[2] * self.begun, self.old.momentum.double()
        if self.old.program.frozen_moments:
            return Exact.of(m)
        if self.old.program.heavy_ball:
            return Exact.of(beta * m, self.g)
        return Exact(beta * m + (1 - beta) * self.g, m.abs() + self.g.abs())

    def second(self) -> Exact:
        beta, v = self.group[3] * self.begun, self.old.second.double()
        if self.old.program.frozen_moments:
            return Exact.of(v)
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
            beta = self.group[3] / beta if p.interpolated else beta
            y = Exact.of(self.g if p.heavy_ball else (1 - beta) * self.g, beta * m)
            y = y if p.heavy_ball else Exact(y.value, self.g.abs() + m.abs())
        if p.momentum_correction:
            y = y.times(1 / (1 - beta**self.t))
        return y.times(self.inverse(self.second().value if p.power != "none" else m))

    def update(self, d: Exact, v: Tensor) -> Exact:
        """lr ratio length d / D, rows of d by their factors."""
        if self.old.factors.numel():
            rows = torch.ones(len(self.old.factors), d.value.numel() // len(self.old.factors), dtype=D)
            d = d.times(rows.mul(self.old.factors[:, None]).view_as(d.value))
        length = self.old.lengths if self.old.lengths.numel() else torch.ones(self.old.matrices, dtype=D)
        length = self.old.lines(torch.ones_like(self.g)).mul(length[:, None]).view_as(self.g)
        return d.times(self.inverse(v)).times(self.group[0] * self.old.ratio * length)

    def weight(self, u: Exact) -> Exact:
        w, p = self.old.weight().double(), self.old.program
        lr = 1 if p.decay_independent else self.group[0]
        decay = lr * self.group[1] * (self.old.ratio if p.decay_scaled else 1)
        if p.decay_after:
            return Exact((1 - decay) * (w - u.value), w.abs() + u.terms)
        kept = torch.where(u.value * w >= 0, w, 0) if p.cautious else w
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


def arithmetic(*tensors: Tensor) -> torch.dtype:
    return D if any(t.dtype == D for t in tensors if t.numel()) else F


def assert_step(old: Work, mid: Work, new: Work, table: Table, i: int, line: int, at: Formulas, name: str) -> None:
    """What `update_moments` (from old to mid) and `apply_update` (from mid to new) wrote, and their sums."""
    p, low = old.program, arithmetic(old.grad, old.momentum, old.second, old.input)
    low = arithmetic(torch.empty(1, dtype=low), old.param) if p.whole else low
    assert_rounded_once(mid.momentum, at.momentum(), low, f"{name}: momentum")
    if p.power != "none":
        assert_rounded_once(mid.second, at.second(), low, f"{name}: second moment")
    # From here on with the momentum as it was stored.
    x, v, high = at.input(mid.momentum), at.second().value if p.power != "none" else at.g, low
    if not p.whole:
        assert same_bits(mid.param, old.param), f"{name}: only `apply_update` moves the parameter"
        assert same_bits(mid.mantissa, old.mantissa)
        scaled = x
        if old.input.dtype == H:  # the moments of these tests have no history that bounds them
            scaled = x.times(row(table, i)["input_scale"])
            scaled = replace(scaled, value=scaled.value.clamp(-65504, 65504))
        assert_rounded_once(mid.input, scaled, low, f"{name}: input")
        v, high = mid.second.double(), arithmetic(old.direction, old.second, old.param)
        u = at.update(Exact.of(old.direction.double()), v)
    else:
        u = at.update(x if p.direction == "identity" else Exact.of(x.value.sign()), v)
    assert all(same_bits(getattr(new, key), getattr(mid, key)) for key in ("momentum", "second", "input"))
    units = 1.0 if p.rounding == "stochastic" and old.param.dtype == B else 0.5
    w = at.weight(u)
    assert_rounded_once(new.weight(), w, high, f"{name}: parameter", units)
    m = mid.momentum.double()
    known = x.value * 0 if p.direction == "identity" else x.value  # where the input is the direction, 0
    sums = {"input_sq": known**2, "grad_dot": at.g * m, "momentum_sq": m**2}
    ends = {"update_sq": u.value**2, "param_sq": w.value**2}
    lines = slice(line, line + old.matrices)
    for key, terms in (*sums.items(), *ends.items()):
        assert_sum(table.column(key)[lines], old.lines(terms), low if key in sums else high, f"{name}: {key}")
    largest = old.lines(known.abs()).amax(-1)
    assert torch.allclose(table.column("input_max")[lines], largest, rtol=64 * torch.finfo(low).eps, atol=0), name
    assert torch.equal(table.column("momentum_max")[lines], old.lines(m.abs()).amax(-1)), name


def assert_row(old: Work, at: Formulas, found: dict[str, float], name: str) -> None:
    lr, decay, beta1, beta2, eps = at.group
    p = old.program
    wanted = {
        "finite": 1,
        "grad_sq": at.g.square().sum().item(),
        "grad_max": at.g.abs().max().item(),
        "step": at.t,
        "grad_scale": (-1 if p.maximize else 1) / at.grad_scale,
        "beta1": beta1 * at.begun,
        "one_minus_beta1": 1 - beta1 * at.begun,
        "beta2": beta2 * at.begun,
        "one_minus_beta2": 1 - beta2 * at.begun,
        "read_beta1": beta2 / beta1 if p.interpolated else beta1,
        "one_minus_read_beta1": 1 - (beta2 / beta1 if p.interpolated else beta1),
        "eps": eps,
        "inverse_correction1": 1 / (1 - beta1**at.t) if p.momentum_correction else 1,
        "inverse_correction2": (1 - beta2**at.t) ** (-2 * POWERS[p.power]) if p.second_correction else 1,
        "decay": decay if p.decay_independent else lr * decay,
        "lr": lr,
    }
    assert wanted.keys() | {"input_scale", "largest_taken"} == found.keys()  # the last is the caller's
    for key, value in wanted.items():
        # Squares are added up in the arithmetic of the gradient.
        near = 200 * torch.finfo(arithmetic(old.grad)).eps if key == "grad_sq" else 1e-12
        assert math.isclose(found[key], value, rel_tol=near), f"{name}: {key} is {found[key]}, not {value}"
    assert math.frexp(found["input_scale"])[0] == 0.5, f"{name}: the input's scale is no power of two"


# ---- formulas ------------------------------------------------------------------------------------------------------


def every_program(types: Types) -> dict[str, Work]:
    """With shapes, ways to round, groups, ratios and step lengths that take turns."""
    works = {}
    for turn, (name, program) in enumerate(PROGRAMS.items()):
        program = replace(program, rounding=("nearest", "stochastic", "mantissa")[turn % 3])
        matrices, shape = SHAPES[turn % len(SHAPES)]
        numbers: dict[str, Any] = {"ratio": 0.5 + turn / 8, "group": turn % 2, "scaled": turn % 4 != 0}
        works[name] = make(program, types, shape, matrices, turn, steps=0, **numbers)
    return works


@pytest.mark.parametrize("grad_scale", [None, 24.0])
@pytest.mark.parametrize("types", TYPES, ids=ids)
def test_three_steps_are_the_formulas(types: Types, grad_scale: float | None) -> None:
    named = every_program(types)
    works, names = list(named.values()), list(named)
    table = table_of(works)
    scaling = Scaling(torch.zeros(()), None if grad_scale is None else torch.tensor(grad_scale))
    lines = lines_of(works)
    for t in (1, 2, 3):
        for i, w in enumerate(works):
            w.grad.copy_(gaussian(*w.grad.shape, seed=1000 * t + i))
            w.input.fill_(NAN)
        old = [w.copy() for w in works]
        table.rows.fill_(NAN)
        grad_stats(works, table, scaling)
        assert same_works([replace(w, step=o.step) for w, o in zip(works, old)], old), "no tensor is written"
        assert all(w.step.item() == t for w in works)
        table.sums.fill_(NAN)
        update_moments(works, table)
        mid = [w.copy() for w in works]
        apply_update(works, table)
        for i, name in enumerate(names):
            at = Formulas(old[i], t, grad_scale or 1.0)
            assert_row(old[i], at, row(table, i), name)
            assert_step(old[i], mid[i], works[i], table, i, lines[i], at, f"{name}, step {t}")
            assert all(
                same_bits(getattr(old[i], key), getattr(works[i], key))
                for key in ("grad", "direction", "lengths", "factors")
            )
    assert table.skipped.item() == 0


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("direction", ["given", "identity", "sign"])
def test_nothing_over_nothing_is_nothing(power: Power, inside: bool, direction: Any) -> None:
    """1 / D = 0 where D = 0: eps is 0 and some second moments are."""
    w = make(Program(momentum_correction=True, power=power, eps_inside=inside, direction=direction))
    zero = torch.zeros(w.grad.shape, dtype=torch.bool)
    zero[0, ::2] = True
    for t in (w.grad, w.second):
        t[zero] = 0
    old = w.copy()
    table = take([w], None, PLAIN, groups_of([w], [(0.3, 0.0, 0.4, 0.3, 0.0)]))
    assert bool((w.second[zero] == 0).all())
    assert bool(w.momentum[zero].ne(0).all())
    if direction == "given":
        assert bool((w.input[zero] == 0).all())
        assert bool(w.input[~zero].isfinite().all())
    assert bool(w.param[~zero].ne(old.param[~zero]).all())
    moved = w.param[zero] != old.param[zero]
    assert not moved.any(), "there is no weight decay"
    assert bool(table.sums.isfinite().all())


def test_zero_gradients_leave_a_fresh_state_at_zero() -> None:
    for name, program in PROGRAMS.items():
        w = make(program, (F, B, F, H, F))
        for t in (w.grad, w.momentum, w.second):
            t.zero_()
        table = take([w])
        assert not w.momentum.any(), name
        assert not w.input.any(), name
        assert not table.sums[:, : SUMS.index("update_sq")].any(), name


def test_pieces_of_one_parameter_share_its_row() -> None:
    """Two items of one row, in another order than its lines: each has its own ratio, length and sums."""
    program = PROGRAMS["muadam"]
    whole, pieces = make(program, shape=(6, 8), matrices=2), make(program, shape=(6, 8), matrices=2)
    table, other = take([whole]), table_of([pieces])
    grad_stats([pieces], other)
    items = Items(tuple(Item(program, 0, 1, line, (0, 0, line), 1.0) for line in (1, 0)))
    halves = {name: [t.split(3)[i] for i in (1, 0)] for name, t in pieces.tensors().items() if t.dim() == 2}
    none = [torch.empty(0), torch.empty(0)]
    slots = (halves["grad"], halves["momentum"], halves["second"], halves["input"])
    multi_tensor.update_moments(*slots, none, none, other, items)
    lengths = [pieces.lengths[1:], pieces.lengths[:1]]
    multi_tensor.apply_update(halves["direction"], halves["second"], halves["param"], none, lengths, [], other, items)
    assert same_works([pieces], [whole])
    assert same_bits(other.sums, table.sums)


# ---- the numbers of a step -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 1 - 1e-6, 1 - 1e-9])
@pytest.mark.parametrize("t", [1, 2, 1000, 10**6])
def test_corrections_do_not_cancel(beta: float, t: int) -> None:
    """1 - beta^t to all digits, against 60 of them."""
    programs = [Program(momentum_correction=True, power=power, second_correction=True) for power in POWERS]
    works = [make(program, seed=i, steps=t - 1) for i, program in enumerate(programs)]
    table = table_of(works)
    grad_stats(works, table, PLAIN, groups_of(works, [(0.1, 0.0, beta, beta, 0.0)]))
    with localcontext() as context:
        context.prec = 60
        mass = 1 - Decimal(beta) ** t
        first = [float(1 / mass)] * 3
        second = [float(mass ** (-2 * Decimal(POWERS[power]))) for power in POWERS]
    for column, wanted in (("inverse_correction1", first), ("inverse_correction2", second)):
        torch.testing.assert_close(table.column(column), torch.tensor(wanted, dtype=D), rtol=1e-14, atol=0)
    assert table.column("step").tolist() == [t] * 3
    assert [w.step.item() for w in works] == [t] * 3


def test_a_parameter_that_nobody_counts_is_at_step_1() -> None:
    works = [make(PROGRAMS["sgd"], steps=None), make(PROGRAMS["sgd"], steps=6)]
    table = take(works)
    assert table.column("step").tolist() == [1, 7]


@pytest.mark.parametrize("dtype", [F, D], ids=str)
def test_numbers_in_tensors_are_those_numbers(dtype: torch.dtype) -> None:
    """All ten of two groups; fp32 tensors stand for their own value, not for the float that they came from."""
    works = list(every_program((F, B, F, H, B)).values())
    twins = [w.copy() for w in works]
    numbers = [torch.tensor(number, dtype=dtype) for group in GROUPS for number in group]
    of = [w.group for w in works]
    given = take(works, None, PLAIN, Groups([NAN] * len(numbers), numbers, list(range(len(numbers))), of))
    wanted = take(twins, None, PLAIN, Groups([t.item() for t in numbers], [], [], of))
    assert same_works(works, twins)
    assert same_bits(given.rows, wanted.rows)
    half = table_of(works)
    grad_stats(twins, half, PLAIN, Groups([NAN, *(t.item() for t in numbers[1:])], numbers[:1], [0], of))
    assert half.column("lr").tolist() == wanted.column("lr").tolist()


def test_scaled_gradients_give_the_step_of_the_gradients() -> None:
    """Bit for bit for a power of two; what the gradients were multiplied by is taken out of them and of their norm."""
    works = list(every_program((F, B, F, H, B)).values())
    scaled = [w.copy() for w in works]
    for w in scaled:
        w.grad.mul_(1024)
    wanted, found = take(works), take(scaled, None, Scaling(torch.zeros(()), torch.tensor(1024.0)))
    scale = COLUMNS.index("grad_scale")
    assert same_works([replace(w, grad=w.grad / 1024) for w in scaled], works)
    assert torch.equal(found.rows[:, scale] * 1024, wanted.rows[:, scale])
    assert same_bits(
        found.rows.index_fill(1, torch.tensor(scale), 0), wanted.rows.index_fill(1, torch.tensor(scale), 0)
    )
    assert same_bits(found.sums, wanted.sums)


def test_ascent_is_descent_of_the_opposite() -> None:
    works = list(every_program((F, B, F, H, B)).values())
    up = [w.copy() for w in works]
    for w in up:
        w.grad.neg_()
        w.program = replace(w.program, maximize=not w.program.maximize)
    take(works)
    take(up)
    assert same_works([replace(w, grad=-w.grad) for w in up], works)


@pytest.mark.parametrize("types", TYPES, ids=ids)
def test_moments_now_and_inputs_later(types: Types) -> None:
    """Without inputs `update_moments` updates the state alone; frozen, it makes of it what one call makes."""
    given = {name: program for name, program in PROGRAMS.items() if not program.whole and not program.frozen_moments}
    once = [make(program, types, seed=i) for i, program in enumerate(given.values())]
    once[0].grad[0, 0] = NAN
    early = [w.copy() for w in once]
    wanted, table = table_of(once), table_of(early)
    grad_stats(once, wanted)
    update_moments(once, wanted)
    grad_stats(early, table)
    update_moments([replace(w, input=torch.empty(0)) for w in early], table)
    assert same_works([replace(w, input=o.input) for w, o in zip(early, once)], once)
    assert all(w.input.isnan().all() for w in early)
    assert same_bits(table.sums, wanted.sums)
    for w in early:
        w.program = replace(w.program, frozen_moments=True)
    update_moments(early, table)
    if types[2] == (D if D in types[:4] else F):  # else the second moment was rounded in between
        assert same_works([replace(w, program=o.program) for w, o in zip(early, once)], once)
        assert same_bits(table.sums, wanted.sums)
    for w, o in zip(early, once):
        assert all_same_bits((w.momentum, w.second, w.param), (o.momentum, o.second, o.param))
    assert not early[0].input.any()


# ---- deciding apart from measuring ---------------------------------------------------------------------------------


def measure(works: Sequence[Work], table: Table, scaling: Scaling = PLAIN) -> None:
    numbers = [w.program.packed() for w in works], lines_of(works), groups_of(works)
    multi_tensor.grad_stats([w.grad for w in works], [w.step for w in works], table, *numbers, scaling, decide=False)


def decide_steps(works: Sequence[Work], table: Table, scaling: Scaling = PLAIN) -> None:
    numbers = [w.program.packed() for w in works], lines_of(works), groups_of(works)
    multi_tensor.decide_steps([w.step for w in works], table, *numbers, scaling)


@pytest.mark.parametrize("types", [(F, B, F, H, B), (D, D, D, D, D)], ids=ids)
@pytest.mark.parametrize("scaling", [PLAIN, Scaling(torch.zeros(()), torch.tensor(24.0)), Scaling(torch.ones(()))])
def test_measuring_and_deciding_are_one_call(types: Types, scaling: Scaling) -> None:
    works = list(every_program(types).values())
    works[2].grad.view(-1)[-1] = NAN
    apart = [w.copy() for w in works]
    wanted, table = table_of(works), table_of(apart)
    for each in (wanted, table):
        each.column("largest_taken")[3] = 0.1  # of noise, which has larger entries
    table.rows[:, :-1].fill_(NAN)  # all but what the caller says
    grad_stats(works, wanted, scaling)
    assert wanted.column("finite")[3] == 0
    old = [w.copy() for w in apart]
    measure(apart, table, scaling)
    assert same_bits(table.rows[:, :3], wanted.rows[:, :3])
    assert bool(table.rows[:, 3:-1].isnan().all())
    assert table.skipped.item() == 0
    assert same_works(apart, old)
    decide_steps(apart, table, scaling)
    assert same_works(apart, works)
    assert same_bits(table.rows, wanted.rows)
    assert table.skipped.item() == wanted.skipped.item() > 0 or scaling.found_inf is None


def test_ranks_decide_together() -> None:
    """What is measured of the halves of a gradient, reduced, is what is measured of all of it."""
    for bad in (1.0, NAN, INF):
        whole = make(PROGRAMS["muadam"], shape=(6, 8))
        whole.grad[4, 3] = bad
        ranks = [replace(whole.copy(), grad=half) for half in whole.grad.split(3)]
        wanted, tables = table_of([whole]), [table_of([rank]) for rank in ranks]
        grad_stats([whole], wanted)
        for rank, table in zip(ranks, tables):
            measure([rank], table)
            largest = max(t.column("momentum_max").max() for t in (*tables, wanted))
            table.column("momentum_max").fill_(largest)
        rows = torch.stack([table.rows[:, :3] for table in tables])
        together = torch.stack([rows[..., 0].amin(0), rows[..., 1].sum(0), rows[..., 2].amax(0)], dim=-1)
        for rank, table in zip(ranks, tables):
            table.rows[:, :3] = together
            decide_steps([rank], table)
            torch.testing.assert_close(table.rows, wanted.rows, rtol=1e-5, atol=0, equal_nan=True)
            assert rank.step.item() == whole.step.item() == (bad == 1)
            assert table.skipped.item() == (bad != 1)


# ---- layouts -------------------------------------------------------------------------------------------------------

#: Views of a row of 336 numbers, in shapes that the views share; no multiple of any vector's width.
LAYOUTS: dict[str, tuple[int, View]] = {
    "contiguous": (1, lambda t: t[:287].view(7, 41)),
    "transposed": (1, lambda t: t[:287].view(7, 41).mT),
    "channels last": (1, lambda t: t[:210].view(2, 5, 7, 3).permute(0, 3, 1, 2)),
    "row slice": (1, lambda t: t[:240].view(12, 20)[1:9, 3:16]),
    "every other": (1, lambda t: t[:301:2]),
    "permuted": (1, lambda t: t.view(2, 6, 4, 7)[:, ::2].permute(3, 1, 0, 2)),
    "misaligned": (1, lambda t: t[1:200]),
    "one": (1, lambda t: t[:1]),
    "scalar": (1, lambda t: t[3]),
    "matrices transposed": (4, lambda t: t.view(4, 12, 7).mT),
    "matrices between": (3, lambda t: t[:315].view(5, 3, 21).transpose(0, 1)),
    "matrices sliced": (2, lambda t: t.view(4, 12, 7)[1:3, ::3, 1:]),
}


def laid_out(program: Program, layout: str, types: Types, which: Sequence[bool]) -> Work:
    matrices, view = LAYOUTS[layout]
    views: list[View] = [view if chosen else lambda t: view(t).clone(memory_format=CONTIGUOUS) for chosen in which]
    return make(program, types, (336,), matrices, views=views)


#: Which of gradient, momentum, second moment and parameter lie that way; inputs and directions are stacks of matrices.
MIXTURES = {
    "all": (True, True, True, False, True),
    "all but the gradient": (False, True, True, False, True),
    "the gradient": (True, False, False, False, False),
    "the moments": (False, True, True, False, False),
    "the parameter": (False, False, False, False, True),
}


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_changes_no_bit(layout: str, mixture: str) -> None:
    """Of any tensor; sums may be added up in another order of the same elements."""
    works = []
    for turn, program in enumerate(PROGRAMS.values()):
        for mode in ("nearest", "mantissa"):
            types = ((F, B, F, H, B), (B, F, F, B, F), (F, F, F, F, B))[turn % 3]
            works.append(laid_out(replace(program, rounding=mode), layout, types, MIXTURES[mixture]))
    copies = [w.contiguous() for w in works]
    found, wanted = take(works), take(copies)
    assert same_works(works, copies)
    torch.testing.assert_close(found.sums, wanted.sums, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_changes_no_random_bit(layout: str, mixture: str) -> None:
    programs = [replace(PROGRAMS[name], rounding="stochastic") for name in ("muadam", "adamw")]
    works = [laid_out(program, layout, (F, F, F, B, B), MIXTURES[mixture]) for program in programs]
    copies = [w.contiguous() for w in works]
    take(works)
    take(copies)
    assert same_works(works, copies)


@pytest.mark.parametrize("name", ["muadam", "adamw"])
def test_random_bits_are_those_of_the_part(name: str) -> None:
    """`Rounding` of the fp32 weight, which a mantissa keeps, over several chunks of several matrices."""
    makers = [replace(PROGRAMS[name], rounding=mode) for mode in ("mantissa", "stochastic")]
    exact, rounded = (make(program, (F, F, F, B, B), (2, CHUNK + 7), 2, steps=3) for program in makers)
    exact.mantissa.zero_()
    take([exact])
    take([rounded])
    wanted, _ = Rounding("stochastic").store(exact.weight(), B, torch.tensor(4.0), (0, 0, 0))
    assert same_bits(rounded.param, wanted)
    assert not same_bits(rounded.param, exact.weight().to(B))


def test_what_lies_between_the_elements_stays() -> None:
    """Of tensors that are slices of larger ones."""
    room = torch.full((4, 6, 8), 7.0)
    w = make(PROGRAMS["muadam"], shape=(4, 3, 4), matrices=4)
    w.param = room[:, ::2, 1:5].copy_(w.param)
    old = w.param.clone()
    take([w])
    assert bool((w.param != old).all())
    room[:, ::2, 1:5] = 7.0
    assert bool((room == 7).all())


# ---- sums ----------------------------------------------------------------------------------------------------------


def long_works() -> list[Work]:
    """Items of one chunk, of many, and of several matrices of some chunks each."""
    shapes = ((1, (9 * CHUNK + 5,)), (1, (CHUNK,)), (2, (2, CHUNK + 7)), (3, (3, 2 * CHUNK)), (1, (CHUNK + 1,)))
    names = ("muadam", "adamw", "nesterov", "sixth", "sgd")
    return [
        make(PROGRAMS[name], (F, B, F, H, B), shape, matrices, i)
        for i, (name, (matrices, shape)) in enumerate(zip(names, shapes))
    ]


def test_tensors_of_many_chunks() -> None:
    works = long_works()
    old, table = [w.copy() for w in works], table_of(works)
    grad_stats(works, table)
    update_moments(works, table)
    mid = [w.copy() for w in works]
    apply_update(works, table)
    for i, (w, line) in enumerate(zip(works, lines_of(works))):
        at = Formulas(old[i], 1)
        assert_row(old[i], at, row(table, i), f"item {i}")
        assert_step(old[i], mid[i], w, table, i, line, at, f"item {i}")


VECTORS = """
import sys
sys.path[:0] = sys.argv[1:]
import torch
import test_multi_tensor as tests
for types in tests.TYPES:
    tests.test_three_steps_are_the_formulas(types, None)
tests.test_tensors_of_many_chunks()
works = tests.long_works()
table = tests.table_of(works)
tests.grad_stats(works, table)
print(table.rows.view(torch.int64).tolist())
"""


@pytest.mark.slow
def test_narrower_vectors_are_the_formulas_too() -> None:
    """What ATEN_CPU_CAPABILITY allows; by "default" what processors run that are no x86 or have no AVX2. Sums are kept
    in as many parts as a vector has lanes, so that their last bits tell whether it was heeded."""
    folder, results = Path(__file__).parent, []
    for capability in ("default", "avx2"):
        command = [sys.executable, "-c", VECTORS, str(folder), str(folder.parent)]
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        results.append(done.stdout)
    assert (results[0] != results[1]) == torch.cpu._is_avx2_supported()


def test_counters_are_zero_between_ops() -> None:
    """One number for each gradient or matrix, at the beginning of the scratch memory, counts the chunks that are done.

    What one op leaves among the counters of the next keeps that one's last block from adding up its sums.
    """
    works = [*long_works(), make(PROGRAMS["muadam"], shape=(40, 6, 4), matrices=40)]
    table = table_of(works)
    assert len(table.sums) > len(works)
    table.scratch[len(table.sums) :] = NAN
    for op in (grad_stats, update_moments, apply_update):
        op(works, table)
        assert not table.scratch[: len(table.sums)].any(), op.__name__


def test_threads_and_repetitions_change_no_bit() -> None:
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            works = long_works()
            table = table_of(works)
            for _ in range(2):
                take(works, table)
            results.append((works, table))
    finally:
        torch.set_num_threads(threads)
    (works, table), *others = results
    for again, other in others:
        assert same_works(again, works)
        assert same_bits(other.rows, table.rows)
        assert same_bits(other.sums, table.sums)


def test_items_do_not_see_their_neighbours() -> None:
    """Each alone gives the bits that it has among the others."""
    together = list(every_program((F, B, F, H, B)).values())
    alone = [w.copy() for w in together]
    for w in (*together, *alone):
        w.program = replace(w.program, rounding="nearest")  # random bits are the place's
    table = take(together)
    rows, sums = zip(*((each.rows, each.sums) for each in (take([w]) for w in alone)))
    assert same_works(alone, together)
    assert same_bits(torch.cat(rows), table.rows)
    assert same_bits(torch.cat(sums), table.sums)


# ---- steps that are not taken --------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 3, -1])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("types", [(F, B, F, H, B), (B, F, F, B, F), (D, D, D, D, D), (H, H, F, F, H)], ids=ids)
def test_gradients_that_are_not_finite_are_isolated(types: Types, bad: float, at: int) -> None:
    ours, clean = (list(every_program(types).values()) for _ in range(2))
    tables = table_of(ours), table_of(clean)
    for works, table in zip((ours, clean), tables):
        take(works, table)  # so that there are sums to keep
        for w in works:
            w.input.fill_(NAN)
    bad_ones = [i for i in range(len(ours)) if i % 3 == 0]
    for i in bad_ones:
        ours[i].grad.view(-1)[at if ours[i].grad.numel() > 3 else 0] = bad
    old, sums = [w.copy() for w in ours], tables[0].sums.clone()
    grad_stats(ours, tables[0])
    update_moments(ours, tables[0])
    for i in bad_ones:
        ours[i].direction.fill_(NAN)
        old[i].direction.fill_(NAN)
    apply_update(ours, tables[0])
    take(clean, tables[1])
    assert tables[0].skipped.item() == len(bad_ones)
    lines = lines_of(ours)
    for i, w in enumerate(ours):
        own = slice(lines[i], lines[i + 1])
        if i in bad_ones:
            assert same_works([w], [replace(old[i], input=torch.zeros_like(w.input))])
            assert same_bits(tables[0].sums[own], sums[own])
            assert row(tables[0], i)["finite"] == 0
            assert row(tables[0], i)["step"] == 1
        else:
            assert same_works([w], [clean[i]])
            assert same_bits(tables[0].sums[own], tables[1].sums[own])
            assert same_bits(tables[0].rows[i], tables[1].rows[i])


def test_found_inf_stops_everything() -> None:
    works = list(every_program((F, B, F, H, B)).values())
    table = table_of(works)
    take(works, table)
    old, sums = [w.copy() for w in works], table.sums.clone()
    take(works, table, Scaling(torch.ones(()), torch.tensor(8.0)))
    assert same_works(works, [replace(w, input=torch.zeros_like(w.input)) for w in old])
    assert same_bits(table.sums, sums)
    assert table.skipped.item() == len(works)
    assert not table.column("finite").any()
    take(works, table, Scaling(torch.zeros(()), torch.tensor(8.0)))
    assert table.skipped.item() == len(works), "counted once"
    assert all(w.step.item() == 2 for w in works)


def test_a_gradient_whose_square_overflows_is_finite() -> None:
    w = make(PROGRAMS["nesterov"], (F, F, F, H, F))
    w.grad.view(-1)[5] = 3e38
    table = take([w])
    assert row(table, 0)["finite"] == 1
    assert row(table, 0)["grad_max"] == w.grad.max().item()
    assert bool(w.input.isfinite().all())
    assert bool(w.param.isfinite().all())


@pytest.mark.parametrize("types", [(F, F, F, H, F), (D, D, D, D, D)], ids=ids)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_gradient_larger_than_the_caller_takes_is_no_step(types: Types, scale: float) -> None:
    """The limit is of the unscaled gradient's largest magnitude, which may be as large; none, 0, is none."""
    works = [make(PROGRAMS["muadam"], types) for _ in range(4)]
    table, old = table_of(works), [w.copy() for w in works]
    largest = max(float(g) for g in works[0].grad.double().abs().flatten()) / scale
    limits = [0.0, largest, largest * (1 - 2.0**-20), 0.5 * largest]
    table.column("largest_taken").copy_(torch.tensor(limits, dtype=D))
    take(works, table, Scaling(None, torch.tensor(scale)))
    assert table.column("finite").tolist() == [1, 1, 0, 0]
    assert table.column("largest_taken").tolist() == limits
    assert table.skipped.item() == 2
    stayed = [torch.equal(w.param, before.param) for w, before in zip(works, old, strict=True)]
    assert stayed == [False, False, True, True]


# ---- the scale of an fp16 input ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class History:
    """A program, its numbers (a group), the momentum's dtype and, step by step, a gradient's size and its shape."""

    program: Program
    numbers: tuple[float, ...]
    momentum: torch.dtype
    gradients: list[tuple[float, int]]


@st.composite
def histories(draw: st.DrawFn, largest: int, spread: int) -> History:
    """Gradients of 10^-largest to 10^largest, those of one history within 10^spread of one another at both ends."""
    how = draw(st.sampled_from(["heavy_ball", "nesterov", "momentum_correction", "both", "ema", "interpolated"]))
    power: Power = "none" if how == "interpolated" else draw(st.sampled_from(["none", *POWERS]))
    total, first = draw(st.booleans()), how in ("nesterov", "ema") and draw(st.booleans())
    program = Program(
        heavy_ball=how in ("heavy_ball", "both"),
        nesterov=how in ("nesterov", "both", "interpolated"),
        momentum_correction=how == "momentum_correction",
        power=power,
        sum=total,
        second_correction=not (total or first) and draw(st.booleans()),
        eps_inside=draw(st.booleans()),
        start_first=first,
        interpolated=how == "interpolated",
    )
    betas = [(0.5, 0.9) if program.interpolated else (0.0, 0.5), (0.9, 0.999), (0.95, 0.95), (0.99, 0.999)]
    if program.momentum_correction or program.second_correction or first:  # else 1 - beta2 alone bounds nothing
        betas += [(0.9, 0.81), (0.95, 0.9)]
    eps = draw(st.sampled_from([0.0, 1e-8, 1e-16]))
    size = draw(st.integers(-largest, largest))
    sizes = st.just(size) | st.integers(max(size - spread, -largest), min(size + spread, largest))
    gradients = draw(st.lists(st.tuples(sizes.map(lambda k: 10.0**k), st.integers(0, 3)), min_size=1, max_size=12))
    return History(program, (0.1, 0.0, *draw(st.sampled_from(betas)), eps), draw(st.sampled_from([F, B])), gradients)


def spiky(size: float, seed: int) -> Tensor:
    """Gradients of one size: all entries, one of them, the same one, or of many magnitudes below it."""
    shapes = (
        gaussian(4, 6, seed=seed),
        torch.eye(4, 6, dtype=D),
        torch.ones(4, 6, dtype=D),
        torch.logspace(-8, 0, 24, dtype=D).view(4, 6),
    )
    return (shapes[seed] / shapes[seed].abs().max() * size).float()


def inputs(history: History) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Step by step the fp16 input, the fp32 input and the power of two that should lie between them."""
    works = [make(history.program, (F, history.momentum, F, into, F), (4, 6)) for into in (H, F)]
    for w in works:
        w.momentum.zero_()
        w.second.zero_()
    table = table_of(works)
    for size, shape in history.gradients:
        for w in works:
            w.grad.copy_(spiky(size, shape))
        grad_stats(works, table, PLAIN, groups_of(works, [history.numbers]))
        update_moments(works, table)
        scale = row(table, 0)["input_scale"]
        assert row(table, 1)["input_scale"] == scale
        assert math.frexp(scale)[0] == 0.5, "a power of two"
        yield works[0].input, works[1].input, scale


@pytest.mark.parametrize("size", [1e-36, 1e-38, 1e-40, 1e-42, 1e-44])
def test_an_fp16_input_of_subnormal_numbers_keeps_its_digits(size: float) -> None:
    """The least fp32, 2^-149, times the largest power of two, 2^127, is a number that fp16 holds."""
    for narrow, wide, scale in inputs(History(Program(), (0.1, 0.0, 0.5, 0.95, 0.0), F, [(size, 2)])):
        scaled = wide.double() * scale
        assert scaled.any()
        assert ((narrow.double() - scaled).abs() <= 2.0**-11 * scaled.abs()).all()


@MORE
@given(histories(largest=30, spread=60))
@example(History(Program(heavy_ball=True), (0.1, 0.0, 0.95, 0.95, 0.0), F, [(1e30, 2)] * 4))
@example(History(Program(power="quarter"), (0.1, 0.0, 0.95, 0.9, 1e-8), F, [(1e-8, 0), (1e17, 2)]))
def test_an_fp16_input_does_not_overflow(history: History) -> None:
    """It is the fp32 input times the power of two: the clamp at the end of fp16 is never reached."""
    for narrow, wide, scale in inputs(history):
        scaled = wide.double() * scale
        assert scaled.abs().max() < 65504
        assert same_bits(narrow, scaled.half())


@MORE
@given(histories(largest=15, spread=2))
def test_an_fp16_input_is_not_lost(history: History) -> None:
    """Gradients that do not change by more than 10^2 leave its largest entry far above the smallest fp16 number."""
    for narrow, wide, _ in inputs(history):
        assert bool(narrow.any()) == bool(wide.any())
        if wide.any():
            assert narrow.abs().max() > 2.0**-14, "the smallest of fp16 with all its digits"


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("t", [1000, 30000])
def test_an_fp16_input_is_not_lost_in_a_long_run(t: int, power: Power) -> None:
    """Where beta1^2 > beta2, what history bounds grows as (beta1^2 / beta2)^(t / 2); eps bounds it as well."""
    program = Program(momentum_correction=True, power=power, second_correction=True, eps_inside=True)
    w = make(program, (F, F, F, H, F), steps=t - 1)
    table = table_of([w])
    grad_stats([w], table, PLAIN, groups_of([w], [(0.1, 0.0, 0.95, 0.9, 1e-8)]))
    update_moments([w], table)
    assert 2.0**-14 < w.input.abs().max() < 65504


# ---- contracts -----------------------------------------------------------------------------------------------------


def test_autograd_sees_what_is_written() -> None:
    works = [make(replace(PROGRAMS[name], rounding="mantissa"), (F, B, F, H, B)) for name in ("muadam", "adamw")]
    given, whole = works
    table = table_of(works)

    def versions(w: Work) -> dict[str, int]:
        return {name: t._version for name, t in w.tensors().items()}

    def moved(op: Callable[[], None]) -> tuple[set[str], set[str]]:
        old = versions(given), versions(whole)
        op()
        a, b = ({k for k, v in versions(w).items() if v > o[k] and getattr(w, k).numel()} for w, o in zip(works, old))
        return a, b

    grad_stats(works, table)
    # Parameters alone: no graph holds the state.
    assert moved(lambda: update_moments(works, table)) == (set(), {"param"})
    assert moved(lambda: apply_update(works, table)) == ({"param"}, set())


def test_what_autograd_saved_is_guarded() -> None:
    w = make(PROGRAMS["sgd"])
    x = torch.ones(w.param.shape, requires_grad=True)
    y = (x * w.param).sum()
    with torch.inference_mode():
        w.momentum = w.momentum.clone()  # has no version
    take([w])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_parameters_that_require_grad() -> None:
    w, twin_ = make(PROGRAMS["sgd"]), make(PROGRAMS["sgd"])
    w.param = torch.nn.Parameter(w.param)
    take([w])
    take([twin_])
    assert torch.equal(w.param.detach(), twin_.param)
    assert w.param.is_leaf


def test_lists_without_elements_are_all_absent() -> None:
    works = [make(PROGRAMS[name], scaled=False, steps=None) for name in ("nesterov", "heavy ball")]
    twins = [w.copy() for w in works]
    table, other = take(works), table_of(twins)
    grads, momenta, inputs, directions, params = (
        [getattr(w, name) for w in twins] for name in ("grad", "momentum", "input", "direction", "param")
    )
    packed, items = [w.program.packed() for w in twins], items_of(twins, range(2))
    multi_tensor.grad_stats(grads, [], other, packed, lines_of(twins), groups_of(twins))
    multi_tensor.update_moments(grads, momenta, [], inputs, [], [], other, items)
    multi_tensor.apply_update(directions, [], params, [], [], [], other, items)
    assert same_works(twins, works)
    assert same_bits(other.sums, table.sums)


VIEWS: dict[str, list[View]] = {
    "contiguous": [lambda t: t] * 5,
    "strided": [*[lambda t: t.mT.contiguous().mT] * 3, lambda t: t, lambda t: t.mT.contiguous().mT],
}


def test_inputs_and_directions_may_have_a_shape_of_their_own() -> None:
    """A stack of matrices, whatever the dimensions of the parameter."""
    works = [make(PROGRAMS["muadam"], shape=(4, 3, 4), matrices=4, views=VIEWS[name]) for name in VIEWS]
    twins = [w.copy() for w in works]
    for w in twins:
        w.input, w.direction = w.input.reshape(2, 24), w.direction.reshape(48)
    take(works)
    take(twins)
    for w, other in zip(works, twins):
        assert same_works([replace(other, input=other.input.view(4, 3, 4), direction=w.direction)], [w])


def test_no_tensors() -> None:
    table = take([])
    assert table.rows.shape == (0, len(COLUMNS))


Arguments = dict[str, Any]


def arguments(works: Sequence[Work]) -> dict[str, Arguments]:
    """Of the three ops, by the names in their schemas."""
    table, given = table_of(works), [i for i, w in enumerate(works) if not w.program.whole]
    groups, absent, no_mantissa = groups_of(works), torch.empty(0), torch.empty(0, dtype=torch.int16)
    names = ("programs", "row_of", "matrices", "first_sums", "places", "ratios")
    every = dict(zip(names, items_of(works, range(len(works))).numbers))
    some = dict(zip(names, items_of(works, given).numbers))
    stats = {
        "grads": [w.grad for w in works],
        "steps": [w.step for w in works],
        "rows": table.rows,
        "sums": table.sums,
        "skipped": table.skipped,
        "scratch": table.scratch,
        "programs": every["programs"],
        "first_sums": lines_of(works),
        "hyper_of": groups.of,
        "hyper": groups.values,
        "tensors": [torch.tensor(0.05)],
        "tensor_at": [0],
        "found_inf": torch.zeros(()),
        "grad_scale": torch.ones(()),
        "decide": True,
    }
    decision = {k: v for k, v in stats.items() if k not in ("grads", "scratch", "found_inf", "decide")}
    memory = {"rows": table.rows, "sums": table.sums, "scratch": table.scratch}
    first = {
        "grads": [w.grad for w in works],
        "momenta": [w.momentum for w in works],
        "seconds": [w.second for w in works],
        "inputs": [w.input for w in works],
        "params": [w.param if w.program.whole else absent for w in works],
        "mantissas": [w.mantissa if w.program.whole else no_mantissa for w in works],
    }
    last = {
        "directions": [works[i].direction for i in given],
        "seconds": [works[i].second for i in given],
        "params": [works[i].param for i in given],
        "mantissas": [works[i].mantissa for i in given],
        "lengths": [works[i].lengths for i in given],
        "factors": [works[i].factors for i in given],
    }
    return {
        "grad_stats": stats,
        "decide_steps": decision,
        "update_moments": {**first, **memory, **every},
        "apply_update": {**last, **memory, **some},
    }


def call(op: str, given: Arguments) -> None:
    getattr(torch.ops.steepest, op)(*given.values())


def test_names_are_those_of_the_schemas() -> None:
    for op, named in arguments(list(every_program(TYPES[0]).values())).items():
        schema = getattr(torch.ops.steepest, op).default._schema
        assert list(named) == [argument.name for argument in schema.arguments]


def moved(given: dict[str, Arguments], device: str) -> dict[str, Arguments]:
    """The arguments of all ops on a device; what they share they go on sharing."""
    there: dict[int, Tensor] = {}

    def move(value: Any) -> Any:
        if isinstance(value, list):
            return [move(each) for each in value]
        if not isinstance(value, Tensor):
            return value
        if id(value) not in there:
            there[id(value)] = value.to(device)
        return there[id(value)]

    return {op: {name: move(value) for name, value in each.items()} for op, each in given.items()}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("op", ["grad_stats", slow("decide_steps"), slow("update_moments"), "apply_update"])
@pytest.mark.parametrize("types", [TYPES[1], *map(slow, TYPES[2:5])], ids=ids)
def test_opcheck(types: Types, op: str, device: str) -> None:
    works = list(every_program(types).values())
    measures = op in ("grad_stats", "decide_steps")
    if not measures:
        for w in works:
            w.input.zero_()  # NaN is not equal to itself where opcheck compares
    given = moved(arguments(works), device)
    if not measures:
        call("grad_stats", given["grad_stats"])
    torch.library.opcheck(getattr(torch.ops.steepest, op).default, tuple(given[op].values()))


def test_traces_without_a_host_read() -> None:
    with FakeTensorMode():
        works = []
        for program in (PROGRAMS["muadam"], PROGRAMS["adamw"]):
            names = ("grad", "momentum", "second", "input", "direction", "param", "mantissa", "lengths", "factors")
            slots: dict[str, Any] = {
                name: torch.empty(3, 4, dtype=dtype) for name, dtype in zip(names, (F, B, F, H, H, F))
            }
            absent: dict[str, Any] = {name: torch.empty(0) for name in names[6:]}
            works.append(Work(program, 1, **slots, **absent, step=torch.zeros(())))
        table = take(works)
        assert [w.param.shape for w in works] == [(3, 4), (3, 4)]
        assert table.rows.shape == (2, len(COLUMNS))


# ---- errors ---------------------------------------------------------------------------------------------------------

EMPTY, SIX = torch.empty(0), torch.zeros(3, 3, 3, 3, 3, 3)
Change = Callable[[Arguments], object]


def put(name: str, value: object, at: int | None = None) -> Change:
    """An argument, or one element of a list, replaced."""

    def change(given: Arguments) -> None:
        given[name] = value if at is None else [*given[name][:at], value, *given[name][at + 1 :]]

    return change


def shorter(name: str) -> Change:
    return lambda given: put(name, given[name][:-1])(given)


def strided(given: Arguments) -> None:
    """All tensors of the first item are slices of six dimensions; a direction is contiguous."""
    for name in ("grads", "momenta", "seconds", "params", "inputs", "directions"):
        if name in given and given[name][0].numel():
            cut = SIX.clone()[::2, ::2, ::2, ::2, ::2, ::2]
            given[name][0] = cut.contiguous() if name in ("inputs", "directions") else cut


def programs(**program: Any) -> Change:
    return put("programs", Program(**program).packed(), 0)


#: op, change of its arguments, message. Items are those of `three`.
ERRORS: dict[str, tuple[str, Change, str]] = {
    "rows, width": (
        "grad_stats",
        put("rows", torch.zeros(3, 3, dtype=D)),
        "rows must be a contiguous float64 table of 18",
    ),
    "rows, dtype": (
        "update_moments",
        put("rows", torch.zeros(2, 18)),
        "rows must be a contiguous float64 table of 18 columns",
    ),
    "rows, lines": ("grad_stats", put("rows", torch.zeros(2, 18, dtype=D)), "rows has 2 elements; it goes by 3"),
    "sums, width": (
        "apply_update",
        put("sums", torch.zeros(4, 6, dtype=D)),
        "sums must be a contiguous float64 table of 7",
    ),
    "sums, strided": (
        "grad_stats",
        put("sums", torch.zeros(7, 3, dtype=D).mT),
        "sums must be a contiguous float64 table of 7 columns",
    ),
    **{
        f"{op}, {name}": (op, shorter(name), f"{name} has {{found}} elements; it goes by {{wanted}}")
        for op, names in {
            "grad_stats": ("steps", "programs", "hyper_of", "first_sums", "tensor_at"),
            "decide_steps": ("steps", "hyper_of", "first_sums", "tensor_at"),
            "update_moments": (
                "momenta",
                "seconds",
                "inputs",
                "params",
                "mantissas",
                "row_of",
                "matrices",
                "places",
                "ratios",
            ),
            "apply_update": (
                "directions",
                "seconds",
                "mantissas",
                "lengths",
                "factors",
                "row_of",
                "matrices",
                "first_sums",
                "ratios",
            ),
        }.items()
        for name in names
    },
    "skipped, dtype": ("grad_stats", put("skipped", torch.zeros(())), "skipped must be one int64 number"),
    "skipped, two": (
        "grad_stats",
        put("skipped", torch.zeros(2, dtype=torch.int64)),
        "skipped must be one int64 number",
    ),
    "scratch, short": (
        "grad_stats",
        put("scratch", torch.zeros(3, dtype=D)),
        "scratch must be a contiguous float64 tensor",
    ),
    "scratch, dtype": (
        "update_moments",
        put("scratch", torch.zeros(99)),
        "scratch must be a contiguous float64 tensor",
    ),
    "scratch, strided": (
        "apply_update",
        put("scratch", torch.zeros(99, dtype=D)[::2]),
        "scratch must be a contiguous float64",
    ),
    "number, dtype": (
        "grad_stats",
        put("tensors", torch.zeros((), dtype=B), 0),
        "tensors[0] must be one float32 or float64",
    ),
    "number, two": (
        "grad_stats",
        put("tensors", torch.zeros(2), 0),
        "tensors[0] must be one float32 or float64 number",
    ),
    "number, place": (
        "grad_stats",
        put("tensor_at", [10]),
        "tensors[0] must be one float32 or float64 number that takes a",
    ),
    "number, before": (
        "grad_stats",
        put("tensor_at", [-1]),
        "tensors[0] must be one float32 or float64 number that takes",
    ),
    "grads, complex": (
        "grad_stats",
        put("grads", torch.zeros(3, dtype=torch.complex64), 0),
        "grads[0] is ComplexFloat; accepted are float32, bfloat16 and float16, on the CPU float64 as well",
    ),
    "grads, integer": (
        "grad_stats",
        put("grads", torch.zeros(3, dtype=torch.int32), 1),
        "grads[1] is Int; accepted are",
    ),
    "grads, empty": ("grad_stats", put("grads", EMPTY, 1), "grads[1] has no elements; leave it out"),
    "grads, strided": ("grad_stats", strided, "the tensors of item 0 need more than 4 strided dimensions; make them"),
    "steps, dtype": ("grad_stats", put("steps", torch.zeros((), dtype=D), 1), "steps[1] must be one float32 number"),
    "steps, two": ("grad_stats", put("steps", torch.zeros(2), 0), "steps[0] must be one float32 number"),
    "lines, beyond": (
        "grad_stats",
        put("first_sums", 5, 3),
        "first_sums[2] names lines that the table of sums does not",
    ),
    "lines, falling": (
        "grad_stats",
        put("first_sums", 0, 2),
        "first_sums[1] names lines that the table of sums does",
    ),
    "lines, negative": ("grad_stats", put("first_sums", -1, 0), "first_sums[0] names lines that the table of sums"),
    "program": ("grad_stats", put("programs", 1 << 20, 1), "programs[1] is 1048576, which is no program"),
    "program, decay": (
        "apply_update",
        put("programs", Program(cautious=True).packed() | Program(decay_after=True).packed(), 0),
        "which is no program",
    ),
    "first, not counted": (
        "grad_stats",
        lambda given: (put("steps", EMPTY, 1)(given), put("programs", PROGRAMS["first"].packed(), 1)(given)),
        "programs[1] begins with the first gradient, which steps[1] must count",
    ),
    "first, nobody counts": (
        "decide_steps",
        lambda given: (put("steps", [])(given), put("programs", PROGRAMS["first"].packed(), 0)(given)),
        "programs[0] begins with the first gradient, which steps[0] must count",
    ),
    "group": ("grad_stats", put("hyper_of", 2, 1), "hyper_of[1] is 2; hyper holds 5 numbers for each group"),
    "group, negative": (
        "grad_stats",
        put("hyper_of", -1, 0),
        "hyper_of[0] is -1; hyper holds 5 numbers for each group",
    ),
    "found_inf": ("grad_stats", put("found_inf", torch.zeros((), dtype=D)), "found_inf must be one float32 number"),
    "grad_scale": ("grad_stats", put("grad_scale", torch.ones(2)), "grad_scale must be one float32 number"),
    "shapes": ("update_moments", put("momenta", torch.zeros(8, 3), 0), "the tensors of item 0 differ in shape"),
    "shapes, after": ("apply_update", put("seconds", torch.zeros(8, 3), 0), "the tensors of item 0 differ in shape"),
    "elements": (
        "update_moments",
        put("inputs", torch.zeros(2, 6), 0),
        "the tensors of item 0 have 24 and 12 elements",
    ),
    "integer": (
        "update_moments",
        put("momenta", torch.zeros(3, 8, dtype=torch.int64), 0),
        "momenta[0] is Long; accepted are",
    ),
    "int16": (
        "update_moments",
        put("momenta", torch.zeros(3, 8, dtype=torch.int16), 0),
        "momenta[0] must be floating-point, and mantissas int16",
    ),
    "mantissa, dtype": (
        "apply_update",
        put("mantissas", torch.zeros(3, 8), 0),
        "mantissas[0] must be floating-point, and mantissas int16",
    ),
    "mantissa, param": (
        "apply_update",
        put("mantissas", torch.zeros(3, 8, dtype=torch.int16), 0),
        "item 0 has a mantissa; only a bfloat16 param keeps one",
    ),
    "overlap": (
        "update_moments",
        put("momenta", torch.zeros(8).expand(3, 8), 0),
        "momenta[0] may hold one element at two indices",
    ),
    "overlap, param": (
        "apply_update",
        put("params", torch.zeros(8).expand(3, 8), 0),
        "params[0] may hold one element at two",
    ),
    "input, strided": ("update_moments", put("inputs", torch.zeros(8, 3).mT, 0), "directions[0] must be contiguous"),
    "direction, strided": (
        "apply_update",
        put("directions", torch.zeros(8, 3).mT, 0),
        "directions[0] must be contiguous",
    ),
    "dimensions": (
        "update_moments",
        strided,
        "the tensors of item 0 need more than 4 strided dimensions; make them contiguous()",
    ),
    "dimensions, after": ("apply_update", strided, "the tensors of item 0 need more than 4 strided dimensions"),
    "matrices": ("update_moments", put("matrices", 5, 1), "item 1 has 24 elements, which are not 5 matrices"),
    "no matrices": ("apply_update", put("matrices", 0, 0), "item 0 has 24 elements, which are not 0 matrices"),
    "lengths, dtype": (
        "apply_update",
        put("lengths", torch.ones(1), 0),
        "lengths[0] must hold one float64 number for each of 1",
    ),
    "lengths, count": (
        "apply_update",
        put("lengths", torch.ones(2, dtype=D), 0),
        "lengths[0] must hold one float64 number for",
    ),
    "factors, dtype": (
        "apply_update",
        put("factors", torch.ones(3, dtype=H), 0),
        "factors[0] has 3 numbers of Half; it must hold one float32 number for each row of 1 matrices of 24 elements",
    ),
    "factors, count": ("apply_update", put("factors", torch.ones(5), 0), "factors[0] has 5 numbers of Float"),
    "factors, strides": ("apply_update", put("factors", torch.ones(6)[::2], 0), "factors[0] has 3 numbers of Float"),
    "no second moment": ("update_moments", put("seconds", EMPTY, 0), "item 0 has no seconds, which its program uses"),
    "no second moment, after": (
        "apply_update",
        put("seconds", EMPTY, 0),
        "item 0 has no seconds, which its program uses",
    ),
    "no gradient": ("update_moments", put("grads", EMPTY, 0), "item 0 has no grads, which its program uses"),
    "no momentum": ("update_moments", put("momenta", EMPTY, 1), "item 1 has no momenta, which its program uses"),
    "no param": ("update_moments", put("params", EMPTY, 1), "item 1 has no params, which its program uses"),
    "no param, after": ("apply_update", put("params", EMPTY, 0), "item 0 has no params, which its program uses"),
    "no direction": ("apply_update", put("directions", EMPTY, 0), "item 0 has no directions, which its program uses"),
    "no mantissa": (
        "apply_update",
        lambda given: (
            put("params", torch.zeros(3, 8, dtype=B), 0)(given),
            programs(power="quarter", rounding="mantissa")(given),
        ),
        "item 0 has no mantissas, which its program uses",
    ),
    "second moment": ("update_moments", programs(), "item 0 has a second moment, which its program does not use"),
    "row": ("update_moments", put("row_of", 3, 1), "row_of[1] is 3; rows has 3"),
    "row, negative": ("apply_update", put("row_of", -1, 0), "row_of[0] is -1; rows has 3"),
    "line": (
        "update_moments",
        put("first_sums", 3, 1),
        "first_sums[1] names lines that the table of sums does not have",
    ),
    "line, negative": (
        "apply_update",
        put("first_sums", -1, 0),
        "first_sums[0] names lines that the table of sums does not have",
    ),
}


def three() -> list[Work]:
    works = [
        make(PROGRAMS["muadam"], (F, F, F, H, F)),
        make(PROGRAMS["sgd"], shape=(2, 3, 4), matrices=2, seed=1),
        make(PROGRAMS["nesterov"], seed=2),
    ]
    take(works)
    return works


def held(given: Arguments) -> list[Tensor]:
    """Every tensor among the arguments."""
    found = [value if isinstance(value, list) else [value] for value in given.values()]
    return [t for each in found for t in each if isinstance(t, Tensor)]


@pytest.mark.parametrize("op", ["grad_stats", "decide_steps", "update_moments", "apply_update"])
def test_the_arguments_that_errors_change_are_right(op: str) -> None:
    call(op, arguments(three())[op])


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    """Raised at the door, in words that name the argument, before anything is written."""
    op, change, message = ERRORS[case]
    given = arguments(three())[op]
    lengths = {name: len(value) for name, value in given.items() if isinstance(value, list)}
    change(given)
    old = [t.clone() for t in held(given)]
    for name, value in lengths.items():
        if case == f"{op}, {name}":
            message = message.format(found=value - 1, wanted=value).replace("inputs", "directions")  # one slot for both
    with pytest.raises(RuntimeError, match=re.escape(message)):
        call(op, given)
    assert all_same_bits(held(given), old)


def test_an_unknown_backend() -> None:
    with pytest.raises(ValueError, match="backend='rocm' is not a backend; use 'auto', 'cuda', 'triton', 'cpu' or"):
        multi_tensor.route("update_moments", [torch.ones(3)], "rocm")


DOORS: dict[str, Callable[[str], None]] = {
    "grad_stats": lambda name: multi_tensor.grad_stats(
        [torch.ones(3)], [EMPTY], table_of(three()), [0], [0, 1], Groups([0.0] * len(HYPERS), [], [], [0]), backend=name
    ),
    "decide_steps": lambda name: multi_tensor.decide_steps(
        [EMPTY], table_of(three()), [0], [0, 1], Groups([0.0] * len(HYPERS), [], [], [0]), backend=name
    ),
    "update_moments": lambda name: multi_tensor.update_moments(
        [torch.ones(3)], [], [], [], [], [], table_of(three()), Items(()), backend=name
    ),
    "apply_update": lambda name: multi_tensor.apply_update(
        [], [], [torch.ones(3)], [], [], [], table_of(three()), Items(()), backend=name
    ),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_forced_backend_says_why_it_cannot_run(door: str, name: str) -> None:
    with pytest.raises(RuntimeError, match=f"{door}: backend='{name}' cannot run: the tensors are on cpu"):
        DOORS[door](name)


@pytest.mark.parametrize("door", DOORS)
def test_there_is_no_version_in_torch_ops(door: str) -> None:
    wanted = f"{door} has no version in torch ops, steepest.recipe.step_one is its reference"
    with pytest.raises(RuntimeError, match=wanted):
        DOORS[door]("torch")


def test_devices_that_no_kernel_knows() -> None:
    with pytest.raises(RuntimeError, match="update_moments has no version in torch ops.*the tensors are on meta"):
        multi_tensor.route("update_moments", [torch.ones(3, device="meta")])


TAKEN: dict[str, tuple[Tensor, str | None]] = {
    "fp32": (torch.ones(3), None),
    "fp64": (torch.ones(3, dtype=D), None),
    "mantissa": (torch.ones(3, dtype=torch.int16), None),
    "contiguous": (SIX, None),
    "fp64 elsewhere": (torch.ones(3, dtype=D, device="meta"), "float64 is for the CPU"),
    "complex": (torch.ones(3, dtype=torch.complex64), "a tensor is torch.complex64"),
    "fp8": (torch.ones(3).to(torch.float8_e4m3fn), "a tensor is torch.float8_e4m3fn"),
    "dimensions": (SIX[:, ::2], "a tensor is not contiguous and has more than 4 dimensions"),
}


@pytest.mark.parametrize("case", TAKEN)
def test_what_the_kernels_take(case: str) -> None:
    tensor, reason = TAKEN[case]
    assert multi_tensor.unsupported([torch.ones(3), tensor]) == reason


@pytest.mark.parametrize("bf16", ["0", "1"])
@pytest.mark.parametrize("options", [{"use_muon": False}, {"nesterov": True}, {"nesterov": False}], ids=str)
def test_contiguous_tensors_have_the_bits_of_strided_ones(
    options: dict[str, Any], bf16: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contiguous fp32 tensors go through loops of their own (csrc/multi_tensor/host_chunk.h)."""
    monkeypatch.setattr("steepest.linalg.polar.choice.cpu_bf16", bf16)

    def turned(x: Tensor) -> Tensor:
        return x.mT.contiguous().mT

    moved = []
    for lay_param, lay_grad in ((Tensor.clone, Tensor.clone), (Tensor.clone, turned), (turned, Tensor.clone)):
        params = [
            torch.nn.Parameter(lay_param(gaussian(m, n, seed=m).float())) for m, n in ((3, 5), (67, 129), (300, 70))
        ]
        optimizer = steepest.Muon([{"params": params, "lr": 0.03, "weight_decay": 0.1, **options}])
        for step in range(4):
            for i, p in enumerate(params):
                p.grad = lay_grad(gaussian(*p.shape, seed=10 * step + i).float() * 1e-3**step)
            optimizer.step()
        moved.append([t for p in params for t in (p.detach(), *optimizer.state[p].values())])
    for other in moved[1:]:
        for a, b in zip(moved[0], other, strict=True):
            assert torch.equal(a, b)
