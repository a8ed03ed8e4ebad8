"""Momentum against closed forms and against the optimizers of torch that define it."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steepest.parts import Momentum
from support.problems import FEW, gap, gaussian

BETA = st.sampled_from([0.0, 0.5, 0.9, 0.95, 0.999])


def run(momentum: Momentum, grads: list[torch.Tensor], beta: float | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(buffer, what the direction reads) after all gradients."""
    m = momentum.init(grads[0])
    for g in grads:
        m = momentum.observe(m, g, beta)
    return m, momentum.read(m, grads[-1], beta, torch.tensor(float(len(grads))))


def weighted_sum(grads: list[torch.Tensor], beta: float) -> torch.Tensor:
    return sum(beta ** (len(grads) - 1 - k) * g for k, g in enumerate(grads))


@FEW
@given(beta=BETA, steps=st.integers(1, 12), seed=st.integers(0, 99))
def test_the_buffer_is_a_weighted_sum_of_the_gradients(beta: float, steps: int, seed: int) -> None:
    grads = list(gaussian(steps, 3, 4, seed=seed))
    total = weighted_sum(grads, beta)
    assert gap(run(Momentum("heavy_ball"), grads, beta)[0], total) < 1e-14
    assert gap(run(Momentum("ema"), grads, beta)[0], (1 - beta) * total) < 1e-14


@FEW
@given(beta=BETA, steps=st.integers(1, 12), seed=st.integers(0, 99))
def test_nesterov_looks_one_gradient_further(beta: float, steps: int, seed: int) -> None:
    grads = list(gaussian(steps, 3, 4, seed=seed))
    total = weighted_sum(grads, beta)
    assert gap(run(Momentum("heavy_ball", nesterov=True), grads, beta)[1], grads[-1] + beta * total) < 1e-14
    ema = (1 - beta) * (grads[-1] + beta * total)
    assert gap(run(Momentum("ema", nesterov=True), grads, beta)[1], ema) < 1e-14


@FEW
@given(beta=BETA, steps=st.integers(1, 12), seed=st.integers(0, 99))
def test_bias_correction_makes_the_weights_sum_to_one(beta: float, steps: int, seed: int) -> None:
    grads = list(gaussian(steps, 3, 4, seed=seed))
    weights = [beta ** (steps - 1 - k) for k in range(steps)]
    wanted = sum(w * g for w, g in zip(weights, grads)) / sum(weights)
    assert gap(run(Momentum(bias_correction=True), grads, beta)[1], wanted) < 1e-12


def test_the_buffer_and_the_step_are_those_of_torch_muon() -> None:
    p = torch.nn.Parameter(torch.zeros(4, 3))
    theirs = torch.optim.Muon([p], momentum=0.9)
    grads = list(gaussian(5, 4, 3, dtype=torch.float32))
    for g in grads:
        p.grad = g.clone()
        theirs.step()
    assert torch.equal(run(Momentum(), grads, 0.9)[0], theirs.state[p]["momentum_buffer"])


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_heavy_ball_is_that_of_torch_sgd(nesterov: bool) -> None:
    p = torch.nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))
    theirs = torch.optim.SGD([p], lr=1.0, momentum=0.9, nesterov=nesterov)
    grads = list(gaussian(6, 4, 3))
    for g in grads:
        before = p.detach().clone()
        p.grad = g.clone()
        theirs.step()
    assert gap(run(Momentum("heavy_ball", nesterov=nesterov), grads, 0.9)[1], before - p.detach()) < 1e-14


@pytest.mark.parametrize(
    "momentum",
    [Momentum(), Momentum(nesterov=True), Momentum("heavy_ball", nesterov=True), Momentum(bias_correction=True)],
)
def test_beta_may_be_a_tensor(momentum: Momentum) -> None:
    grads = list(gaussian(4, 3, 4))
    as_float = run(momentum, grads, 0.9)
    as_tensor = run(momentum, grads, torch.tensor(0.9, dtype=torch.float64))
    assert gap(as_tensor[0], as_float[0]) < 1e-15
    assert gap(as_tensor[1], as_float[1]) < 1e-15


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_tensor_beta_of_another_dtype_is_taken(nesterov: bool) -> None:
    grads = list(gaussian(4, 3, 4, dtype=torch.float32))
    found = run(Momentum(nesterov=nesterov), grads, torch.tensor(0.9, dtype=torch.float64))
    assert gap(found[1], run(Momentum(nesterov=nesterov), grads, 0.9)[1]) < 1e-6


def test_dtype_of_the_buffer() -> None:
    g = gaussian(3, 4, dtype=torch.bfloat16)
    assert Momentum().init(g).dtype == torch.bfloat16
    assert Momentum(dtype=torch.float32).init(g).dtype == torch.float32


def test_a_narrow_buffer_is_averaged_and_corrected_in_the_wider_dtype() -> None:
    """0.1 g is not a bf16 number; what is read must not be rounded to one a second time."""
    momentum = Momentum(bias_correction=True, dtype=torch.bfloat16)
    g = gaussian(16, 16, dtype=torch.float32)
    m = momentum.observe(momentum.init(g), g, 0.9)
    assert m.dtype == torch.float32
    assert gap(m, 0.1 * g) < 1e-6
    stored = m.to(torch.bfloat16)
    read = momentum.read(stored, g, 0.9, torch.tensor(1.0))
    assert read.dtype == torch.float32
    assert gap(read, stored.double() / (1 - 0.9)) < 1e-6


@pytest.mark.parametrize("momentum", [Momentum(), Momentum("heavy_ball"), Momentum(bias_correction=True)])
def test_inputs_are_untouched(momentum: Momentum) -> None:
    m, g = gaussian(3, 4, seed=1), gaussian(3, 4, seed=2)
    kept = m.clone(), g.clone()
    momentum.read(momentum.observe(m, g, 0.9), g, 0.9, torch.tensor(3.0))
    assert torch.equal(m, kept[0])
    assert torch.equal(g, kept[1])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"kind": "polyak"}, "momentum kind 'polyak' is not known; use 'ema', 'heavy_ball' or 'error_feedback'"),
        ({"kind": "error_feedback", "nesterov": True}, "Nesterov momentum with error feedback is not defined"),
        ({"kind": "error_feedback", "bias_correction": True}, "bias correction belongs to the average ('ema')"),
        ({"kind": "error_feedback", "start": "first"}, "start='first' is for the average ('ema')"),
        ({"kind": "error_feedback", "interpolated": True}, "an interpolated reading is of the plain average ('ema')"),
        ({"nesterov": True, "bias_correction": True}, "Nesterov momentum with bias correction is not defined"),
        ({"kind": "heavy_ball", "bias_correction": True}, "bias correction belongs to the average ('ema')"),
    ],
)
def test_what_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Momentum(**arguments)  # type: ignore[arg-type]


def test_bias_correction_without_a_step_count_is_refused() -> None:
    with pytest.raises(ValueError, match="needs the step count"):
        Momentum(bias_correction=True).read(gaussian(2, 2), gaussian(2, 2), 0.9, None)
