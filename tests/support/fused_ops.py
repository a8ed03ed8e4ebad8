"""One problem for every backend of the fused ops, and how close to the host's its results must be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, product
from typing import Any

import torch
from torch import Tensor

from steepest.ops.multi_tensor import CHUNK, COLUMNS, SUMS, Table
from steepest.ops.program import HYPERS, Program

NAN, INF = float("nan"), float("inf")
LIMIT = 1e-3  # of a row whose gradient is larger
F, B, H = torch.float32, torch.bfloat16, torch.float16

MUADAM = Program(momentum_correction=True, power="quarter", second_correction=True)
ADAMW = Program(momentum_correction=True, power="quarter", second_correction=True, direction="identity")
PROGRAMS = (
    Program(),
    Program(nesterov=True),
    Program(heavy_ball=True, nesterov=True, maximize=True),
    Program(heavy_ball=True, cautious=True),
    MUADAM,
    Program(nesterov=True, power="half", second_correction=True, eps_inside=True),
    Program(power="sixth", sum=True),
    Program(heavy_ball=True, nesterov=True, power="sixth", second_correction=True, eps_inside=True, cautious=True),
    Program(power="half", sum=True, eps_inside=True),
    ADAMW,
    Program(power="quarter", direction="identity", cautious=True, maximize=True),
    Program(nesterov=True, direction="sign"),
    Program(power="sixth", second_correction=True, direction="sign"),
    Program(nesterov=True, power="half", start_first=True, decay_scaled=True),
    Program(power="quarter", start_first=True, direction="identity", decay_after=True),
    Program(momentum_correction=True, decay_after=True, decay_scaled=True, maximize=True),
    Program(heavy_ball=True, nesterov=True, power="quarter", sum=True, cautious=True, decay_scaled=True),
    Program(nesterov=True, power="sixth", second_correction=True, frozen_moments=True),
    Program(nesterov=True, cautious=True, decay_independent=True),
    Program(nesterov=True, interpolated=True),
    Program(nesterov=True, interpolated=True, direction="sign"),
    replace(ADAMW, frozen_moments=True, decay_after=True),
)
# (matrices, shape): no multiple of 8, of a chunk; several matrices; several chunks a matrix.
SHAPES = ((1, (5,)), (1, (3, 24)), (4, (4, 6, 8)), (3, (3, 5, 7)), (1, ()), (1, (1, 1, 9)), (2, (2, CHUNK + 3)))
# Gradient, momentum, second moment, direction's input, parameter.
Types = tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype, torch.dtype]
TYPES: tuple[Types, ...] = ((F, F, F, B, F), (B, B, F, H, B), (F, B, B, B, B), (H, F, F, F, H))
GROUPS = ((3e-2, 0.1, 0.95, 0.99, 1e-6), (2e-2, 0.0, 0.6, 0.9, 1e-3), (1e-1, 0.5, 0.0, 0.5, 0.0))


@dataclass
class State:
    """Everything the ops take, one entry of each list an item; an item is a parameter, whose row has its number."""

    programs: list[Program]
    matrices: list[int]
    grads: list[Tensor]
    momenta: list[Tensor]
    seconds: list[Tensor]
    inputs: list[Tensor]
    params: list[Tensor]
    mantissas: list[Tensor]
    lengths: list[Tensor]
    factors: list[Tensor]
    steps: list[Tensor]
    overrides: list[Tensor]
    table: Table

    def copy(self, device: torch.device) -> State:
        """The same numbers in other memory, of the same strides."""
        return self.each(lambda t: twin(t, device))

    def each(self, change: Callable[[Tensor], Tensor]) -> State:
        """With other tensors, the table's as well."""
        return State(**changed(self, change))

    def written(self) -> Iterator[tuple[str, Tensor, bool]]:
        """(name, numbers, whether a momentum of 16 bits decides them) of all that the ops write.

        A bf16 parameter and its mantissa count as the fp32 number that they make.
        """
        narrow = [m.dtype != F for m in self.momenta]
        for i, (p, low) in enumerate(zip(self.params, self.mantissas)):
            yield f"params[{i}]", p, narrow[i]
            if low.numel() != 0:
                weight = (p.float().view(torch.int32) + low.to(torch.int32)).view(torch.float32)
                yield f"weights[{i}]", weight, narrow[i]
            for name in ("momenta", "seconds", "inputs"):
                yield f"{name}[{i}]", getattr(self, name)[i], narrow[i]
        yield from ((f"steps[{i}]", step, False) for i, step in enumerate(self.steps))
        for name in COLUMNS:
            yield name, self.table.column(name), False
        lines = torch.tensor(narrow).repeat_interleave(torch.tensor(self.matrices)).to(self.table.sums.device)
        for name in SUMS:
            yield name, self.table.column(name)[~lines], False
            yield name, self.table.column(name)[lines], True
        yield "skipped", self.table.skipped, False

    def first_sums(self) -> list[int]:
        return list(accumulate(self.matrices, initial=0))


def changed(of: Any, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The fields of a dataclass with other tensors: those by themselves, in lists and in a table."""
    fields = dict(vars(of))
    for name, value in fields.items():
        if isinstance(value, Tensor):
            fields[name] = change(value)
        elif isinstance(value, Table):
            fields[name] = Table(*map(change, vars(value).values()))
        elif isinstance(value, list) and value and isinstance(value[0], Tensor):
            fields[name] = [change(t) for t in value]
    return fields


def twin(t: Tensor, device: torch.device) -> Tensor:
    """At the same distance from 16 bytes."""
    offset = t.data_ptr() % 16 // t.element_size()
    room = torch.zeros(offset + 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride())), dtype=t.dtype, device=device)
    return room[offset:].as_strided(t.shape, t.stride(), offset).copy_(t) if t.numel() else room[:0]


def random_state(
    shapes: Sequence[tuple[int, tuple[int, ...]]] = SHAPES,
    programs: Sequence[Program] = PROGRAMS,
    types: Sequence[Types] = TYPES,
    times: int = 1,
) -> State:
    """These programs with every tuple of types and every rounding, so many times, over shapes that take turns."""
    generator = torch.Generator().manual_seed(0)
    lists: dict[str, list[Any]] = {name: [] for name in State.__dataclass_fields__ if name != "table"}

    def random(dtype: torch.dtype, scale: float, shape: tuple[int, ...]) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    for turn, (_, base, (grad, momentum, second, into, param)) in enumerate(product(range(times), programs, types)):
        mode = ("nearest", "stochastic", "mantissa")[turn % 3]
        program = Program(**{**vars(base), "rounding": mode})
        matrices, shape = shapes[turn % len(shapes)]
        absent = torch.empty(0)
        weight = random(param, 1.0, shape)
        keeps = mode == "mantissa" and param == B
        low = torch.randint(-(2**15), 2**15, shape, generator=generator).to(torch.int16)
        lists["programs"].append(program)
        lists["matrices"].append(matrices)
        lists["grads"].append(random(grad, 1.0, shape))
        lists["momenta"].append(random(momentum, 0.1, shape))
        lists["seconds"].append(random(second, 1.0, shape).square() if program.power != "none" else absent)
        lists["inputs"].append(absent if program.whole else torch.full(shape, NAN, dtype=into))
        lists["params"].append(weight)
        lists["mantissas"].append(low if keeps else torch.empty(0, dtype=torch.int16))
        scale = torch.rand(matrices, generator=generator, dtype=torch.float64) + 0.5
        lists["lengths"].append(scale if turn % 2 else absent.double())
        rows = matrices * shape[-2] if turn % 3 and len(shape) > 1 + (matrices > 1) else 0  # each of so many
        lists["factors"].append(torch.rand(rows, generator=generator) + 0.5)
        count = torch.tensor(float(turn % 2 if program.start_first else turn % 5))
        lists["steps"].append(count if turn % 4 or program.start_first else absent)
    lists["overrides"] = [torch.tensor(0.05), torch.tensor(0.9375, dtype=torch.float64)]
    numel = [t.numel() for t in lists["grads"]]
    items = [(m, n // m) for m, n in zip(lists["matrices"], numel)]
    table = Table.empty(torch.zeros((), dtype=torch.int64), numel, items)
    table.sums.copy_(torch.rand(table.sums.shape, generator=generator))
    return State(**lists, table=table)


def problem() -> State:
    """With another order of elements, addresses that are not aligned, numbers at the ends of their range."""
    state = random_state()
    lists = vars(state)
    lists["inputs"][1] = lists["inputs"][1].flatten()
    for name in ("grads", "momenta", "seconds", "params", "mantissas"):  # a whole program in another order of elements
        lists[name][36] = _transposed(lists[name][36])
    for name in ("grads", "params"):  # an address that is no multiple of 16
        room = torch.zeros(25, dtype=lists[name][2 * len(SHAPES)].dtype)
        lists[name][2 * len(SHAPES)] = room[1:6].copy_(lists[name][2 * len(SHAPES)])
    for i in (17, 20, 50):  # one of every power, in the group where eps is 0: 1 / 0 = 0, and 1e-40 is not 0
        for name, small in (("grads", 1e-20), ("seconds", 1e-40), ("momenta", 1e-20)):
            lists[name][i].view(-1)[:2] = torch.tensor([0, small])
    state.momenta[1] *= 1e5  # larger than the sums say, so that its fp16 input is clamped
    state.table.column("momentum_max")[state.first_sums()[1] : state.first_sums()[2]] = 0
    for i, limit in ((8, LIMIT), (9, 1e3)):  # of noise: one step is not taken, one is
        state.table.column("largest_taken")[i] = limit
    return state


def _transposed(t: Tensor) -> Tensor:
    return t.t().contiguous().t() if t.numel() else t


def grad_stats(op: Any, state: State, found_inf: Tensor | None, grad_scale: Tensor | None, decide: bool = True) -> None:
    table = state.table
    memory = (table.rows, table.sums, table.skipped, table.scratch)
    op.grad_stats(state.grads, state.steps, *memory, *_row_numbers(state), found_inf, grad_scale, decide)


def decide_steps(op: Any, state: State, grad_scale: Tensor | None) -> None:
    table = state.table
    op.decide_steps(state.steps, table.rows, table.sums, table.skipped, *_row_numbers(state), grad_scale)


def _row_numbers(state: State) -> tuple[object, ...]:
    return (
        [p.packed() for p in state.programs],
        state.first_sums(),
        # An interpolated reading divides by beta1, which is 0 in the last group.
        [0 if program.interpolated else i % len(GROUPS) for i, program in enumerate(state.programs)],
        [number for group in GROUPS for number in group],
        state.overrides,
        [0, len(HYPERS) + 2],  # the first group's learning rate, the second's beta1
    )


def update_moments(op: Any, state: State, members: list[int] | None = None) -> None:
    some = list(range(len(state.programs))) if members is None else members
    absent = torch.empty(0)
    whole = [i if state.programs[i].whole else None for i in some]
    params, mantissas = ([absent if i is None else each[i] for i in whole] for each in (state.params, state.mantissas))
    if members is not None:  # no list is as good as a list of absent ones
        params, mantissas = [], []
    slots = [[each[i] for i in some] for each in (state.grads, state.momenta, state.seconds, state.inputs)]
    op.update_moments(*slots, params, mantissas, *_numbers(state, some))


def apply_update(op: Any, state: State) -> None:
    some = [i for i, program in enumerate(state.programs) if not program.whole]
    slots = (state.inputs, state.seconds, state.params, state.mantissas, state.lengths, state.factors)
    op.apply_update(*([each[i] for i in some] for each in slots), *_numbers(state, some))


def _numbers(state: State, some: list[int]) -> tuple[object, ...]:
    table, lines = state.table, state.first_sums()
    packed = [state.programs[i].packed() for i in some]
    places = [number for i in some for number in (i % 3, 2**32 - 1 - i, 7 * i)]
    ratios = [0.25 + i / 7 for i in some]
    each = (packed, some, [state.matrices[i] for i in some], [lines[i] for i in some], places, ratios)
    return (table.rows, table.sums, table.scratch, *each)


def assert_close(state: State, wanted: State) -> None:
    """Equal but for a few units in the last place of fp32, and for what hangs on a rounding that these decide.

    Such roundings are rare: the numbers of 16 bits that differ do so by one unit in the last place; what a momentum of
    16 bits decides may cancel, and differs by no more than that unit for the largest of its numbers.
    """
    different = compared = 0
    for (name, found, narrow), (_, expected, _) in zip(state.written(), wanted.written()):
        found = found.cpu()
        if name == "input_scale" or found.dtype == torch.int64:
            rtol, atol = 0.0, 0.0
        elif name in (*COLUMNS, *SUMS):
            rtol = 2**-7 if narrow else 2e-5 if name in (*SUMS, "grad_sq") else 1e-12
            atol = 1e-4 if name == "grad_dot" else 0.0  # a sum of both signs
        else:
            rtol, atol = (4e-6, 1e-6) if found.dtype == torch.float32 else (0.0, 0.0)
            if narrow or found.dtype != torch.float32:
                different += int((~torch.isclose(found, expected, rtol, atol, equal_nan=True)).sum())
                compared += found.numel()
                rtol, atol = max(rtol, torch.finfo(found.dtype).eps), 1e-6
            if narrow and found.numel() != 0:
                atol = 2**-7 * float(expected.nan_to_num().abs().max())
        torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, equal_nan=True, msg=f"{name}: {{}}".format)
    assert different <= compared / 500, f"{different} of {compared} numbers are rounded another way"
    counters = max(len(state.table.rows), len(state.table.sums))
    assert not state.table.scratch[:counters].any(), "the counters of the compiled kernels stay zero"


def compare(ops: Any, device: torch.device, make: Callable[[], State] = problem) -> None:
    """Three steps: plain; scaled, with gradients that are not finite; with found_inf. Each op begins as the host's."""
    wanted = make()
    limited = int((wanted.table.column("largest_taken") == LIMIT).sum())
    one = torch.ones((), dtype=torch.float32)
    for step, (found_inf, grad_scale) in enumerate([(None, None), (0 * one, 8 * one), (one, None)]):
        if step == 1:
            wanted.grads[4][(-1,) * wanted.grads[4].dim()] = NAN
            wanted.grads[9][(0,) * wanted.grads[9].dim()] = -INF
        compare_step(ops, device, wanted, found_inf, grad_scale)
        assert int(wanted.table.skipped) == (limited, 2 + 2 * limited, 2 + 2 * limited + len(wanted.params))[step]
        wanted.inputs[0].fill_(NAN)  # not read where the step is not taken, and overwritten
    wanted.steps = []
    wanted.programs = [replace(p, start_first=False) for p in wanted.programs]
    state = wanted.copy(device)
    grad_stats(ops, state, None, None)
    grad_stats(torch.ops.steepest, wanted, None, None)
    assert_close(state, wanted)


def compare_step(
    ops: Any,
    device: torch.device,
    wanted: State,
    found_inf: Tensor | None = None,
    grad_scale: Tensor | None = None,
) -> None:
    """A step of the host's, and beside it each op of the others from the state that it began with."""
    state, apart = wanted.copy(device), wanted.copy(device)
    scaling = [None if t is None else t.to(device) for t in (found_inf, grad_scale)]
    grad_stats(ops, state, *scaling)
    grad_stats(torch.ops.steepest, wanted, found_inf, grad_scale)
    assert_close(state, wanted)
    apart.table.rows[:, :-1].fill_(NAN)  # all but what the caller says
    grad_stats(ops, apart, *scaling, decide=False)
    assert apart.table.rows[:, 3:-1].isnan().all(), "nothing is decided yet"
    decide_steps(ops, apart, scaling[1])
    for (name, found, _), (_, once, _) in zip(apart.written(), state.written(), strict=True):
        torch.testing.assert_close(found, once, rtol=0, atol=0, equal_nan=True, msg=f"{name}: {{}}".format)
    for op in (update_moments, apply_update):
        state = wanted.copy(device)
        op(ops, state)
        op(torch.ops.steepest, wanted)
        assert_close(state, wanted)
