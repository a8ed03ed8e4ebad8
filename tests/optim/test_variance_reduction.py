"""`variance_reduction`: gradients that the ones before correct (MARS)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest
from steepest.optimizer import MatrixOptimizer
from support.configurations import MuAdamMomo
from support.problems import gap, polar_by_svd
from support.slow import slow
from support.training import (
    EVERY,
    KRONECKER,
    both_kinds,
    build,
    check_compiled_step,
    check_resume_and_bad_gradients,
    give_gradients,
    name_of,
    noise,
    parameters,
    train,
)

GAMMA = 0.3
REDUCED: dict[str, Any] = {"variance_reduction": GAMMA}
REFUSING = (steepest.NIGT, steepest.ProdigyMuon)
TAKING = [cls for cls in EVERY if cls not in REFUSING]
SOME = [steepest.Muon, steepest.MuAdam, steepest.SOAP, steepest.MuonMax]
SCALES = pytest.mark.parametrize("size", [0.01, 1.0], ids=["short", "clipped"])


def corrected(gradients: list[Tensor], beta: float) -> list[Tensor]:
    """c of every step: Algorithm 2 of the paper with the last batch's gradient, and its clipping."""
    found = []
    for t, g in enumerate(gradients):
        before = gradients[t - 1] if t else g
        c = g + GAMMA * beta / (1 - beta) * (g - before)
        length = float(c.square().sum()) ** 0.5
        found.append(c / length if length > 1 else c)
    return found


@SCALES
@pytest.mark.parametrize("use_muon", [True, False])
def test_mars_adamw(use_muon: bool, size: float) -> None:
    """As a matrix of `Adam` and as an AdamW group of `Muon`."""
    p = nn.Parameter(noise((5, 4), 1, torch.float64))
    w, m, v = p.detach().clone(), torch.zeros(5, 4, dtype=torch.float64), torch.zeros(5, 4, dtype=torch.float64)
    numbers = {"lr": 0.02, "weight_decay": 0.1, "betas": (0.9, 0.99), "eps": 1e-8}
    optimizer = (steepest.Adam if use_muon else steepest.Muon)(
        [{"params": [p], "use_muon": use_muon, **numbers}], **REDUCED
    )
    gradients = [size * noise((5, 4), 10 + t, torch.float64) for t in range(20)]
    for t, (g, c) in enumerate(zip(gradients, corrected(gradients, 0.9), strict=True), 1):
        p.grad = g.clone()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * c, 0.99 * v + 0.01 * c * c
        w = w - 0.02 * 0.1 * w - 0.02 * (m / (1 - 0.9**t)) / ((v / (1 - 0.99**t)).sqrt() + 1e-8)
    assert gap(p.detach(), w) < 1e-10
    assert torch.equal(optimizer.state[p]["previous_gradient"], gradients[-1])


@SCALES
def test_muon_of_corrected_gradients(size: float) -> None:
    """MARS-Shampoo, whose roots are polar factors."""
    p = nn.Parameter(noise((5, 3), 2, torch.float64))
    w, m = p.detach().clone(), torch.zeros(5, 3, dtype=torch.float64)
    values: dict[str, Any] = {"lr": 0.05, "momentum": 0.8, "nesterov": False, "polar": "svd", "adjust_lr_fn": "none"}
    optimizer = steepest.Muon([p], weight_decay=0.1, **values, **REDUCED)
    gradients = [size * noise((5, 3), 30 + t, torch.float64) for t in range(20)]
    for g, c in zip(gradients, corrected(gradients, 0.8), strict=True):
        p.grad = g.clone()
        optimizer.step()
        m = 0.8 * m + 0.2 * c
        w = w - 0.05 * 0.1 * w - 0.05 * polar_by_svd(m)
    assert gap(p.detach(), w) < 1e-10


@pytest.mark.parametrize(
    ("cls", "size"),
    # Factors of a few gradients have no full rank, and of the bases of a null space rounding, as in clipping, chooses.
    [(cls, 0.01) for cls in TAKING] + [slow(cls, 1.0) for cls in TAKING if cls not in KRONECKER],
    ids=str,
)
def test_every_class_steps_by_the_corrected_gradient(cls: type[MatrixOptimizer], size: float) -> None:
    optimizer, params = both_kinds(cls, torch.float64, **REDUCED)
    plain, others = both_kinds(cls, torch.float64)
    skips = cls in (steepest.SOAP, steepest.KLSOAP, steepest.KLShampoo)  # a first gradient that is no step
    history: list[list[Tensor]] = [[] for _ in params]
    betas = [float(optimizer._hyper(group).beta1) for group in optimizer.param_groups for _ in group["params"]]
    for step in range(4):
        give_gradients(params, step)
        for p in params:
            assert p.grad is not None
            p.grad *= size
        for i, (p, q) in enumerate(zip(params, others, strict=True)):
            assert p.grad is not None
            fresh = skips and step == 1 and i < 4  # the first that is a step is corrected by none
            history[i] = [*(() if fresh else history[i][-1:]), p.grad.clone()]
            q.grad = corrected(history[i], betas[i])[-1]
        optimizer.step()
        plain.step()
    for p, q in zip(params, others, strict=True):
        assert gap(p.detach(), q.detach()) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cls", SOME, ids=name_of)
def test_resume_and_bad_gradients(cls: type[MatrixOptimizer], dtype: torch.dtype) -> None:
    check_resume_and_bad_gradients(lambda: both_kinds(cls, dtype, **REDUCED))
    optimizer, params = both_kinds(cls, dtype, **REDUCED)
    train(optimizer, params, range(1))
    assert {state["previous_gradient"].dtype for state in optimizer.state.values()} == {dtype}


@pytest.mark.slow
@pytest.mark.parametrize("cls", [steepest.Muon, steepest.MuAdam], ids=name_of)
def test_a_compiled_step(cls: type[MatrixOptimizer]) -> None:
    check_compiled_step(lambda: both_kinds(cls, **REDUCED))


def test_a_group_says_its_own() -> None:
    params = parameters([(6, 4), (6, 4)])
    optimizer = steepest.Muon([{"params": params[:1], **REDUCED}, {"params": params[1:]}], lr=0.1)
    train(optimizer, params, range(2))
    assert ["previous_gradient" in optimizer.state[p] for p in params] == [True, False]


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "a gamma of 0": (lambda: build(steepest.Muon, variance_reduction=0.0), "variance_reduction should be > 0 or None"),
    "Momo": (lambda: build(MuAdamMomo, **REDUCED), "not taken here: Momo's model of the loss is of its gradients"),
    "ProdigyMuon": (lambda: build(steepest.ProdigyMuon, **REDUCED), "step size is of gradients as they are"),
    "NIGT": (lambda: build(steepest.NIGT, **REDUCED), "NIGT has one of its own"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_reduced_says_why(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()
