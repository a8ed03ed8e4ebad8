"""One gradient of any size: what is stored stays finite, or the parameter skips the step and says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import steepest
from steepest.optimizer import MatrixOptimizer
from support.configurations import CONFIGURATIONS
from support.slow import slow
from support.training import KINDS, both_kinds, copies, give_gradients

#: KFAC wants a model and Momo a method: tests/optim/test_faults.py.
CASES = {row: case for row, case in CONFIGURATIONS.items() if case[0] not in (steepest.KFAC, steepest.Momo)}
#: Squares fit fp32 up to 1.8e19, sums of squares and what a metric makes of them earlier; the last is an entry's limit.
SIZES = (slow(1e9), slow(1e16), slow(1e18), 1e19, slow(1e25), 5e37)
STEPS, LARGE = 12, 2
#: A class of each kind, and every third row with options: each option is a method's, or of several classes here.
QUICK = [row for i, row in enumerate(CASES) if (i % 3 == 0 if CASES[row][1] else CASES[row][0] in KINDS)]
every_case = pytest.mark.parametrize("name", [row if row in QUICK else slow(row) for row in CASES])


def train(
    name: str, size: float, dtype: torch.dtype
) -> tuple[MatrixOptimizer, list[torch.nn.Parameter], list[torch.Tensor]]:
    """Twelve steps, of which the third has gradients of this size: it, its parameters, and these before the third."""
    cls, extra = CASES[name]
    optimizer, params = both_kinds(cls, dtype, lr=1e-3, **extra)
    given: dict[str, Any] = {"loss": 1.0} if extra.get("lower_bound") is not None else {}
    before = copies(params)
    for step in range(STEPS):
        give_gradients(params, step)
        if step == LARGE:
            before = copies(params)
            for p in params:
                p.grad = (p.grad.double() * size).to(dtype)
        optimizer.step(**given)
    return optimizer, params, before


def expect_finite(optimizer: MatrixOptimizer, params: list[torch.nn.Parameter]) -> None:
    for p in params:
        assert p.isfinite().all()
        for key, value in optimizer.state[p].items():
            # The residual of a root that was not taken is infinite.
            assert value.isfinite().all() or key.endswith("residual"), key


def skipped(optimizer: MatrixOptimizer) -> int:
    return sum(int(count) for count in optimizer.skipped_updates().values())


@pytest.mark.parametrize("size", SIZES)
@every_case
def test_what_is_stored_is_finite(name: str, size: float) -> None:
    optimizer, params, _ = train(name, size, torch.float32)
    expect_finite(optimizer, params)
    # Beside a matrix of every class there is an AdamW vector, or one by the class's own elementwise rule.
    assert skipped(optimizer) <= len(params)
    if size > 1e20 and name in ("MuAdam", "SOAP", "Shampoo", "KLShampoo", "Adam", "AdaGrad", "MuonMax"):
        assert skipped(optimizer) > 0


@every_case
def test_fp64_takes_what_fp32_does_not(name: str) -> None:
    """Squares of 1e150 fit; sums of them are not asked for more than they hold."""
    if "momentum_dtype" in name:
        pytest.skip("a momentum in 16 bits holds no more than fp32")
    sums = name == "AdaGrad" or name.startswith("Shampoo") or "shampoo_beta=1" in name
    optimizer, params, _ = train(name, 1e140 if sums else 1e150, torch.float64)
    expect_finite(optimizer, params)
    # Factors in bf16 hold what fp32 does, whatever the gradient has: the four matrices.
    assert skipped(optimizer) == (4 if "factor_dtype" in name else 0)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_step_that_is_not_taken_is_counted_and_changes_nothing(backend: str) -> None:
    """One parameter of two has the gradient; the other one steps."""
    params = [torch.nn.Parameter(torch.ones(4, 3)) for _ in range(2)]
    optimizer = steepest.MuAdam(params, lr=1e-2, backend=backend)
    for size in (1.0, 1e20):
        for p, scale in zip(params, (size, 1.0), strict=True):
            p.grad = torch.linspace(-1, 1, 12).view(4, 3) * scale
        before, states = copies(params), [{k: t.clone() for k, t in optimizer.state[p].items()} for p in params]
        optimizer.step()
    assert torch.equal(params[0], before[0])
    assert all(torch.equal(optimizer.state[params[0]][key], value) for key, value in states[0].items())
    assert not torch.equal(params[1], before[1])
    assert skipped(optimizer) == 1


#: Those whose steps read the weights.
WEIGHTS = (
    *(row for row in CASES if CASES[row][0] in (steepest.Fromage, steepest.TrustRegion, steepest.OrthogonalSGDM)),
    "Muon(constraint='frobenius', weight_decay=0.0)",
    "MuonMax(lower_bound=0.0)",
)


@pytest.mark.parametrize("size", [1e25, 1e-40])
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_of_any_size_stay_finite(name: str, size: float) -> None:
    """Squares of 1e25 and of 1e-40 leave fp32."""
    cls, extra = CASES[name]
    optimizer, params = both_kinds(cls, torch.float32, lr=1e-3, **extra)
    with torch.no_grad():
        for p in params:
            p.mul_(size)
    given: dict[str, Any] = {"loss": 1.0} if "lower_bound" in extra else {}
    for step in range(4):
        give_gradients(params, step)
        optimizer.step(**given)
    expect_finite(optimizer, params)


@pytest.mark.parametrize("gradients, weights", [(1.0, 1e25), (1e-40, 1.0), (1e30, 1e-30)])
def test_a_step_of_fromage_is_as_long_as_the_weight_is(gradients: float, weights: float) -> None:
    g = torch.linspace(-1, 2, 12, dtype=torch.float64).view(4, 3)
    p = torch.nn.Parameter((g.flip(0) * weights).float())
    before, direction = p.detach().double(), (g * gradients).float().double()
    wanted = (before - 0.1 * before.norm() * direction / direction.norm()) / (1 + 0.1**2) ** 0.5
    p.grad = (g * gradients).float()
    steepest.Fromage([p], lr=0.1).step()
    assert float((p.detach().double() - wanted).norm() / wanted.norm()) < 1e-6


@pytest.mark.parametrize("norm", ["frobenius", "rows", "columns"])
def test_the_nearest_point_of_a_ball_is_found_for_large_weights(norm: str) -> None:
    """By weight decay inside the model the weights are the direction's input."""
    runs = []
    for dtype in (torch.float32, torch.float64):
        p = torch.nn.Parameter(torch.linspace(-1e25, 2e25, 12, dtype=torch.float64).view(4, 3).to(dtype))
        p.grad = torch.ones_like(p)
        before = p.detach().double().clone()
        steepest.TrustRegion([p], lr=1e24, weight_decay=0.5, norm=norm, composite="ridge").step()
        runs.append(p.detach().double() - before)
    assert float((runs[0] - runs[1]).norm() / runs[1].norm()) < 1e-5
