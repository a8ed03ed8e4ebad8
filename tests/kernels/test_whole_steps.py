"""Whole steps by addresses: to the bit what `grad_stats` and `update_moments` make of the same tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from steepest.ops import multi_tensor
from steepest.ops.multi_tensor import NOT_SCALED, Groups, Item, Items, Scaling, Table
from steepest.ops.program import COLUMNS, SUMS, Program
from steepest.ops.whole_steps import Step, WholeSteps, by_address, numbers_of, takes
from support.training import noise, same_bits

F, B, H, D = torch.float32, torch.bfloat16, torch.float16, torch.float64
CHUNK = 16384
#: the ends of vectors, of runs, of chunks, and of what one thread takes alone
SIZES = (1, 15, 17, 33, 127, 2049, CHUNK, CHUNK + 1, 8 * CHUNK, 8 * CHUNK + 5, 11 * CHUNK)
ADAM = Program(momentum_correction=True, power="quarter", second_correction=True, direction="identity")
PROGRAMS = {
    "adamw": ADAM,
    "maximize": Program(**{**vars(ADAM), "maximize": True}),
    "from the first": Program(**{**vars(ADAM), "start_first": True}),
    "cautious": Program(**{**vars(ADAM), "cautious": True}),
    "decay after": Program(**{**vars(ADAM), "decay_after": True}),
    "sum": Program(power="half", sum=True, direction="identity"),
    "momentum alone": Program(heavy_ball=True, nesterov=True, direction="identity"),
    "sign": Program(direction="sign", decay_independent=True),
}
#: of gradients, weights and momenta
DTYPES = {"f32": (F, F, F), "bf16": (B, B, B), "f16": (H, H, F), "bf16 of f32": (F, B, B), "f64": (D, D, D)}
HYPERS = ([1e-2, 0.1, 0.9, 0.999, 1e-8], [3e-3, 0.0, 0.5, 0.95, 1e-6])


@dataclass
class Tensors:
    grads: list[Tensor]
    params: list[Tensor]
    momenta: list[Tensor]
    seconds: list[Tensor]
    mantissas: list[Tensor]
    steps: list[Tensor]
    table: Table

    def copy(self) -> Tensors:
        lists = {name: [t.clone() for t in value] for name, value in vars(self).items() if name != "table"}
        table = self.table
        return Tensors(
            **lists, table=Table(*[t.clone() for t in (table.rows, table.sums, table.scratch, table.skipped)])
        )

    def everything(self) -> Iterator[tuple[str, Tensor]]:
        for name, value in vars(self).items():
            if name != "table":
                yield from ((f"{name}[{i}]", t) for i, t in enumerate(value))
        for column in COLUMNS:
            if column != "input_scale":  # of an input, which a whole step does not have
                yield column, self.table.column(column)
        yield from ((column, self.table.column(column)) for column in SUMS)
        yield "skipped", self.table.skipped


def problem(program: Program, dtypes: tuple[torch.dtype, ...], sizes: tuple[int, ...]) -> Tensors:
    of_grad, of_param, of_momentum = dtypes
    absent = torch.empty(0)
    wide = D if of_grad is D else F

    def some(dtype: torch.dtype, scale: float, seed: int) -> list[Tensor]:
        return [(scale * noise((n,), seed + i)).to(dtype) for i, n in enumerate(sizes)]

    grads, params, momenta = some(of_grad, 1e-2, 0), some(of_param, 1.0, 100), some(of_momentum, 1e-2, 200)
    seconds = [m.square() for m in some(wide, 1e-2, 300)]
    keeps = program.rounding == "mantissa"
    table = Table.empty(torch.tensor(3), list(sizes), [(1, n) for n in sizes])
    return Tensors(
        grads,
        params,
        momenta,
        seconds if program.power != "none" else [absent] * len(sizes),
        [torch.arange(n).remainder(99).to(torch.int16) if keeps else absent.to(torch.int16) for n in sizes],
        [torch.tensor(float(i)) for i in range(len(sizes))],
        table,
    )


def places(count: int) -> list[tuple[int, int, int]]:
    return [(i % 2, i, 0) for i in range(count)]


def groups_of(count: int) -> Groups:
    return Groups([x for group in HYPERS for x in group], [], [], [i % 2 for i in range(count)])


def by_ops(program: Program, t: Tensors, scaling: Scaling) -> None:
    count = len(t.grads)
    groups = groups_of(count)
    packed, items = [program.packed()] * count, Items(tuple(
        Item(program, i, 1, i, place, 1.0) for i, place in enumerate(places(count))
    ))  # fmt: skip
    multi_tensor.grad_stats(t.grads, t.steps, t.table, packed, list(range(count + 1)), groups, scaling)
    seconds = t.seconds if program.power != "none" else []
    mantissas = t.mantissas if program.rounding == "mantissa" else []
    multi_tensor.update_moments(t.grads, t.momenta, seconds, [], t.params, mantissas, t.table, items)


def by_addresses(program: Program, t: Tensors, scaling: Scaling = NOT_SCALED) -> WholeSteps:
    lists = zip(t.grads, t.params, t.momenta, t.seconds, t.mantissas, t.steps, strict=True)
    steps = [
        Step(program, g.numel(), g.dtype, p.dtype, m, v, low, step, i % 2, place)
        for i, ((g, p, m, v, low, step), place) in enumerate(zip(lists, places(len(t.grads)), strict=True))
    ]
    whole = WholeSteps(steps, t.table)
    whole.take(t.grads, t.params, numbers_of(groups_of(len(t.grads))), scaling)
    return whole


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def assert_same(given: Tensors, wanted: Tensors) -> None:
    for (name, a), (_, b) in zip(given.everything(), wanted.everything(), strict=True):
        assert same_bits(a, b), name


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_step_has_the_bits_of_the_ops(program: str, dtypes: str, threads: int) -> None:
    wanted = problem(PROGRAMS[program], DTYPES[dtypes], SIZES)
    given = wanted.copy()
    for _ in range(2):
        by_ops(PROGRAMS[program], wanted, Scaling())
        by_addresses(PROGRAMS[program], given)
    assert_same(given, wanted)
    assert int(given.table.skipped) == 3


@pytest.mark.parametrize("rounding", ["stochastic", "mantissa"])
def test_bf16_weights_round_as_the_ops_do(rounding: str, threads: int) -> None:
    program = Program(**{**vars(ADAM), "rounding": rounding})
    wanted = problem(program, DTYPES["bf16"], SIZES)
    given = wanted.copy()
    by_ops(program, wanted, Scaling())
    by_addresses(program, given)
    assert_same(given, wanted)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtypes", ["f32", "bf16"])
def test_a_gradient_that_is_not_finite_leaves_its_parameter_alone(dtypes: str, value: float, threads: int) -> None:
    wanted = problem(ADAM, DTYPES[dtypes], SIZES)
    bad = {1: 0, 4: 126, 6: CHUNK - 1, 9: 8 * CHUNK + 4, 10: 3 * CHUNK + 7}
    for i, at in bad.items():
        wanted.grads[i][at] = value
    before, given = wanted.copy(), wanted.copy()
    by_ops(ADAM, wanted, Scaling())
    by_addresses(ADAM, given)
    for i in range(len(SIZES)):
        stays = [
            same_bits(getattr(given, name)[i], getattr(before, name)[i]) for name in ("momenta", "seconds", "steps")
        ]
        assert stays == [i in bad] * 3, i
        assert i not in bad or same_bits(given.params[i], before.params[i])
    assert int(given.table.skipped) == 3 + len(bad)
    assert_same(given, wanted)


@pytest.mark.parametrize("place", range(8))
def test_one_bad_entry_anywhere_is_seen(place: int) -> None:
    """Wherever it lies among the parts of a chunk that are read side by side, and in what is left of them."""
    for dtypes in ("f32", "bf16"):
        for size in (64, 131, 4 * 1024 + 31, CHUNK - 1):
            t = problem(ADAM, DTYPES[dtypes], (size,))
            t.grads[0][place * (size - 1) // 7] = float("nan")
            before = t.params[0].clone()
            by_addresses(ADAM, t)
            assert same_bits(t.params[0], before)
            assert int(t.table.skipped) == 4


def test_what_a_scaler_says_is_taken() -> None:
    for found, scale in ((0.0, 1024.0), (1.0, 1.0)):
        wanted = problem(ADAM, DTYPES["f32"], SIZES)
        given = wanted.copy()
        scaling = Scaling(torch.tensor(found), torch.tensor(scale))
        by_ops(ADAM, wanted, scaling)
        by_addresses(ADAM, given, scaling)
        assert_same(given, wanted)
        assert int(given.table.skipped) == (3 if found == 0 else 3 + len(SIZES))


def test_numbers_may_be_tensors() -> None:
    wanted = problem(ADAM, DTYPES["f32"], SIZES)
    given, groups = wanted.copy(), groups_of(len(SIZES))
    whole = by_addresses(ADAM, given)
    by_addresses(ADAM, wanted).take(wanted.grads, wanted.params, numbers_of(groups))
    tensors = [torch.tensor(groups.values[at], dtype=torch.float64) for at in (0, 7)]
    values = [0.5 if at in (0, 7) else value for at, value in enumerate(groups.values)]
    whole.take(given.grads, given.params, numbers_of(Groups(values, tensors, [0, 7], groups.of)))
    assert_same(given, wanted)


def test_new_gradients_and_weights_lie_elsewhere() -> None:
    wanted = problem(ADAM, DTYPES["f32"], (70, 9))
    given = wanted.copy()
    whole = by_addresses(ADAM, given)
    by_ops(ADAM, wanted, Scaling())
    for t in (wanted, given):
        t.grads = [2 * g for g in t.grads]
        t.params = [p.clone() for p in t.params]
    by_ops(ADAM, wanted, Scaling())
    versions = [p._version for p in given.params]
    whole.take(given.grads, given.params, numbers_of(groups_of(2)))
    assert_same(given, wanted)
    assert [p._version for p in given.params] == [version + 1 for version in versions]


def test_what_has_no_numbers_at_its_address_is_refused() -> None:
    class Tagged(Tensor):
        pass

    plain, turned = torch.ones(4), torch._neg_view(torch.ones(4))
    assert by_address([plain, torch.nn.Parameter(plain)])
    assert not by_address([plain, turned])
    assert not by_address([plain, plain.as_subclass(Tagged)])
    assert takes([plain, plain.double()])
    assert not takes([plain, torch.ones(4, 2)[:, 0]])
    assert not takes([plain, torch.ones(4, dtype=torch.int32)])
    assert not takes([plain, torch.ones(4, device="meta")])
