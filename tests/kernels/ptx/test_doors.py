"""What the doors of csrc/ops do on a GPU besides launching: what a launch that fails leaves, and what is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ptx.kernels import Guards, Kernels
from ptx.small_polar import SmallPolar
from steepest.linalg.chain import chain
from steepest.linalg.coefficients import SCHEDULES
from steepest.ops import eigh
from steepest.ops.normalize import scratch_for
from support import fused_ops
from support.chain_numbers import given, grams, kernel
from support.normalized_items import normalized_items
from support.singular_values import gaussian

pytestmark = [pytest.mark.kernels, pytest.mark.orders(1)]


def fused(ops: Any) -> None:
    state = fused_ops.random_state(fused_ops.SHAPES[:3], fused_ops.PROGRAMS[:1])
    fused_ops.grad_stats(ops, state, None, None)
    fused_ops.update_moments(ops, state)
    fused_ops.apply_update(ops, state)


def numbers(ops: Any) -> None:
    kernel(ops, grams(8, torch.float32), given(SCHEDULES["auto"]), True, 1e-7)


def normalized(ops: Any) -> None:
    u, scratch = torch.ones(1, 2, 3), scratch_for([(1, 2, 3)], torch.device("cpu"))
    for v, divided in ((torch.ones(1, 2), []), (torch.ones(1, 2, 3), [torch.empty(1, 2, 3)])):
        factors = torch.empty(1, 1 if divided else 2)
        ops.normalize_updates([u], [v], divided, [factors], scratch, [0.9], 1e-8, 0.0)


def normalized_on_the_way(ops: Any) -> None:
    normalized_items(((1, 2, 3),)).run(ops)


def a_chain(ops: Any, dtype: torch.dtype = torch.float16, columns: int = 24) -> None:
    schedule, plan = SCHEDULES["turbo"], chain(SCHEDULES["turbo"], ())
    x = (gaussian(16, columns) / 8).to(dtype)[None]
    constants = [value for row in plan.constants for value in row]
    rest = (*plan.packed, constants, plan.powers, schedule.slacks, True, 1e-7, 0, False)
    ops.polar_chain([x], [torch.empty_like(x)], [torch.empty(1)], [], [], [], *rest)


def update(ops: Any) -> None:
    a, b = torch.zeros(1, 16, 8, dtype=torch.float16), torch.zeros(1, 8, 24, dtype=torch.float16)
    ops.weight_update(a, b, [torch.zeros(16, 24)], torch.ones(1), torch.ones(1))


def small(ops: Any) -> None:
    schedule, x = SCHEDULES["turbo"], gaussian(8, 8).float()[None]
    flat = [value for step in schedule.tables[0] for value in (*step, *[torch.nan] * (5 - len(step)))]
    ops.small_polar([x], [torch.empty_like(x)], [torch.empty(1)], flat, 1, [], True, 1e-7)


def refresh(ops: Any) -> None:
    P, one = torch.eye(8)[None], torch.empty(1, 8)
    ops.eigh_refresh(P, P, torch.empty_like(P), one, torch.empty(1, dtype=torch.int32), one.long(), 0, 1)


CALLS: dict[str, tuple[Callable[[Any], None], str]] = {
    "fused": (fused, "steepest::(grad_stats|update_moments|apply_update)"),
    "normalize_updates": (normalized, "steepest::normalize_updates"),
    "normalize_and_apply_update": (normalized_on_the_way, "steepest::normalize_and_apply_update"),
    "chain_numbers": (numbers, "steepest::chain_numbers"),
    "polar_chain": (a_chain, "steepest::"),
    "weight_update": (update, "steepest::symm_gemm"),
    "small_polar": (small, "steepest::small_polar"),
    "eigh_refresh": (refresh, "steepest::eigh"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_refused_launch_is_this_ops_alone(name: str, kernels: Kernels) -> None:
    """Every launch of a call is refused in turn, under the family's name; the next call finds no error."""
    call, family = CALLS[name]
    before = kernels.launches()
    call(kernels.ops)
    count = kernels.launches() - before
    assert count > 0
    for number in range(count):
        kernels.library.door_refuse(number)
        with pytest.raises(RuntimeError, match=f"{family}.*refused on purpose"):
            call(kernels.ops)
        assert not kernels.library.door_stale(), f"launch {number} of {count} leaves its error"
    kernels.library.door_refuse(-1)
    call(kernels.ops)


def test_shared_memory_is_allowed_once_and_for_the_largest(kernels: Kernels, guards: Guards) -> None:
    """A launch never takes back what another, which may be captured or about to start, has asked for."""
    polar = SmallPolar(kernels, guards)
    for rows in (64, 40, 128, 100, 136, 129):
        polar([gaussian(rows, rows).float()[None]], "turbo")
    for n in (8, 30, 20, 64, 40, 96, 70, 128, 100):
        P, one = torch.eye(n)[None], torch.empty(1, n)
        numbers = (eigh.METHODS.index("jr"), 1)
        kernels.ops.eigh_refresh(
            P, P, torch.empty_like(P), one, torch.empty(1, dtype=torch.int32), one.long(), *numbers
        )
    calls = [(each, device) for each, device, _ in kernels.allowed()]
    assert len({each for each, _ in calls}) >= 6
    assert len(calls) == len(set(calls)), "a limit is set once"


def test_clusters_are_the_devices_word(kernels: Kernels, guards: Guards) -> None:
    """Not its capability's number: what only a cluster takes is refused by name, the rest goes on."""
    polar, device = SmallPolar(kernels, guards), 0
    assert kernels.ops.cluster_launch(device)
    kernels.library.ptxsim_clusters(0)
    assert not kernels.ops.cluster_launch(device)
    with pytest.raises(
        ValueError, match="must be at most 128 with 232448 bytes of shared memory and no clusters, got 136"
    ):
        polar([gaussian(136, 140).float()[None]], "turbo")
    (y,), _ = polar([gaussian(128, 140).float()[None]], "turbo")
    assert y.isfinite().all()


def test_what_hopper_does_not_take(kernels: Kernels) -> None:
    with pytest.raises(RuntimeError, match="polar_chain: A has strides 320 and 20 elements; multiples of 8"):
        a_chain(kernels.ops, columns=20)
    with pytest.raises(RuntimeError, match="xs must be float16 or bfloat16"):
        a_chain(kernels.ops, dtype=torch.float32)


@pytest.mark.parametrize("place, name", [(1, "b"), (2, "weights"), (3, "alpha"), (4, "beta")])
def test_a_tensor_of_another_device_is_named(place: int, name: str, kernels: Kernels) -> None:
    a, b = torch.zeros(1, 16, 8, dtype=torch.float16), torch.zeros(1, 8, 24, dtype=torch.float16)
    tensors = [a, b, torch.zeros(16, 24), torch.ones(1), torch.ones(1)]
    kernels.on_the_host(tensors[place])
    with pytest.raises(RuntimeError, match=rf"{name}\[0\] is not on the device of the other tensors"):
        kernels.ops.weight_update(a, b, [tensors[2]], *tensors[3:])
