"""Which parameters Muon steps by one call, and that it is the same step, to the bit, whichever way they go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest
from steepest.ops import backend, cpu_chain
from steepest.step import plan
from steepest.step.along_polar import AlongPolar
from support.gradients import grad_of, one_is_bad, one_is_strided, turned
from support.operations import Operations
from support.training import copies, give_gradients, same_bits

pytestmark = pytest.mark.skipif(
    not cpu_chain.compiled(torch.float32), reason="no products are compiled for this processor"
)
SHAPES = ((16, 16), (64, 40), (3, 20, 30), (200, 160), (6, 3, 5, 5), (1, 1), (1, 9), (300, 20), (16, 16))


def made(kind: str = "Muon", dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, list[nn.Parameter]]:
    generator = torch.Generator().manual_seed(3)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    groups = [{"params": params[:5]}, {"params": params[5:], "lr": 0.03, "weight_decay": 0.2}]
    return getattr(steepest, kind)(groups, **{"lr": 1e-2, **options}), params


def ways(optimizer: Any) -> list[type]:
    return [type(executor) for executor in optimizer._plan.executors]


def one_is_late(params: list[nn.Parameter], step: int) -> None:
    if step < 3:
        params[2].grad = None


def some_are_zero(params: list[nn.Parameter], step: int) -> None:
    grad_of(params[0]).zero_()
    grad_of(params[2])[1].zero_()


def after_steps(
    change: Callable[[list[nn.Parameter], int], None] | None = None, steps: int = 6, **options: Any
) -> tuple[list[Tensor], str, list[type]]:
    """Weights and state, what was measured last, and who took the steps."""
    scaled = options.pop("scaled", False)
    optimizer, params = made(**options)
    for step in range(steps):
        give_gradients(params, step)
        if change is not None:
            change(params, step)
        if scaled:
            for p in params:
                if p.grad is not None:
                    p.grad *= 64
            optimizer.found_inf, optimizer.grad_scale = torch.tensor(float(step == 2)), torch.tensor(64.0)
        optimizer.step()
    state = [t.clone() for p in params for t in optimizer.state[p].values()]
    return copies(params) + state, str(optimizer.metrics()), ways(optimizer)


OPTIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "auto": {"polar": "auto"},
    "exact": {"polar": "exact"},
    "turbo": {"polar": "turbo"},
    "in Adam's metric": {"kind": "MuAdam"},
    "scale-invariant": {"kind": "MuAdamSANIA"},
    "without momentum that looks ahead": {"nesterov": False, "maximize": True},
    "bf16": {"dtype": torch.bfloat16},
    "bf16 and its mantissa": {"dtype": torch.bfloat16, "keep_mantissa": True},
    "rounded at random": {"dtype": torch.bfloat16, "stochastic_rounding": True},
    "momentum in bf16": {"momentum_dtype": torch.bfloat16},
    "a matrix at a time": {"max_workspace_bytes": 1},
    "lr in a tensor": {"lr": torch.tensor(0.01, dtype=torch.float64)},
    "a scaler": {"scaled": True},
    "cautious decay": {"cautious_wd": True, "weight_decay": 0.1},
}
CHANGES = (one_is_late, one_is_strided, turned, some_are_zero)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(
    ("options", "threads"),
    [*((options, 1) for options in OPTIONS.values()), ({"polar": "auto"}, 2)],
    ids=[*OPTIONS, "on two threads"],
)
def test_steps_have_the_bits_of_the_ops(
    options: dict[str, Any], threads: int, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if native and not cpu_chain.compiled(torch.bfloat16):
        pytest.skip("no bf16 products are compiled for this processor")
    monkeypatch.setattr("steepest.linalg.polar.choice.cpu_bf16", "1" if native else "0")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        state, measured, way = after_steps(one_is_bad, **options)
        monkeypatch.setattr(plan, "steps_along_polar", lambda *arguments: False)
        by_ops, measured_by_ops, way_of_ops = after_steps(one_is_bad, **options)
    finally:
        torch.set_num_threads(before)
    assert AlongPolar in way
    assert AlongPolar not in way_of_ops
    assert all(map(same_bits, state, by_ops))
    assert measured == measured_by_ops


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_gradients_of_any_kind_have_the_bits_of_the_ops(
    change: Callable[[list[nn.Parameter], int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    state, _, _ = after_steps(change, polar="auto")
    monkeypatch.setattr(plan, "steps_along_polar", lambda *arguments: False)
    by_ops, _, _ = after_steps(change, polar="auto")
    assert all(map(same_bits, state, by_ops))


@pytest.mark.parametrize(
    "options",
    [
        {"backend": "torch"},
        {"polar": "svd"},
        {"fuse_update": True},
        {"kind": "NorMuon"},
        {"kind": "Dion2"},
        {"kind": "MuonMax"},
        {"variance_reduction": 0.1},
        {"dtype": torch.float64},
    ],
    ids=str,
)
def test_what_other_ways_are_for_goes_other_ways(options: dict[str, Any]) -> None:
    assert AlongPolar not in after_steps(steps=2, **options)[2]


def test_a_backend_that_is_forced_on_the_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, params = made()
    give_gradients(params, 0)
    optimizer.step()
    assert ways(optimizer) == [AlongPolar]
    seen = []
    call = optimizer._plan.executors[0]._steps_by_address.take
    monkeypatch.setattr(optimizer._plan.executors[0]._steps_by_address, "take", lambda *a: (seen.append(1), call(*a)))
    optimizer.step()
    monkeypatch.setattr(backend, "forced", "torch")
    optimizer.step()
    monkeypatch.setattr(backend, "forced", "auto")
    optimizer.step()
    assert len(seen) == 2


def test_a_mode_that_looks_at_operations_sees_them() -> None:
    optimizer, params = made()
    give_gradients(params, 0)
    optimizer.step()
    with Operations() as operations:
        optimizer.step()
    assert any("cpu_chain" in name for name in operations.names)


@pytest.mark.parametrize(
    ("key", "dtype"), [("step", torch.float64), ("step", torch.int16), ("mantissa", torch.bfloat16)]
)
def test_state_of_a_dtype_that_is_not_handed_over_is_refused_before_it_is_written(key: str, dtype: torch.dtype) -> None:
    p = nn.Parameter(torch.randn(8, 5, generator=torch.Generator().manual_seed(3)).bfloat16())
    optimizer = steepest.MuAdam([p], keep_mantissa=True)
    give_gradients([p], 0)
    optimizer.step()
    assert ways(optimizer) == [AlongPolar]
    optimizer.state[p][key] = optimizer.state[p][key].to(dtype)
    kept = [p.detach(), *(t for name, t in optimizer.state[p].items() if name in (key, "mantissa"))]
    before = [t.clone() for t in kept]
    with pytest.raises(RuntimeError, match="float32 number|int16"):
        optimizer.step()
    assert all(map(same_bits, before, kept))


@pytest.mark.parametrize("polar", ["jordan", "auto"])
def test_a_step_moves_weights_by_polar_factors(polar: str) -> None:
    """W <- W - lr ratio U V^T for the first gradient G = U S V^T, which momentum makes no difference to."""
    p = nn.Parameter(torch.randn(48, 24, generator=torch.Generator().manual_seed(0)))
    before = p.detach().double().clone()
    optimizer = steepest.Muon([p], lr=0.1, weight_decay=0.0, polar=polar)
    p.grad = torch.randn(48, 24, generator=torch.Generator().manual_seed(1))
    u, _, vh = torch.linalg.svd(p.grad.double(), full_matrices=False)
    optimizer.step()
    assert ways(optimizer) == [AlongPolar]
    moved = before - p.detach().double()
    moved /= moved.norm() / (u @ vh).norm()
    assert float((moved - u @ vh).norm() / (u @ vh).norm()) < (0.25 if polar == "jordan" else 0.12)
