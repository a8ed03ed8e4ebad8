"""The kernel that normalizes updates, by themselves and on their way into the weights, against the host's version: rows
of a warp and of a block, entries, chunks, the block that comes last and those that wait for it, and what is left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from ptx.kernels import Guards, Kernels
from steepest.ops.normalize import scratch_for
from steepest.ops.program import CHUNK
from support.normalized_items import NormalizedItems, normalized_items

pytestmark = pytest.mark.kernels

F, B, H = torch.float32, torch.bfloat16, torch.float16
BETA = (0.95, 0.5, 0.9)
over_both = pytest.mark.parametrize("over", ["rows", "entries"])


@dataclass
class Stacks:
    """What the op takes, in memory that is watched."""

    updates: list[Tensor]
    seconds: list[Tensor]
    divided: list[Tensor]
    factors: list[Tensor]
    scratch: Tensor

    @staticmethod
    def of(updates: Sequence[Tensor], over: str, seed: int = 0) -> Stacks:
        generator = torch.Generator().manual_seed(seed)
        shapes = [u.shape[:2] if over == "rows" else u.shape for u in updates]
        seconds = [torch.rand(shape, generator=generator) for shape in shapes]
        for v in seconds:
            v.view(-1)[:1] = 0
        divided = [torch.full(u.shape, torch.nan) for u in updates] if over == "entries" else []
        factors = [torch.full(u.shape[:2] if over == "rows" else (len(u), 1), torch.nan) for u in updates]
        scratch = scratch_for([u.shape for u in updates], torch.device("cpu"))
        return Stacks(list(updates), seconds, divided, factors, scratch)

    def watched(self, guards: Guards, shift: bool = False) -> Stacks:
        """The same in other memory, every tensor between guards; shift: an element behind a multiple of 16 bytes."""

        def twin(t: Tensor) -> Tensor:
            if shift and t.numel():
                t = torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape)
            return guards.twin(t)

        fields = {k: [twin(t) for t in v] if isinstance(v, list) else guards.twin(v) for k, v in vars(self).items()}
        return Stacks(**fields)

    def run(self, ops: Any, rms: float = 0.0, rates: Sequence[float] = ()) -> Stacks:
        rates = rates or [BETA[i % len(BETA)] for i in range(len(self.updates))]
        ops.normalize_updates(*vars(self).values(), rates, 1e-8, rms)
        return self

    def made(self) -> list[Tensor]:
        return [*self.seconds, *self.divided, *self.factors]


def noise(*shape: int, dtype: torch.dtype = F, seed: int = 0) -> Tensor:
    u = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (u * torch.logspace(0, -1, shape[1])[:, None]).to(dtype)


#: Rows of a warp and, from 8192 elements on, of a block; several blocks of a matrix of either, and one of many.
SHAPES = ((2, 40, 24), (3, 5, 7), (1, 17, 1030), (1, 3, 8200), (2, 130, 3), (1, 1, 40), (2, 3, CHUNK + 8), (1, 1, 1))


def compare(kernels: Kernels, guards: Guards, wanted: Stacks, rms: float = 0.0, shift: bool = False) -> None:
    stacks = wanted.watched(guards, shift).run(kernels.ops, rms)
    wanted.run(torch.ops.steepest, rms)
    for a, b in zip(stacks.made(), wanted.made(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0, equal_nan=True)
    assert not stacks.scratch[: 1 + 2 * sum(map(len, stacks.updates))].any(), "counters are zero again"


@over_both
@pytest.mark.parametrize("capability", [90, 80])
def test_against_the_host(capability: int, over: str, kernels: Kernels, guards: Guards) -> None:
    kernels.library.ptxsim_capability(capability)
    for shift, rms in ((False, 0.0), (True, 0.25)):
        updates = [noise(*shape, dtype=(F, B, H)[i % 3], seed=i) for i, shape in enumerate(SHAPES)]
        compare(kernels, guards, Stacks.of(updates, over), rms, shift)


@pytest.mark.parametrize("dtype", [F, B, H], ids=str)
@over_both
def test_bits_in_any_company(over: str, dtype: torch.dtype, kernels: Kernels, guards: Guards) -> None:
    """In another order of warps, shifted, and in the middle of a stack behind another."""
    for shape in ((1, 9, 7), (1, 130, 24), (1, 2, 8200)):
        u = noise(*shape, dtype=dtype)
        alone = Stacks.of([u], over, seed=1)
        among = Stacks.of([noise(2, 3, 5), torch.cat([noise(*shape, dtype=dtype, seed=5), u, u])], over, seed=2)
        among.seconds[1][1:2] = alone.seconds[0]
        found = alone.watched(guards).run(kernels.ops, rates=[0.9])
        for shift in (False, True):
            moved = alone.watched(guards, shift).run(kernels.ops, rates=[0.9])
            others = among.watched(guards, shift).run(kernels.ops, rates=[0.5, 0.9])
            for i, each in enumerate((moved, others)):  # its stack, and its place there
                assert torch.equal(each.seconds[i][i], found.seconds[0][0])
                assert torch.equal(each.factors[i][i], found.factors[0][0])
                assert over == "rows" or torch.equal(each.divided[i][i], found.divided[0][0])


@over_both
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e20])
def test_what_is_not_finite(bad: float, over: str, kernels: Kernels, guards: Guards) -> None:
    """One entry of a matrix of several blocks, beside a matrix of zeros."""
    u = noise(3, 130, 24)
    u[0, 70, 5] = bad
    u[2] = 0
    stacks = Stacks.of([u], over)
    old = stacks.seconds[0].clone()
    compare(kernels, guards, stacks)
    spoilt = (0, 70) if over == "rows" else (0, 70, 5)
    assert stacks.seconds[0][spoilt] == old[spoilt]
    assert not stacks.factors[0][0].any()
    assert not stacks.factors[0][2].any()


def test_entries_in_place(kernels: Kernels, guards: Guards) -> None:
    stacks = Stacks.of([noise(2, 40, 24)], "entries")
    in_place = stacks.watched(guards)
    in_place.divided = in_place.updates
    in_place.run(kernels.ops)
    stacks.run(torch.ops.steepest)
    torch.testing.assert_close(in_place.updates[0], stacks.divided[0], rtol=1e-5, atol=0)


@pytest.mark.orders(1)
@over_both
def test_more_stacks_than_a_launch_takes(over: str, kernels: Kernels, guards: Guards) -> None:
    """With a matrix of several blocks in each launch: partials are used again, counters are each matrix' own."""
    updates = [noise(1, 65 if i in (0, 180) else 2, 3, seed=i) for i in range(200)]
    before = kernels.launches()
    compare(kernels, guards, Stacks.of(updates, over))
    assert kernels.launches() - before == 2


def test_a_scratch_serves_every_call(kernels: Kernels, guards: Guards) -> None:
    stacks = Stacks.of([noise(2, 130, 24), noise(1, 3, 8200)], "rows")
    ours = stacks.watched(guards)
    for _ in range(3):
        ours.run(kernels.ops)
        stacks.run(torch.ops.steepest)
        for a, b in zip(ours.made(), stacks.made(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=0)


# ---- on the way into the weights -----------------------------------------------------------------------------------


def compare_steps(kernels: Kernels, guards: Guards, wanted: NormalizedItems, steps: int = 1) -> None:
    """Every step against the host's from where that was."""
    ours = wanted.each(guards.twin)
    for _ in range(steps):
        ours.run(kernels.ops)
        wanted.run(torch.ops.steepest)
        for (name, a), (_, b) in zip(ours.written(), wanted.written(), strict=True):
            close = {"rtol": 2**-7, "atol": 2**-8} if a.dtype == B else {"rtol": 2e-5, "atol": 2e-6}
            torch.testing.assert_close(a, b, **close, equal_nan=True, msg=f"{name}: {{}}".format)
            a.copy_(b)
        assert not ours.counters().any(), "counters, flags and the ticket are zero again"


@pytest.mark.parametrize("multiprocessors", [1, 4])
@pytest.mark.parametrize("turned", [False, True])
def test_steps_against_the_host(turned: bool, multiprocessors: int, kernels: Kernels, guards: Guards) -> None:
    """Rows, entries and neither in one call, of items that are flat and strided, on few blocks at once and on many."""
    kernels.library.ptxsim_multiprocessors(multiprocessors)
    before = kernels.launches()
    compare_steps(kernels, guards, normalized_items(refused=(2, 9, 20), turned=turned))
    assert kernels.launches() - before == 1 + turned


@pytest.mark.parametrize("capability", [90, 80])
@pytest.mark.parametrize("kind", ["rows", "entries"])
def test_a_meeting_serves_every_step(kind: str, capability: int, kernels: Kernels, guards: Guards) -> None:
    """Three steps in the same memory, of which one is not taken by some."""
    kernels.library.ptxsim_capability(capability)
    wanted = normalized_items(((2, 130, 24), (1, 3, 8200)), (kind,), shift=True)
    compare_steps(kernels, guards, wanted, 2)
    wanted.table.rows[0, 0] = 0
    compare_steps(kernels, guards, wanted)


def test_nothing_is_normalized_where_no_step_is_taken(kernels: Kernels, guards: Guards) -> None:
    """And nobody waits for it."""
    wanted = normalized_items(refused=range(24))
    ours = wanted.each(guards.twin).run(kernels.ops)
    for (name, a), (_, b) in zip(ours.written(), wanted.written(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=f"{name}: {{}}".format)
    assert not ours.counters().any()


def test_items_that_are_not_normalized_are_those_of_apply_update(kernels: Kernels, guards: Guards) -> None:
    """In the kernel that has no part of normalization, to the bit."""
    state = normalized_items(kinds=("none", "rows"))
    alone = normalized_items(kinds=("none",))
    ours, apart = state.each(guards.twin).run(kernels.ops), alone.each(guards.twin)
    lists = (apart.directions, [], apart.params, [], [], apart.factors)
    kernels.ops.apply_update(*lists, apart.table.rows, apart.table.sums, apart.table.scratch, *apart.items.numbers)
    for a, b in zip(ours.params, apart.params, strict=False):
        assert torch.equal(a, b)
    assert torch.equal(ours.table.sums[: len(apart.table.sums)], apart.table.sums)


@pytest.mark.orders(1)
@pytest.mark.parametrize("kind", ["rows", "entries"])
def test_more_items_than_a_launch_takes(kind: str, kernels: Kernels, guards: Guards) -> None:
    """With a matrix of several blocks in each launch, whose flag no other has."""
    shapes = [(1, 130, 3) if i in (0, 180) else (1, 2, 3) for i in range(200)]
    before = kernels.launches()
    compare_steps(kernels, guards, normalized_items(shapes, (kind,)))
    assert kernels.launches() - before == 2
