"""The diagonal preconditioner against its formula written with numpy, and its pseudo-inverse at eps = 0."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steepest.parts import Diagonal, Hyper, Identity
from support.problems import FEW, gap, gaussian

POWERS = [1 / 6, 1 / 4, 1 / 2]


def observed(diagonal: Diagonal, grads: list[torch.Tensor], hyper: Hyper) -> dict[str, torch.Tensor]:
    state = diagonal.init(grads[0])
    for g in grads:
        state = diagonal.observe(state, g, hyper)
    return state


def plain_d(diagonal: Diagonal, grads: list[torch.Tensor], beta2: float, eps: float) -> torch.Tensor:
    """D from all gradients at once, one formula a line."""
    g, p, t = torch.stack(grads).numpy(), diagonal.power, len(grads)
    if diagonal.average == "sum":
        v = (g**2).sum(axis=0)
    else:
        v = (1 - beta2) * sum(beta2 ** (t - 1 - k) * g[k] ** 2 for k in range(t))
    c = (1 - beta2**t) ** (2 * p) if diagonal.bias_correction else 1.0
    squared = (v ** (2 * p) + eps) / c if diagonal.eps_inside else v ** (2 * p) / c + eps
    return torch.from_numpy(np.sqrt(squared))


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("eps_inside", [True, False])
@pytest.mark.parametrize("average, bias_correction", [("ema", True), ("ema", False), ("sum", False)])
@FEW
@given(steps=st.integers(1, 6), eps=st.sampled_from([0.0, 1e-8, 0.1]), seed=st.integers(0, 99))
def test_d_is_the_formula(
    power: float, eps_inside: bool, average: str, bias_correction: bool, steps: int, eps: float, seed: int
) -> None:
    diagonal = Diagonal(power, average, bias_correction, eps_inside)  # type: ignore[arg-type]
    grads, x = list(gaussian(steps, 3, 4, seed=seed)), gaussian(3, 4, seed=seed + 1)
    hyper = Hyper(0.1, beta2=0.97, eps=eps)
    state, step = observed(diagonal, grads, hyper), torch.tensor(float(steps))
    wanted = x / plain_d(diagonal, grads, 0.97, eps)
    assert gap(diagonal.into(state, x, hyper, step), wanted) < 1e-13
    assert gap(diagonal.back(state, x, hyper, step), wanted) < 1e-13


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("eps_inside", [True, False])
def test_with_eps_zero_a_zero_history_maps_to_zero(power: float, eps_inside: bool) -> None:
    """0/0 = 0 in a zero column and at an isolated zero; every other entry is 1/D."""
    diagonal, hyper = Diagonal(power, eps_inside=eps_inside), Hyper(0.1, eps=0.0)
    g = gaussian(4, 3)
    g[:, 1] = 0
    g[2, 0] = 0
    state, step = observed(diagonal, [g, 2 * g], hyper), torch.tensor(2.0)
    for found in (diagonal.into(state, g, hyper, step), diagonal.back(state, torch.ones_like(g), hyper, step)):
        assert torch.equal(found == 0, g == 0)
        assert torch.isfinite(found).all()
    d = plain_d(diagonal, [g, 2 * g], hyper.beta2, 0.0)  # type: ignore[arg-type]
    assert gap(diagonal.back(state, torch.ones_like(g), hyper, step)[g != 0], 1 / d[g != 0]) < 1e-13


def test_with_half_power_and_eps_zero_the_first_step_reads_signs() -> None:
    """D = |g| after one gradient, whatever beta2: into(g) = sign(g)."""
    diagonal, g, hyper = Diagonal(0.5), gaussian(4, 3), Hyper(0.1, beta2=0.999, eps=0.0)
    state = observed(diagonal, [g], hyper)
    assert gap(diagonal.into(state, g, hyper, torch.tensor(1.0)), g.sign()) < 1e-14


@pytest.mark.parametrize("eps_inside", [True, False])
@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_numbers_may_be_tensors(eps_inside: bool, eps: float) -> None:
    diagonal, grads, step = Diagonal(0.25, eps_inside=eps_inside), list(gaussian(3, 4, 3)), torch.tensor(3.0)
    grads[0][0] = grads[1][0] = grads[2][0] = 0
    floats = Hyper(0.1, beta2=0.9, eps=eps)
    tensors = Hyper(*(torch.tensor(n, dtype=torch.float64) for n in (0.1, 0.0, 0.9, 0.9, eps)))
    x = gaussian(4, 3, seed=5)
    wanted = diagonal.into(observed(diagonal, grads, floats), x, floats, step)
    assert gap(diagonal.into(observed(diagonal, grads, tensors), x, tensors, step), wanted) < 1e-14


def test_statistics_are_kept_wide_and_inputs_untouched() -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        kept = torch.promote_types(dtype, torch.float32)
        g = gaussian(4, 3, dtype=dtype)
        copy, diagonal, hyper = g.clone(), Diagonal(), Hyper(0.1)
        first = diagonal.init(g)
        second = diagonal.observe(first, g, hyper)
        assert second["exp_avg_sq"].dtype == kept
        assert first["exp_avg_sq"].count_nonzero() == 0
        before = second["exp_avg_sq"].clone()
        assert diagonal.into(second, g, hyper, torch.tensor(1.0)).dtype == kept
        assert torch.equal(g, copy)
        assert torch.equal(second["exp_avg_sq"], before)


def test_a_small_gradient_in_bf16_still_counts() -> None:
    """1e-12 squared is nothing beside 1 in bf16, but not in its own entry."""
    g = torch.full((2, 2), 1e-12, dtype=torch.bfloat16)
    diagonal, hyper = Diagonal(0.5), Hyper(0.1, eps=0.0)
    state = observed(diagonal, [g], hyper)
    assert gap(diagonal.into(state, g, hyper, torch.tensor(1.0)), torch.ones(2, 2)) < 1e-5


def test_a_layout_is_kept() -> None:
    g = gaussian(4, 3).mT
    assert Diagonal().init(g)["exp_avg_sq"].stride() == g.stride()


def test_identity_changes_nothing_and_remembers_nothing() -> None:
    x, identity, hyper = gaussian(3, 2), Identity(), Hyper(0.1)
    assert identity.init(x) == identity.observe({}, x, hyper) == {}
    assert identity.into({}, x, hyper, None) is x
    assert identity.back({}, x, hyper, None) is x
    assert not identity.counts_steps
    assert identity.keys == ()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"power": 0.0}, "preconditioner power should be in (0, 1/2] but is: 0.0"),
        ({"power": 0.6}, "preconditioner power should be in (0, 1/2] but is: 0.6"),
        ({"average": "max"}, "second moment 'max' is not known; use 'ema' or 'sum'"),
        ({"average": "sum"}, "bias correction belongs to the average ('ema'); set bias_correction=False"),
    ],
)
def test_what_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Diagonal(**arguments)  # type: ignore[arg-type]


def test_bias_correction_without_a_step_count_is_refused() -> None:
    diagonal, g = Diagonal(), gaussian(2, 2)
    with pytest.raises(ValueError, match="needs the step count"):
        diagonal.into(diagonal.init(g), g, Hyper(0.1), None)
