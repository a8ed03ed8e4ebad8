"""`weight_decay_method`: decoupled, independent of the learning rate, or in the gradient."""

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
from support.training import (
    EVERY,
    both_backends,
    both_kinds,
    build,
    check_compiled_step,
    check_option_of_one_group,
    check_resume_and_bad_gradients,
    copies,
    give_gradients,
    name_of,
    noise,
    on_backends,
    train,
)

INDEPENDENT: dict[str, Any] = {"weight_decay_method": "independent"}
L2: dict[str, Any] = {"weight_decay_method": "l2"}
INSIDE = (steepest.OrthogonalSGDM, steepest.Fromage, steepest.Scion)  # have none, or one of their own
#: The skipped first gradient of SOAP and KL-Shampoo, a metric's refreshes and NIGT's point ahead do not meet decay.
TAKING = [cls for cls in EVERY if cls not in INSIDE]
SOME = [steepest.Muon, steepest.MuAdam, steepest.SOAP, steepest.MuonMax]
either = pytest.mark.parametrize("values", [INDEPENDENT, L2], ids=["independent", "l2"])


# ---- the equations --------------------------------------------------------------------------------------------------


def muon(w: Tensor, gradients: list[Tensor], lrs: list[float], decay: float, method: str) -> Tensor:
    m = torch.zeros_like(w)
    for g, lr in zip(gradients, lrs, strict=True):
        if method == "l2":
            g = g + decay * w
        m = 0.9 * m + 0.1 * g
        if method == "decoupled":
            w = w - lr * decay * w
        if method == "independent":
            w = w - decay * w
        w = w - lr * polar_by_svd(m)
    return w


@both_backends
@pytest.mark.parametrize("method", ["decoupled", "independent", "l2"])
def test_muon_with_every_method(method: str, backend: str) -> None:
    p = nn.Parameter(noise((5, 3), 1, torch.float64))
    start, lrs = p.detach().clone(), [0.05 / (1 + t) for t in range(20)]
    options: dict[str, Any] = {"momentum": 0.9, "nesterov": False, "polar": "svd", "adjust_lr_fn": "none"}
    optimizer = steepest.Muon([p], weight_decay=0.02, weight_decay_method=method, backend=backend, **options)
    gradients = [noise((5, 3), 10 + t, torch.float64) for t in range(20)]
    for g, lr in zip(gradients, lrs, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        p.grad = g.clone()
        optimizer.step()
    assert gap(p.detach(), muon(start, gradients, lrs, 0.02, method)) < 1e-10


@both_backends
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("use_muon", [True, False])
def test_l2_is_the_weight_decay_of_torch_adam(use_muon: bool, maximize: bool, backend: str) -> None:
    """As a matrix of `Adam` and as an AdamW group of `Muon`."""
    p, q = (nn.Parameter(noise((6, 4), 2, torch.float64)) for _ in range(2))
    numbers = {"lr": 0.01, "weight_decay": 0.3, "betas": (0.9, 0.99), "eps": 1e-8, "maximize": maximize}
    group = {"params": [p], "use_muon": use_muon, **numbers, **L2}
    ours = (steepest.Adam if use_muon else steepest.Muon)([group], backend=backend)
    theirs = torch.optim.Adam([q], **numbers)  # type: ignore[arg-type]
    for step in range(20):
        for t in (p, q):
            t.grad = noise((6, 4), 20 + step, torch.float64)
        ours.step()
        theirs.step()
    assert gap(p.detach(), q.detach()) < 1e-10


@on_backends(TAKING)
def test_independent_decay_of_every_class(cls: type[MatrixOptimizer], backend: str) -> None:
    """With lr wd in the place of wd it is the decoupled one, and where lr is 0 it goes on."""
    lr, decay = 0.02, 0.1
    scaled = cls is steepest.SPlus  # whose decoupled decay has the ratio of the shape
    values = {"backend": backend, "lr": lr, "adamw_lr": lr}
    plain, others = both_kinds(cls, torch.float64, **values)
    given = {"weight_decay": lr * decay, "adamw_weight_decay": lr * decay}
    optimizer, params = both_kinds(cls, torch.float64, **values, **given, **INDEPENDENT)
    for group in plain.param_groups:
        group["lr"], group["weight_decay"] = lr, decay
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = lr, lr * decay
    train(plain, others, range(4))
    train(optimizer, params, range(4))
    if not scaled:
        for p, q in zip(params, others, strict=True):
            assert gap(p.detach(), q.detach()) < 1e-12
    before = copies(params)
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = 0.0, 0.25
    train(optimizer, params, range(4, 5))
    if cls is not steepest.NIGT:  # whose parameters are ahead of the weights
        for p, q in zip(params, before, strict=True):
            assert gap(p.detach(), 0.75 * q) < 1e-12


@pytest.mark.parametrize("cls", [cls for cls in TAKING if cls is not steepest.NIGT], ids=name_of)
def test_l2_of_every_class_is_its_step_with_another_gradient(cls: type[MatrixOptimizer]) -> None:
    optimizer, params = both_kinds(cls, torch.float64, **L2)
    plain, others = both_kinds(cls, torch.float64)
    decays = [group["weight_decay"] for group in optimizer.param_groups for _ in group["params"]]
    for group in plain.param_groups:
        group["weight_decay"] = 0.0
    for step in range(4):
        give_gradients(params, step)
        give_gradients(others, step)
        for q, decay in zip(others, decays, strict=True):
            assert q.grad is not None
            q.grad += decay * q.detach()
        optimizer.step()
        plain.step()
    for p, q in zip(params, others, strict=True):
        assert gap(p.detach(), q.detach()) < 1e-11


# ---- what every option must do ---------------------------------------------------------------------------------------


def test_independent_decay_stays_with_the_fused_ops() -> None:
    for cls in EVERY:
        if cls not in INSIDE:
            (plain, a), (optimizer, b) = both_kinds(cls), both_kinds(cls, **INDEPENDENT)
            give_gradients(a, 0)
            give_gradients(b, 0)
            assert plain.prepare() == optimizer.prepare()


@both_backends
@pytest.mark.parametrize("options", [{"keep_mantissa": True}, {"stochastic_rounding": True}, {"cautious_wd": True}])
def test_independent_decay_of_bf16_weights(options: dict[str, Any], backend: str) -> None:
    values = {"weight_decay": 1e-3, "adamw_weight_decay": 1e-3, **INDEPENDENT, **options}
    optimizer, params = both_kinds(steepest.MuAdam, torch.bfloat16, backend=backend, **values)
    wide, others = both_kinds(steepest.MuAdam, grad_dtype=torch.bfloat16, backend=backend, **values)
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p)
    for each, some in ((optimizer, params), (wide, others)):
        train(each, some, range(5), torch.bfloat16)
    for p, q in zip(params, others, strict=True):
        assert gap(p.detach(), q.detach()) < 0.02


@pytest.mark.parametrize("options", [{}, {"keep_mantissa": True}, {"stochastic_rounding": True}], ids=str)
def test_l2_of_bf16_weights_is_of_their_true_value(options: dict[str, Any]) -> None:
    p = nn.Parameter(noise((6, 4), 3, torch.bfloat16))
    optimizer = steepest.Adam([p], lr=1e-3, weight_decay=1.0, betas=(0.0, 0.0), eps=1e-3, **L2, **options)
    for _ in range(3):
        state = optimizer.state.get(p)
        recipe = optimizer._recipe(optimizer.param_groups[0])
        value = recipe.rounding.value(p.detach(), state) if state else p.detach().float()
        p.grad = torch.zeros_like(p)
        optimizer.step()
        assert gap(optimizer.state[p]["exp_avg"].double(), value.to(torch.bfloat16).double()) < 1e-6


@either
@pytest.mark.parametrize("cls", SOME, ids=name_of)
def test_resume_and_bad_gradients(cls: type[MatrixOptimizer], values: dict[str, Any]) -> None:
    check_resume_and_bad_gradients(lambda: both_kinds(cls, **values))


@either
def test_a_group_says_its_own(values: dict[str, Any]) -> None:
    check_option_of_one_group(values, weight_decay=0.5)


@pytest.mark.slow
@either
@pytest.mark.parametrize("cls", [steepest.Muon, steepest.MuAdam], ids=name_of)
def test_a_compiled_step(cls: type[MatrixOptimizer], values: dict[str, Any]) -> None:
    check_compiled_step(lambda: both_kinds(cls, **values))


def test_under_a_grad_scaler_l2_is_of_the_unscaled_gradient() -> None:
    (optimizer, params), (plain, others) = both_kinds(steepest.MuAdam, **L2), both_kinds(steepest.MuAdam, **L2)
    give_gradients(params, 0)
    give_gradients(others, 0)
    for p in params:
        assert p.grad is not None
        p.grad *= 1024
    optimizer.grad_scale = torch.tensor(1024.0)  # type: ignore[attr-defined]
    optimizer.step()
    plain.step()
    for p, q in zip(params, others, strict=True):
        assert gap(p.detach(), q.detach()) < 1e-6


# ---- what is refused -------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "a name": (
        lambda: build(steepest.Muon, weight_decay_method="coupled"),
        "weight_decay_method 'coupled' is not known; use 'decoupled', 'independent' or 'l2'",
    ),
    "cautious": (lambda: build(steepest.Muon, cautious_wd=True, **L2), "no decay of the weight that could be cautious"),
    "after": (lambda: build(steepest.SOAP, parity="authors", **L2), "no decay of the weight that could be after"),
    "Momo": (lambda: build(MuAdamMomo, **L2), "'l2' is not taken here: Momo's model of the loss knows no penalty"),
    "Scion": (lambda: build(steepest.Scion, **INDEPENDENT), "'independent' is not taken here: .*Scion's constraint"),
    "ridge": (lambda: build(steepest.TrustRegion, composite="ridge", **L2), "decay is inside the model"),
    "OrthogonalSGDM": (lambda: build(steepest.OrthogonalSGDM, **INDEPENDENT), "decay is inside the model"),
    "Fromage": (lambda: build(steepest.Fromage, **INDEPENDENT), "or there is none"),
    "NIGT": (lambda: build(steepest.NIGT, **L2), "NIGT's gradients are of a point ahead"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_decay_so_says_why(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_scion_without_its_ball_takes_all() -> None:
    for values in (INDEPENDENT, L2):
        p = nn.Parameter(noise((4, 3), 5, torch.float64))
        before = p.detach().clone()
        group = {"params": [p], "norm": "sign", "radius": 7.0}
        options = {"lr": 0.0, "weight_decay": 0.25, "constrained": False, "momentum": 0.0}
        optimizer = steepest.Scion([group], **options, **values)  # type: ignore[arg-type]
        p.grad = torch.zeros_like(p)
        optimizer.step()
        assert gap(p.detach(), before * (0.75 if values is INDEPENDENT else 1.0)) < 1e-12
