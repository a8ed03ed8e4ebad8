"""torch.amp.GradScaler: the step unscales and skips by itself, on the device."""

from __future__ import annotations

import pytest
import torch

import steepest
from steepest.ops.multi_tensor import Scaling
from steepest.optimizer import MatrixOptimizer
from steepest.recipe import CLOCK
from steepest.step.eager import Eager
from support.slow import slow
from support.training import (
    KRONECKER,
    OPTIMIZERS,
    all_same_bits,
    both_kinds,
    copies,
    give_gradients,
    state_copies,
    train,
)

every_optimizer = pytest.mark.parametrize("cls", (*OPTIMIZERS[:2], *KRONECKER))
both_paths = pytest.mark.parametrize("backend", ["auto", slow("torch")])
SCALE = 2.0**10


def scaled_gradients(params: list[torch.nn.Parameter], step: int) -> None:
    give_gradients(params, step)
    for p in params:
        assert p.grad is not None
        p.grad.mul_(SCALE)


@every_optimizer
@both_paths
@pytest.mark.parametrize("unscale", [False, True], ids=["by the step", "before clipping"])
def test_scaled_is_unscaled(cls: type[MatrixOptimizer], backend: str, unscale: bool) -> None:
    """A power of two changes no bit."""
    (scaled, a), (plain, b) = both_kinds(cls, backend=backend), both_kinds(cls, backend=backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=1000)
    scaler.scale(torch.zeros(()))
    for step in range(3):
        scaled_gradients(a, step)
        if unscale:
            scaler.unscale_(scaled)
        scaler.step(scaled)
        scaler.update()
        give_gradients(b, step)
        plain.step()
    assert all_same_bits(a, b)
    assert not hasattr(scaled, "found_inf")


@every_optimizer
@both_paths
@pytest.mark.parametrize("scale,large,taken", [(0.5, 1.5e14, True), (0.25, 1.5e38, False)])
def test_a_gradient_too_large_once_unscaled_is_skipped(
    cls: type[MatrixOptimizer], backend: str, scale: float, large: float, taken: bool
) -> None:
    """Finite as it is stored, 1.5e38 by 4 is not; a step without a scaler's help skips that parameter."""
    optimizer, params = both_kinds(cls, backend=backend)
    train(optimizer, params, range(1))
    give_gradients(params, 1)
    assert params[0].grad is not None
    params[0].grad.view(-1)[0] = large
    before = copies(params)
    optimizer.grad_scale = torch.tensor(scale)  # type: ignore[attr-defined]
    optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
    optimizer.step()
    assert torch.equal(params[0], before[0]) != taken
    assert not torch.equal(params[1], before[1])


@every_optimizer
@both_paths
def test_one_infinity_stops_the_whole_step(cls: type[MatrixOptimizer], backend: str) -> None:
    optimizer, params = both_kinds(cls, backend=backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    scaler.scale(torch.zeros(()))
    scaled_gradients(params, 0)
    scaler.step(optimizer)
    scaler.update()
    before, states = copies(params), state_copies(optimizer)
    scaled_gradients(params, 1)
    params[-1].grad.view(-1)[0] = float("inf")  # type: ignore[union-attr]
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == SCALE / 2
    assert all_same_bits(params, before)
    for old, new in zip(states, state_copies(optimizer), strict=True):
        assert all(torch.equal(old[key], new[key]) for key in old if key != CLOCK)
    assert int(optimizer.skipped_updates()[torch.device("cpu")]) == len(params)


def test_a_traced_step_takes_the_scale_where_its_parameters_are(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [torch.nn.Parameter(torch.zeros(4, 3, device="meta"))]
    params[0].grad = torch.zeros(4, 3, device="meta")
    optimizer = steepest.MuAdam(params)
    scales: list[dict[torch.device, Scaling]] = []
    monkeypatch.setattr(Eager, "decide", lambda self, hypers, scaling, lacking: scales.append(scaling))
    for name in ("observe", "finish"):
        monkeypatch.setattr(Eager, name, lambda self: None)
    optimizer._traced_step(Scaling(torch.zeros(()), torch.ones(())))
    (scaling,) = scales[0].values()
    assert [t.device.type for t in (scaling.found_inf, scaling.grad_scale) if t is not None] == ["meta"] * 2
