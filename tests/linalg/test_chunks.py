"""Batches cut so that a chain's squares stay in the L2 cache: the planner's arithmetic, and bits that do not change."""

from __future__ import annotations

import random
from dataclasses import astuple
from typing import Any

import pytest
import torch
from torch import Tensor

from steepest.chunking import chunk_by_bytes
from steepest.linalg.chain import Apply, Chain, Gram, Node, Product, Sum, chain
from steepest.linalg.coefficients import SCHEDULES
from steepest.linalg.polar import workspace_bytes
from steepest.linalg.scaling import prescaled
from steepest.ops import backend
from steepest.ops.polar_chain import polar_chain
from steepest.tools import planner
from steepest.tools.planner import Stack
from support.singular_values import with_spectrum
from support.slow import slow

pytestmark = pytest.mark.skipif(backend.extension is None, reason=f"{backend.extension_reason}")

MULTIPROCESSORS, L2 = 132, 50 << 20
RESTARTS: tuple[tuple[int, ...], ...] = ((2,), (1, 2, 3))
CHAINS = {(name, restarts): chain(SCHEDULES[name], restarts) for name in ("auto", "exact") for restarts in RESTARTS}
Found = dict[str, Any]


def chunks_of(plan: Chain, stacks: list[Stack], l2_bytes: int = L2) -> Found:
    assert backend.extension is not None
    found: Found = backend.extension.polar_chunks(*plan.packed, list(map(astuple, stacks)), MULTIPROCESSORS, l2_bytes)
    return found


def buffer_bytes(stacks: list[Stack]) -> dict[str, int]:
    shaped = sum(2 * s.matrices * s.rows * s.columns for s in stacks)
    square = sum(2 * s.matrices * s.short**2 for s in stacks)
    return {name: shaped if name in "xy" else square for name in ("x", "y", "gram", "z", "t", "q", "p")}


def working_set(plan: Chain, stacks: list[Stack]) -> int:
    size = buffer_bytes(stacks)
    return sum(size[name] for name in {"x", "y", "gram"} | {node.out for node in plan.nodes})


def touches(plan: Chain) -> list[list[tuple[str, bool]]]:
    """What every launch reads, in the order of the buffers, and then writes."""
    order = ("x", "y", "gram", "z", "t", "q", "p")

    def of(node: Node) -> list[tuple[str, bool]]:
        reads = {node.x} if isinstance(node, (Gram, Apply)) else {node.a}
        reads |= {node.q} if isinstance(node, Apply) else {node.b} if isinstance(node, Product) else set()
        reads |= {node.c} if isinstance(node, (Product, Sum)) and node.beta != 0 else set()
        return [*((name, False) for name in sorted(reads, key=order.index)), (node.out, True)]

    return [of(Gram("gram", "x")), [("gram", False)], *map(of, plan.nodes)]


def traffic(plan: Chain, stacks: list[Stack], capacity: int) -> int:
    """Bytes between cache and memory, by how many bytes were used since a buffer last was."""
    size = buffer_bytes(stacks)
    line = [touch for launch in touches(plan) for touch in launch]
    moved = 0

    def stays(begin: int, end: int) -> bool:
        return sum(size[name] for name in {name for name, _ in line[begin:end]}) <= capacity

    for name in size:
        own = [i for i, (other, _) in enumerate(line) if other == name]
        held = dirty = False
        for i, following in zip(own, [*own[1:], None]):
            writes = line[i][1]
            moved += 0 if held or writes else size[name]
            dirty = writes or (dirty and held)
            held = stays(i, len(line) if following is None else following)
            written = not held or (following is None and name == plan.result)
            moved += size[name] if dirty and written else 0
    return moved


def model(plan: Chain, stacks: list[Stack], l2_bytes: int) -> tuple[int, float]:
    """(bytes, clocks) of one chunk."""
    size, moved = buffer_bytes(stacks), traffic(plan, stacks, l2_bytes // 4 * 3)
    clocks = 0.5 * moved / 1900
    for node, own in zip([Gram("gram", "x"), None, *plan.nodes], touches(plan), strict=True):
        time = 3000.0 * len(stacks)
        if node is not None and not isinstance(node, Sum):
            stage = planner._stage(node, stacks, [stacks], False, MULTIPROCESSORS)
            time = sum(3000 + launch.clocks(MULTIPROCESSORS) for launch in stage.launches)
        clocks += max(time, sum(size[name] for name, _ in own) / 3500)
    return moved, clocks


def part(stacks: list[Stack], chunk: list[tuple[int, int]]) -> list[Stack]:
    return [Stack(n, s.rows, s.columns) for s, (_, n) in zip(stacks, chunk, strict=True) if n]


def random_stacks(rng: random.Random) -> list[Stack]:
    found = []
    for _ in range(rng.choice([1, 1, 1, 2, rng.randrange(1, 12)])):
        m = 8 * rng.choice([rng.randrange(1, 40), rng.randrange(1, 300)])
        n = m * rng.choice([1, 1, 2, 3, 4])
        rows, columns = rng.choice([(m, n), (n, m)])
        found.append(Stack(rng.choice([1, 2, rng.randrange(1, 40), rng.randrange(1, 300)]), rows, columns))
    return found


@pytest.mark.parametrize("seed", [0, *map(slow, range(1, 4))])
def test_every_matrix_is_in_one_chunk(seed: int) -> None:
    """Thousands of lists: in order, once each; one chunk where all fit; cut only where the model gains."""
    rng, several = random.Random(seed), 0
    for _ in range(600):
        plan, stacks = rng.choice(list(CHAINS.values())), random_stacks(rng)
        l2_bytes = rng.choice([L2, L2, 6 << 20, 40 << 20, 128 << 20])
        found = chunks_of(plan, stacks, l2_bytes)
        reached = [0] * len(stacks)
        for chunk in found["chunks"]:
            assert any(count for _, count in chunk)
            for i, (first, count) in enumerate(chunk):
                assert count == 0 or first == reached[i]
                reached[i] += count
        assert reached == [stack.matrices for stack in stacks]
        # In order of the list too: a chunk has stacks that follow one another.
        own = [[i for i, (_, count) in enumerate(chunk) if count] for chunk in found["chunks"]]
        assert all(a[-1] <= b[0] for a, b in zip(own, own[1:]))
        fits = working_set(plan, stacks) <= l2_bytes // 4 * 3
        alone = sum(reached) == 1
        assert (found["clocks_whole"] == 0) == (fits or alone)
        if fits or len(found["chunks"]) == 1:
            assert len(found["chunks"]) == 1
            assert (found["bytes"], found["clocks"]) == (found["bytes_whole"], found["clocks_whole"])
        else:
            several += 1
            assert found["clocks"] < 0.97 * found["clocks_whole"]
            assert found["bytes"] < found["bytes_whole"]
        assert chunks_of(plan, stacks, l2_bytes) == found
    assert several > 25


def test_bytes_and_clocks_of_the_model() -> None:
    rng = random.Random(0)
    for _ in range(120):
        plan, stacks, l2_bytes = rng.choice(list(CHAINS.values())), random_stacks(rng), rng.choice([L2, 20 << 20])
        found = chunks_of(plan, stacks, l2_bytes)
        if not found["clocks_whole"]:
            continue
        bytes_, clocks = model(plan, stacks, l2_bytes)
        assert found["bytes_whole"] == bytes_
        assert found["clocks_whole"] == pytest.approx(clocks, rel=1e-9)
        if len(found["chunks"]) > 20:
            continue
        each = [model(plan, part(stacks, chunk), l2_bytes) for chunk in found["chunks"]]
        assert found["bytes"] == sum(own for own, _ in each)
        assert found["clocks"] == pytest.approx(sum(own for _, own in each), rel=1e-9)


@pytest.mark.parametrize("stack", [Stack(48, 768, 768), Stack(24, 1024, 4096), Stack(12, 768, 3072)])
def test_no_other_number_of_chunks_is_better(stack: Stack) -> None:
    plan = CHAINS["auto", (2,) if stack.columns > stack.rows else (1, 2, 3)]
    found = chunks_of(plan, [stack])
    times = {}
    for count in {-(-stack.matrices // size) for size in range(1, stack.matrices + 1)}:
        sizes = [0] * count
        for i in range(stack.matrices):
            sizes[(2 * i + 1) * count // (2 * stack.matrices)] += 1
        times[count] = sum(model(plan, [Stack(n, stack.rows, stack.columns)], L2)[1] for n in sizes)
    best = min(times, key=times.__getitem__)
    assert len(found["chunks"]) == (best if times[best] < 0.97 * times[1] else 1)


def run(plan: Chain, stacks: list[Tensor], chunks: int) -> tuple[list[Tensor], list[Tensor]]:
    schedule = SCHEDULES["auto"]
    xs, ys = [x.clone() for x in stacks], [torch.full_like(x, torch.nan) for x in stacks]
    slacks = [torch.full((len(x),), torch.nan, device=x.device) for x in stacks]
    numbers = (plan.packed, plan.constants, plan.powers, schedule.slacks)
    polar_chain(xs, ys, slacks, *numbers, tight=True, eps=1e-7, chunks=chunks)
    return (xs if plan.result == "x" else ys), slacks


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("restarts", RESTARTS, ids=str)
def test_chunks_change_no_bit(restarts: tuple[int, ...], dtype: torch.dtype) -> None:
    """Wide, tall and square stacks, with chunks that begin and end inside of them or have one matrix."""
    plan = CHAINS["auto", restarts]
    spectra = ("gaussian", "root", "flat", "log", "gaussian")
    stacks = [
        prescaled(torch.stack([with_spectrum(m, n, spectrum) for spectrum in spectra]).float(), dtype)
        for m, n in ((8, 24), (24, 16), (16, 16))
    ]
    whole, slacks = run(plan, stacks, 1)
    for count in (0, 2, 3, 4, 15, 100):
        found, own = run(plan, stacks, count)
        for a, b in zip((*whole, *slacks), (*found, *own), strict=True):
            assert torch.equal(a, b), count


def test_chunks_of_runs_that_fit_into_a_budget() -> None:
    """What `max_workspace_bytes` cuts first is cut again, and a matrix is what it is alone."""
    plan = CHAINS["auto", (2,)]
    x = prescaled(torch.stack([with_spectrum(16, 40, "root") for _ in range(7)]).float(), torch.float16)
    (whole,), (slack,) = run(plan, [x], 1)
    budget = 3 * workspace_bytes(16, 40, x.dtype)
    runs = list(chunk_by_bytes(x.split(1), lambda each: len(each) * workspace_bytes(16, 40, x.dtype), budget))
    assert [len(each) for each in runs] == [3, 3, 1]
    parts = [run(plan, [torch.cat(each)], 2) for each in runs]
    assert torch.equal(torch.cat([found for (found,), _ in parts]), whole)
    assert torch.equal(torch.cat([own for _, (own,) in parts]), slack)


@pytest.mark.parametrize("invariant", [False, True])
def test_the_chain_is_told_whether_bits_may_depend_on_the_batch(
    invariant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[bool] = []
    monkeypatch.setattr(torch.ops.steepest, "polar_chain", lambda *arguments: told.append(arguments[-1]))
    monkeypatch.setattr(backend, "batch_invariant", invariant)
    polar_chain([], [], [], ([], []), (), (), (), tight=True, eps=0.0)
    assert told == [invariant]


def test_a_number_of_chunks_below_zero_is_refused() -> None:
    with pytest.raises(RuntimeError, match="chunks is -1"):
        run(CHAINS["auto", (2,)], [torch.zeros(1, 8, 8, dtype=torch.float16)], -1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_chunks_on_a_gpu(dtype: torch.dtype) -> None:
    """Within the order of sums: where a tile is cut depends on how many there are."""
    plan = CHAINS["auto", (2,)]
    stacks = [
        prescaled(torch.stack([with_spectrum(m, n, "root") for _ in range(6)]).float(), dtype).cuda()
        for m, n in ((256, 512), (512, 256), (136, 264))
    ]
    whole, slacks = run(plan, stacks, 1)
    for count in (0, 2, 5, 18):
        found, own = run(plan, stacks, count)
        for a, b in zip((*whole, *slacks), (*found, *own), strict=True):
            torch.testing.assert_close(a, b, rtol=0.02, atol=8 * torch.finfo(dtype).eps)
        again, _ = run(plan, stacks, count)
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
