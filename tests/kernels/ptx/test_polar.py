"""The ops of the polar iteration on Hopper: the numbers of a chain, whole chains of products, updates into weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ptx.kernels import Guards, Kernels
from steepest.linalg.chain import Chain, chain
from steepest.linalg.coefficients import SCHEDULES, Schedule
from steepest.linalg.scaling import prescaled
from support.chain_numbers import given, grams, kernel
from support.singular_values import with_spectrum

pytestmark = pytest.mark.kernels

H, B, F = torch.float16, torch.bfloat16, torch.float32
tiles = pytest.mark.parametrize("tile", ["wide", "small"])


@pytest.mark.parametrize("capability", [90, 80])
@pytest.mark.parametrize("dtype", [F, B, H], ids=str)
@pytest.mark.parametrize("m", [1, 64, 139])
def test_chain_numbers(m: int, dtype: torch.dtype, capability: int, kernels: Kernels) -> None:
    kernels.library.ptxsim_capability(capability)
    schedule, gram = SCHEDULES["auto"], grams(m, dtype)
    for some in (gram, gram[:1]):
        pair = (kernel(ops, some, given(schedule), True, 1e-7) for ops in (kernels.ops, torch.ops.steepest))
        for a, b in zip(*pair, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0, equal_nan=True)


# ---- chains --------------------------------------------------------------------------------------------------------


class Run:
    """One call of polar_chain on copies between guards."""

    def __init__(self, guards: Guards, stacks: Sequence[Tensor], schedule: Schedule, plan: Chain) -> None:
        self.guards, self.schedule, self.plan = guards, schedule, plan
        self.xs = [guards.twin(x) for x in stacks]
        self.ys = [guards.twin(torch.full_like(x, torch.nan)) for x in stacks]
        self.slacks = [guards.twin(torch.full((len(x),), torch.nan)) for x in stacks]

    def __call__(
        self, ops: Any, *, weights: Sequence[Tensor] = (), etas: Sequence[Tensor] = (), betas: Sequence[Tensor] = (),
        chunks: int = 0, batch_invariant: bool = False,
    ) -> list[Tensor]:  # fmt: skip
        constants = [value for row in self.plan.constants for value in row]
        numbers = (*self.plan.packed, constants, self.plan.powers, self.schedule.slacks)
        options = (self.schedule.norm == "tight", 1e-7, chunks, batch_invariant)
        lists = (self.xs, self.ys, self.slacks, list(weights), list(etas), list(betas))
        ops.polar_chain(*lists, *numbers, *options)
        return self.xs if self.plan.result == "x" else self.ys


def stacks_of(shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype) -> list[Tensor]:
    names = ("gaussian", "root", "flat", "log")
    return [
        prescaled(torch.stack([with_spectrum(m, n, names[(i + k) % 4]) for k in range(count)]).float(), dtype)
        for i, (count, m, n) in enumerate(shapes)
    ]


SHAPES = ((2, 136, 200), (1, 200, 136), (1, 72, 72))
#: More than the first 4 KB of a launch's arguments hold, and every layout of the factors.
SEVEN = ((1, 16, 24), (2, 40, 16), (1, 64, 136), (1, 136, 72), (3, 24, 24), (1, 8, 200), (1, 104, 64))


@tiles
@pytest.mark.parametrize("dtype", [H, B], ids=str)
@pytest.mark.parametrize("name, shapes", [("auto", SHAPES), ("turbo", SHAPES), ("exact", SEVEN), ("auto", SEVEN)])
def test_a_chain_is_the_hosts(
    name: str, shapes: tuple[tuple[int, int, int], ...], dtype: torch.dtype, tile: str, kernels: Kernels, guards: Guards
) -> None:
    schedule = SCHEDULES[name]
    plan = chain(schedule, (1, 2) if dtype == B else (2,))
    kernels.plan(tile)
    stacks = stacks_of(shapes, dtype)
    ours, theirs = (Run(guards, stacks, schedule, plan) for _ in range(2))
    pairs = zip(ours(kernels.ops), theirs(torch.ops.steepest), strict=True)
    for y, wanted in pairs:
        torch.testing.assert_close(y.float(), wanted.float(), rtol=0, atol=16 * torch.finfo(dtype).eps)
    for a, b in zip(ours.slacks, theirs.slacks, strict=True):
        torch.testing.assert_close(a, b, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.orders(1)
@tiles
def test_cut_tiles_chunks_and_order_do_not_count(tile: str, kernels: Kernels, guards: Guards) -> None:
    """Sums are cut the same in every order of blocks; without cuts a matrix is alone, whatever its chunk is."""
    schedule = SCHEDULES["turbo"]
    plan, stacks = chain(schedule, (2,)), stacks_of(((2, 72, 264), (1, 264, 72)), H)

    def run(seed: int, streams: str, **options: Any) -> list[Tensor]:
        kernels.seed(seed)
        kernels.plan(tile, streams)
        return Run(guards, stacks, schedule, plan)(kernels.ops, **options)

    wanted = Run(guards, stacks, schedule, plan)(torch.ops.steepest)
    cut, again = run(1, "always", chunks=1), run(2, "always", chunks=1)
    alone = run(3, "by model", batch_invariant=True)
    in_chunks = run(4, "by model", batch_invariant=True, chunks=2)
    for a, b, c, d, e in zip(cut, again, alone, in_chunks, wanted, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(c, d)
        for each in (a, c):
            torch.testing.assert_close(each.float(), e.float(), rtol=0, atol=16 * torch.finfo(H).eps)


@pytest.mark.parametrize("stored", [F, B, H], ids=str)
@pytest.mark.parametrize("dtype", [H, B], ids=str)
def test_a_chain_ends_in_weights(dtype: torch.dtype, stored: torch.dtype, kernels: Kernels, guards: Guards) -> None:
    """W <- beta W + eta d of the d that the same chain stores, in chunks that begin inside of a stack."""
    schedule = SCHEDULES["auto"]
    plan, stacks = chain(schedule, (2,)), stacks_of(((3, 16, 40), (2, 72, 24), (3, 24, 24)), dtype)
    generator = torch.Generator().manual_seed(1)
    old = [torch.randn(x.shape, generator=generator).to(stored) for stack in stacks for x in stack]
    for stack in stacks:
        stack[-1, 0, 0] = torch.nan
    etas = [guards.twin(torch.tensor([-0.1, 0.3, 0.7][: len(stack) - 1] + [0.0])) for stack in stacks]
    betas = [guards.twin(torch.tensor([0.99, 0.5, 1.0][: len(stack) - 1] + [1.0])) for stack in stacks]
    weights = [guards.twin(w) for w in old]
    Run(guards, stacks, schedule, plan)(kernels.ops, weights=weights, etas=etas, betas=betas, chunks=3)
    directions = [d for stack in Run(guards, stacks, schedule, plan)(kernels.ops) for d in stack]
    for w, before, d, eta, beta in zip(weights, old, directions, torch.cat(etas), torch.cat(betas), strict=True):
        if eta == 0:
            assert torch.equal(w, before), "not finite: left as it was"
            continue
        wanted = beta * before.float() + eta * d.float()
        largest = d.abs().max().item() * torch.finfo(dtype).eps
        torch.testing.assert_close(w.float(), wanted, rtol=torch.finfo(stored).eps, atol=largest)


@tiles
@pytest.mark.parametrize("stored", [F, B, H], ids=str)
@pytest.mark.parametrize("dtype", [H, B], ids=str)
@pytest.mark.parametrize("by_rows", [True, False])
def test_weight_update(
    by_rows: bool, dtype: torch.dtype, stored: torch.dtype, tile: str, kernels: Kernels, guards: Guards
) -> None:
    """As the host has it, in both ways that b lies; alpha 0 and beta 1 leave a matrix alone."""
    kernels.plan(tile)
    generator = torch.Generator().manual_seed(2)
    a, b, w = (torch.randn(3, *shape, generator=generator) for shape in ((130, 40), (40, 72), (130, 72)))
    a, b, w = guards.twin(a.to(dtype)), b.to(dtype), w.to(stored)
    b = guards.twin(b if by_rows else b.mT.contiguous().mT)
    alpha, beta = torch.tensor([0.5, -2.0, 0.0]), torch.tensor([0.9, 1.5, 1.0])
    a[-1] = torch.nan
    ours, theirs = ([guards.twin(each) for each in w] for _ in range(2))
    kernels.ops.weight_update(a, b, ours, alpha, beta)
    torch.ops.steepest.weight_update(a, b, theirs, alpha, beta)
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=torch.finfo(stored).eps, atol=1e-5)
    assert torch.equal(ours[-1], w[-1])
