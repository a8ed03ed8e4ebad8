"""Updates that are normalized over rows (NorMuon) and over entries (AdaMuon): the op, and torch's operations beside it,
against the papers' lines in fp64.

NorMuon, arXiv:2510.05491, Algorithm 1: v_i <- b v_i + (1 - b) mean_j O_ij^2;  H_ij = O_ij / (sqrt v_i + eps)
AdaMuon, arXiv:2507.11005v3, Algorithm 1: V <- b V + (1 - b) O o O;  H = O / (sqrt V + eps)

and what is stepped by is H times .2 sqrt(mn) / |H|, or as NorMuon's authors have it |O| / |H|.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steepest.ops import backend, multi_tensor
from steepest.ops.multi_tensor import Item, Items, Table
from steepest.ops.normalize import Normalization, normalize_updates, normalized, route, scratch_for, unsupported
from steepest.ops.program import CHUNK, Program
from support.normalized_items import NormalizedItems, normalized_items
from support.problems import FEW, gaussian
from support.slow import slow
from support.training import same_bits

needs_extension = pytest.mark.skipif(backend.extension is None, reason=f"{backend.extension_reason}")

F, B, H, D = torch.float32, torch.bfloat16, torch.float16, torch.float64
BETA, EPS = 0.9, 1e-8
#: Of sums of squares in the arithmetic's dtype, relative.
CLOSE = {F: 1e-5, D: 1e-13}
SHAPES = ((1, 1, 1), (2, 1, 40), (2, 40, 1), (3, 5, 7), (2, 16, 24), (1, 130, 131), (1, 3, CHUNK + 9), (1, 70, 8192))
over_both = pytest.mark.parametrize("over", ["rows", "entries"])
Kernel = Callable[..., tuple[Tensor, Tensor]]


def exactly(u: Tensor, v: Tensor, rms: float | None) -> tuple[Tensor, Tensor]:
    """(update, second moment) of one matrix, entry by entry."""
    rows = v.ndim == 1
    o, second = u.tolist(), v.tolist()
    h: list[list[float]] = []
    for i, row in enumerate(o):
        if rows:
            second[i] = BETA * second[i] + (1 - BETA) * sum(x * x for x in row) / len(row)
            h.append([x / (math.sqrt(second[i]) + EPS) for x in row])
        else:
            second[i] = [BETA * w + (1 - BETA) * x * x for w, x in zip(second[i], row)]
            h.append([x / (math.sqrt(w) + EPS) for w, x in zip(second[i], row)])
    length = math.sqrt(sum(x * x for row in o for x in row)) if rms is None else rms * math.sqrt(u.numel())
    size = math.sqrt(sum(x * x for row in h for x in row))
    made = torch.tensor(h, dtype=D).view(u.shape)
    return made * (length / size if size > 0 else 0.0), torch.tensor(second, dtype=D).view(v.shape)


def compiled(u: Tensor, v: Tensor, rms: float | None = None, **more: Any) -> tuple[Tensor, Tensor]:
    """(update, second moment) by the op; nothing of what is given is changed."""
    second = v.clone()
    divided = [torch.full_like(v, math.nan)] if v.ndim == u.ndim else []
    (factors,) = normalize_updates([u], [second], [BETA], eps=EPS, rms=rms, divided=divided, **more)
    return (divided[0] if divided else u) * factors.unsqueeze(-1), second


def by_torch(u: Tensor, v: Tensor, rms: float | None = None) -> tuple[Tensor, Tensor]:
    return normalized(u, v, BETA, eps=EPS, rms=rms)


WAYS = [pytest.param(compiled, marks=needs_extension), by_torch]


def problem(shape: Sequence[int], dtype: torch.dtype, over: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """An update whose rows have sizes of their own, and its second moment, 0 in the first row."""
    u = gaussian(*shape, seed=seed) * torch.logspace(0, -2, shape[1], dtype=D)[:, None]
    v = gaussian(*(shape[:2] if over == "rows" else shape), seed=seed + 1).square()
    v[:, :1] = 0
    return u.to(dtype), v.to(torch.promote_types(dtype, F))


def shifted(t: Tensor) -> Tensor:
    """The same at an address that is no multiple of 16."""
    room = torch.zeros(t.numel() + 1, dtype=t.dtype)
    return room[1:].view(t.shape).copy_(t)


@over_both
@pytest.mark.parametrize("rms", [None, 0.2])
@pytest.mark.parametrize("dtype", [F, B, H, D], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES[:-1], slow(SHAPES[-1])], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_the_papers_lines(
    way: Kernel, shape: tuple[int, ...], dtype: torch.dtype, rms: float | None, over: str
) -> None:
    u, v = problem(shape, dtype, over)
    old = u.clone(), v.clone()
    made, second = way(u, v, rms)
    # torch adds up half a million squares one after another in fp32.
    close = CLOSE[v.dtype] * (10 if way is by_torch and u[0].numel() > 10**5 else 1)
    for i in range(len(u)):
        wanted, wanted_second = exactly(u[i].double(), v[i].double(), rms)
        torch.testing.assert_close(second[i].double(), wanted_second, rtol=close, atol=0)
        torch.testing.assert_close(made[i].double(), wanted, rtol=close, atol=0)
    assert same_bits(u, old[0])
    assert same_bits(v, old[1])


@over_both
@pytest.mark.parametrize("way", WAYS)
def test_of_nothing_comes_nothing(way: Kernel, over: str) -> None:
    """A zero matrix stays zero beside another, its second moment fades; and there may be no element at all."""
    u, v = problem((2, 5, 6), F, over)
    u[1] = 0
    made, second = way(u, v)
    assert not made[1].any()
    torch.testing.assert_close(second[1], BETA * v[1], rtol=1e-6, atol=0)
    assert made[0].all()
    for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        u, v = torch.ones(shape), torch.ones(shape[:2] if over == "rows" else shape)
        if shape[2] == 0 and way is by_torch:  # a mean of nothing
            continue
        made, second = way(u, v)
        assert made.shape == shape
        assert same_bits(second, v)


@over_both
@pytest.mark.parametrize("way", WAYS)
def test_without_eps_zeros_stay(way: Kernel, over: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside what is not zero in the same matrix, which is stepped by as if they were not there."""
    monkeypatch.setattr(sys.modules[__name__], "EPS", 0.0)
    u, v = problem((2, 5, 6), F, over)
    u[:, :1] = 0  # where second moments are 0 too
    made, second = way(u, v)
    assert not made[:, 0].any()
    assert not second[:, 0].any()
    rest, _ = way(u[:, 1:].contiguous(), v[:, 1:].contiguous())
    torch.testing.assert_close(made[:, 1:], rest, rtol=1e-5, atol=0)


@over_both
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e20])
@pytest.mark.parametrize("way", WAYS)
def test_what_is_not_finite_is_not_remembered(way: Kernel, bad: float, over: str) -> None:
    """Nor what is too large to be squared: its row or entry keeps its second moment, the others take theirs, and no
    step of the matrix is taken that is not NaN where the update was."""
    u, v = problem((2, 5, 6), F, over)
    clean, clean_second = way(u, v)
    u[0, 2, 3] = bad
    made, second = way(u, v)
    spoilt = (0, 2) if over == "rows" else (0, 2, 3)
    assert second[spoilt] == v[spoilt]
    second[spoilt] = clean_second[spoilt]
    assert same_bits(second, clean_second)
    assert same_bits(made[1], clean[1])
    assert not made[0].nan_to_num(nan=0.0).any()


@needs_extension
def test_entries_may_be_divided_in_place() -> None:
    u, v = problem((2, 50, 60), F, "entries")
    wanted, second = compiled(u, v)
    (factors,) = normalize_updates([u], [v], [BETA], eps=EPS, divided=[u])
    assert same_bits(u * factors.unsqueeze(-1), wanted)
    assert same_bits(v, second)


@needs_extension
@over_both
@pytest.mark.parametrize("dtype", [F, B, H, D], ids=str)
@pytest.mark.parametrize("shape", [(1, 5, 7), (1, 16, 24), (1, 9, 2 * CHUNK + 3)], ids=str)
def test_a_matrix_has_its_bits_in_any_company(shape: tuple[int, int, int], dtype: torch.dtype, over: str) -> None:
    """Alone, shifted, among others of its stack and other stacks, on one thread or several."""
    u, v = problem(shape, dtype, over)
    alone = compiled(u, v)
    stack = torch.cat([problem(shape, dtype, over, seed=7)[0], u, problem(shape, dtype, over, seed=9)[0]])
    seconds = torch.cat([v + 1, v, v])
    other, of_other = problem((2, 33, 5), dtype, over, seed=3)
    threads = torch.get_num_threads()
    for number in (1, 2):
        torch.set_num_threads(number)
        try:
            for each in ([shifted(u), shifted(v)], [stack, seconds]):
                updates, moments = [other, each[0]], [of_other.clone(), each[1].clone()]
                divided = [torch.empty_like(t) for t in moments] if over == "entries" else []
                _, factors = normalize_updates(updates, moments, [0.5, BETA], eps=EPS, divided=divided)
                i = len(each[0]) // 2
                made = ((divided[1] if divided else each[0]) * factors.unsqueeze(-1))[i]
                assert same_bits(made, alone[0][0])
                assert same_bits(moments[1][i], alone[1][0])
        finally:
            torch.set_num_threads(threads)


@needs_extension
@settings(FEW)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 70), st.sampled_from([1, 2, 255, 256, 5000, 8192, 40000])),
        max_size=4,
    )
)
def test_the_scratch_is_large_enough(shapes: list[tuple[int, int, int]]) -> None:
    """And no larger than what the op asks for by much."""
    some = [shape for shape in shapes if 0 < math.prod(shape) < 4 * 10**6] or [(1, 1, 1)]
    updates = [torch.ones(shape, dtype=B) for shape in some]
    scratch = scratch_for([u.shape for u in updates], torch.device("cpu"))
    for entries in (False, True):
        seconds = [torch.ones(u.shape if entries else u.shape[:2]) for u in updates]
        divided = [torch.empty(u.shape) for u in updates] if entries else []
        for f in normalize_updates(updates, seconds, [BETA] * len(updates), eps=0.0, divided=divided, scratch=scratch):
            torch.testing.assert_close(f, torch.ones_like(f), rtol=1e-5, atol=0)


def arguments(over: str = "rows") -> dict[str, Any]:
    """Of two stacks, by the names of the schema."""
    pairs = [problem((2, 5, 6), B, over), problem((1, 3, 8), F, over)]
    updates, seconds = ([pair[i] for pair in pairs] for i in range(2))
    return {
        "updates": updates,
        "seconds": seconds,
        "divided": [torch.zeros(u.shape) for u in updates] if over == "entries" else [],
        "factors": [torch.zeros(u.shape[:2] if over == "rows" else (len(u), 1)) for u in updates],
        "scratch": scratch_for([u.shape for u in updates], torch.device("cpu")),
        "beta2": [0.9, 0.5],
        "eps": 1e-8,
        "rms": 0.0,
    }


@needs_extension
@over_both
def test_opcheck(over: str) -> None:
    torch.library.opcheck(torch.ops.steepest.normalize_updates.default, tuple(arguments(over).values()))


Change = Callable[[dict[str, Any]], None]


def put(name: str, value: object, i: int | None = None) -> Change:
    def change(given: dict[str, Any]) -> None:
        if i is None:
            given[name] = value
        else:
            given[name][i] = value

    return change


ERRORS: dict[str, tuple[Change, str]] = {
    "seconds": (lambda given: given["seconds"].pop(), "seconds has 1 elements; it goes by 2"),
    "factors": (lambda given: given["factors"].pop(), "factors has 1 elements; it goes by 2"),
    "divided": (lambda given: given["divided"].append(torch.zeros(1)), "divided has 1 elements; it goes by 2"),
    "beta2": (lambda given: given["beta2"].pop(), "beta2 has 1 elements; it goes by 2"),
    "rms": (put("rms", -1.0), "rms is -1; it is positive, or 0 where matrices keep their length"),
    "rms of NaN": (put("rms", math.nan), "rms is nan; it is positive"),
    "two dimensions": (put("updates", torch.ones(3, 8), 1), "updates[1] must be a contiguous stack of matrices"),
    "strides": (put("updates", torch.ones(1, 8, 3).mT, 1), "updates[1] must be a contiguous stack of matrices"),
    "integers": (put("updates", torch.ones(1, 3, 8, dtype=torch.int16), 1), "updates[1] and seconds[1] must be float"),
    "complex": (put("updates", torch.ones(1, 3, 8, dtype=torch.complex64), 1), "updates[1] is ComplexFloat; accepted"),
    "wider updates": (put("updates", torch.ones(1, 3, 8, dtype=D), 1), "no narrower than the first"),
    "second moments of 16 bits": (put("seconds", torch.ones(1, 3, dtype=B), 1), "the second float32 or on the CPU"),
    "second moments, count": (put("seconds", torch.ones(4), 1), "seconds[1] must be contiguous and hold 3 numbers"),
    "second moments, strides": (put("seconds", torch.ones(6)[::2], 1), "seconds[1] must be contiguous and hold 3"),
    "factors, dtype": (put("factors", torch.ones(3, dtype=D), 1), "factors[1] must be contiguous and hold 3 numbers"),
    "scratch": (put("scratch", torch.zeros(3, dtype=D)), "scratch must be a contiguous float64 tensor of at least"),
}


@needs_extension
@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    """In words that name the argument, before anything is written."""
    change, message = ERRORS[case]
    held = arguments()
    change(held)
    seconds = [t.clone() for t in held["seconds"]]
    with pytest.raises(RuntimeError, match=re.escape(message)):
        torch.ops.steepest.normalize_updates(*held.values())
    assert all(map(same_bits, held["seconds"], seconds))


TAKEN: dict[str, tuple[Tensor, Tensor, list[float | Tensor], str | None]] = {
    "fp32": (torch.ones(1, 2, 3), torch.ones(1, 2), [0.9], None),
    "16 bits": (torch.ones(1, 2, 3, dtype=H), torch.ones(1, 2), [0.9], None),
    "a rate on the host": (torch.ones(1, 2, 3), torch.ones(1, 2), [torch.tensor(0.9)], None),
    "fp64": (torch.ones(1, 2, 3, dtype=D), torch.ones(1, 2, dtype=D), [0.9], None),
    "wider": (torch.ones(1, 2, 3, dtype=D), torch.ones(1, 2), [0.9], "updates are torch.float64 and second moments"),
    "narrow": (torch.ones(1, 2, 3), torch.ones(1, 2, dtype=B), [0.9], "updates and second moments are torch.float32"),
    "large rows": (torch.ones(1).expand(1, 1, 2**31), torch.ones(1, 1), [0.9], "updates are (1, 1, 2147483648); more"),
    "many entries": (
        torch.ones(1).expand(1, 2**16, 2**15),
        torch.empty(1, 2**16, 2**15, device="meta"),
        [0.9],
        "updates are (1, 65536, 32768); more than 2^31 - 1 elements share a factor",
    ),
    "many entries, over rows": (torch.ones(1).expand(1, 2**16, 2**15), torch.ones(1, 2**16), [0.9], None),
    "strided": (
        torch.ones(1, 2, 3),
        torch.ones(2, 2).mT[:1],
        [0.9],
        "second moments of updates (1, 2, 3) have strides",
    ),
}


@pytest.mark.parametrize("case", TAKEN)
def test_what_is_compiled(case: str) -> None:
    u, v, rates, reason = TAKEN[case]
    why = unsupported([u], [v], rates)
    assert why is None if reason is None else why is not None and why.startswith(reason)


def test_second_moments_of_one_call_are_of_one_dtype() -> None:
    u, v = torch.ones(1, 2, 3), torch.ones(1, 2)
    assert unsupported([u, u], [v, v.double()]) == "second moments are of several dtypes"


@needs_extension
@pytest.mark.parametrize("forced,taken", [("auto", "cpu"), ("cpu", "cpu"), ("torch", "torch"), ("triton", "torch")])
def test_the_route(forced: str, taken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "forced", forced)
    u, v = torch.ones(1, 2, 3), torch.ones(1, 2)
    assert route([u], [v], [0.9]) == taken
    if forced == "auto":
        assert route([u], [v.to(B)], [0.9]) == "torch"
    if forced == "cpu":
        with pytest.raises(
            RuntimeError, match="normalize_updates: backend='cpu' cannot run: updates and second moments"
        ):
            route([u], [v.to(B)], [0.9])


# ---- on the way into the weights -----------------------------------------------------------------------------------

ON_THE_WAY = ((2, 40, 24), (3, 5, 7), (1, 70, 1030), (1, 1, 40), (1, 2, CHUNK + 8))


@needs_extension
@pytest.mark.parametrize("turned", [False, True])
def test_apply_update_normalizes_as_the_op_does(turned: bool) -> None:
    """To the bit what `normalize_updates` and `apply_update` behind it make; nothing where no step is taken."""
    state = normalized_items(ON_THE_WAY, refused=(1, 7, 12), turned=turned)
    apart = state.each(torch.clone)
    factors = list(apart.factors)
    directions = list(apart.directions)
    for i, (u, v, into) in enumerate(zip(apart.directions, apart.averages, apart.divided)):
        if v.numel() and apart.table.rows[i, 0] != 0:
            beta2, eps, rms = apart.rates[3 * i : 3 * i + 3]
            divided = [into] if into.numel() else []
            (factors[i],) = normalize_updates([u], [v], [beta2], eps=eps, rms=rms or None, divided=divided)
            directions[i] = into if divided else u
    table = (apart.table.rows, apart.table.sums, apart.table.scratch)
    for i, t in enumerate(apart.factors):
        if apart.table.rows[i, 0] == 0:
            factors[i] = t
    torch.ops.steepest.apply_update(directions, [], apart.params, [], [], factors, *table, *apart.items.numbers)
    state.run(torch.ops.steepest)
    for name in ("params", "averages", "divided"):
        for i, (a, b) in enumerate(zip(getattr(state, name), getattr(apart, name))):
            assert same_bits(a, b), f"{name}[{i}]"
    assert all(map(same_bits, state.factors, factors))
    assert same_bits(state.table.sums, apart.table.sums)
    assert not state.counters().any()


@needs_extension
def test_the_wrapper_takes_items_one_by_one() -> None:
    """Of rows, of entries, and of factors that are given."""
    state = normalized_items(((2, 5, 6),))
    apart = state.each(torch.clone).run(torch.ops.steepest)
    said: list[Normalization | None] = []
    for i, (v, into) in enumerate(zip(state.averages, state.divided)):
        beta2, eps, rms = state.rates[3 * i : 3 * i + 3]
        into_or_none = into if into.numel() else None
        said.append(Normalization(v, into_or_none, beta2, eps, rms or None) if v.numel() else None)
    lists = (state.directions, [], state.params, [], [], state.factors)
    multi_tensor.apply_update(*lists, state.table, state.items, normalizations=said)
    for name in ("params", "averages", "divided"):
        assert all(map(same_bits, getattr(state, name), getattr(apart, name))), name


@needs_extension
def test_triton_does_not_normalize(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multi_tensor, "route", lambda *arguments: "triton")
    u, v = torch.ones(1, 2, 3), torch.ones(1, 2)
    table = Table.empty(torch.zeros((), dtype=torch.int64), [6], [(1, 6)])
    items = Items((Item(Program(), 0, 1, 0, (0, 0, 0), 1.0),))
    said = [Normalization(v, None, 0.9, 1e-8, None)]
    with pytest.raises(RuntimeError, match="in the compiled version alone, not in Triton's; hand it normalized ones"):
        multi_tensor.apply_update([u], [], [u.clone()], [], [], [], table, items, normalizations=said)


def spoil(name: str, change: Callable[[list[Any]], object]) -> Callable[[NormalizedItems], object]:
    return lambda state: change(getattr(state, name))


STEP_ERRORS: dict[str, tuple[Callable[[NormalizedItems], object], str]] = {
    "averages": (spoil("averages", list.pop), "averages has 2 elements; it goes by 3"),
    "divided": (spoil("divided", list.pop), "divided has 2 elements; it goes by 3"),
    "factors": (spoil("factors", list.pop), "factors has 2 elements; it goes by 3"),
    "rates": (spoil("rates", list.pop), "rates has 8 elements; it goes by 9"),
    "rms": (lambda state: state.rates.__setitem__(2, -1.0), "rms is -1; it is positive"),
    "too many averages": (
        spoil("averages", lambda t: t.__setitem__(0, torch.ones(11))),
        "averages[0] must be contiguous",
    ),
    "averages, dtype": (
        spoil("averages", lambda t: t.__setitem__(0, t[0].to(B))),
        "directions[0] and averages[0] must be floating-point",
    ),
    "two dimensions": (
        spoil("directions", lambda t: t.__setitem__(0, torch.ones(10, 6))),
        "directions[0] must be a contiguous stack of matrices",
    ),
    "other matrices": (
        spoil("directions", lambda t: t.__setitem__(0, torch.ones(1, 10, 6))),
        "directions[0] must be 2 matrices of 30 elements",
    ),
    "divided alone": (
        spoil("divided", lambda t: t.__setitem__(2, torch.ones(2, 5, 6))),
        "divided[2] is given for an item without averages",
    ),
    "meeting": (
        lambda state: setattr(state, "meeting", torch.zeros(3, dtype=D)),
        "meeting must be a contiguous float64 tensor of at least",
    ),
}


@needs_extension
@pytest.mark.parametrize("case", STEP_ERRORS)
def test_errors_of_a_step(case: str) -> None:
    """In words that name the argument, before anything is written."""
    change, message = STEP_ERRORS[case]
    state = normalized_items(((2, 5, 6),))
    change(state)
    old = state.each(torch.clone)
    with pytest.raises(RuntimeError, match=re.escape(message)):
        state.run(torch.ops.steepest)
    for (name, a), (_, b) in zip(state.written(), old.written(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=name)


@needs_extension
def test_opcheck_of_a_step() -> None:
    state = normalized_items(((2, 5, 6), (1, 3, 8)))
    lists = (state.directions, [], state.params, [], [], state.factors, state.averages, state.divided)
    table = (state.table.rows, state.table.sums, state.table.scratch, state.meeting)
    op = torch.ops.steepest.normalize_and_apply_update.default
    torch.library.opcheck(op, (*lists, *table, *state.items.numbers, state.rates))
