"""`cautious_update`: entries of an update that the gradient is against are not stepped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest
from steepest.optimizer import MatrixOptimizer
from support.problems import gap, polar_by_svd
from support.training import (
    EVERY,
    all_same_bits,
    both_backends,
    both_kinds,
    check_compiled_step,
    check_option_of_one_group,
    check_resume_and_bad_gradients,
    copies,
    give_gradients,
    made,
    name_of,
    noise,
    on_backends,
    parameters,
    train,
)

CAUTIOUS: dict[str, Any] = {"cautious_update": True}
REFUSING = [cls for cls in EVERY if issubclass(cls, steepest.Momo)] + [steepest.TrustRegion, steepest.Scion]
TAKING = [cls for cls in EVERY if cls not in REFUSING]
SOME = [steepest.Muon, steepest.MuAdam, steepest.SOAP, steepest.Shampoo]


def masked(u: Tensor, g: Tensor) -> Tensor:
    """The equation, entry by entry."""
    stays = [a * b > 0 for a, b in zip(u.flatten().tolist(), g.flatten().tolist(), strict=True)]
    scale = len(stays) / (sum(stays) + 1)
    kept = [a * scale if stay else 0.0 for a, stay in zip(u.flatten().tolist(), stays, strict=True)]
    return torch.tensor(kept, dtype=u.dtype).view(u.shape)


@both_backends
@pytest.mark.parametrize("use_muon", [True, False])
def test_cautious_adamw(use_muon: bool, backend: str) -> None:
    """Algorithm 2 of the paper, as a matrix of `Adam` and as an AdamW group of `Muon`."""
    p = nn.Parameter(noise((5, 4), 1, torch.float64))
    w, m, v = p.detach().clone(), torch.zeros(5, 4, dtype=torch.float64), torch.zeros(5, 4, dtype=torch.float64)
    numbers = {"lr": 0.02, "weight_decay": 0.1, "betas": (0.9, 0.99), "eps": 1e-8}
    group = {"params": [p], "use_muon": use_muon, **numbers, **CAUTIOUS}
    optimizer = (steepest.Adam if use_muon else steepest.Muon)([group], backend=backend)
    for t in range(1, 21):
        g = noise((5, 4), 10 + t, torch.float64)
        p.grad = g.clone()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        u = (m / (1 - 0.9**t)) / ((v / (1 - 0.99**t)).sqrt() + 1e-8)
        w = w - 0.02 * 0.1 * w - 0.02 * masked(u, g)
    assert gap(p.detach(), w) < 1e-10


@both_backends
def test_cautious_muon_of_heads_and_experts(backend: str) -> None:
    """Every matrix has a mean of its own."""
    heads, experts = nn.Parameter(noise((6, 5), 1, torch.float64)), nn.Parameter(noise((3, 4, 5), 2, torch.float64))
    groups = [{"params": [heads], "num_heads": 2}, {"params": [experts], "batch_dims": 1}]
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "polar": "svd", "adjust_lr_fn": "none"}
    optimizer = steepest.Muon(groups, weight_decay=0.0, backend=backend, **options, **CAUTIOUS)
    wanted = {p: [w.clone() for w in split(p.detach())] for p in (heads, experts)}
    momenta = {p: [torch.zeros_like(w) for w in wanted[p]] for p in wanted}
    for step in range(5):
        for i, p in enumerate(wanted):
            p.grad = noise(p.shape, 40 + 2 * step + i, torch.float64)
            for k, g in enumerate(split(p.grad)):
                m = momenta[p][k] = 0.9 * momenta[p][k] + 0.1 * g
                wanted[p][k] = wanted[p][k] - 0.1 * masked(polar_by_svd(0.1 * g + 0.9 * m), g)
        optimizer.step()
    for p, matrices in wanted.items():
        for found, w in zip(split(p.detach()), matrices, strict=True):
            assert gap(found, w) < 1e-11


def split(t: Tensor) -> list[Tensor]:
    return list(t.unbind()) if t.ndim == 3 else list(t.chunk(2))


@on_backends(TAKING)
def test_no_step_is_against_its_gradient(cls: type[MatrixOptimizer], backend: str) -> None:
    """No entry: but for decay, which is 0 here, and for NIGT and Fromage, which do not move by lr u alone."""
    values = {"weight_decay": 0.0, "adamw_weight_decay": 0.0, "backend": backend, **CAUTIOUS}
    optimizer, params = both_kinds(cls, torch.float64, **values)
    plain, others = both_kinds(cls, torch.float64, **{**values, "cautious_update": False})
    still = 0
    for step in range(4):
        before = copies(params)
        train(optimizer, params, range(step, step + 1))
        train(plain, others, range(step, step + 1))
        for p, start in zip(params, before, strict=True):
            if cls not in (steepest.NIGT, steepest.Fromage):
                assert p.grad is not None
                assert bool(((start - p.detach()) * p.grad >= 0).all())
                still += int((p.detach() == start).sum())
    assert not all_same_bits(params, others)
    assert cls in (steepest.NIGT, steepest.Fromage) or still


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_tiny_gradients_keep_their_signs(backend: str) -> None:
    p = nn.Parameter(torch.zeros(4, 3))
    optimizer = steepest.SignSGD([p], lr=1e-30, momentum=0.0, backend=backend, **CAUTIOUS)
    p.grad = noise((4, 3), 1) * 1e-30
    optimizer.step()
    assert bool(((p.detach() != 0) == (p.grad != 0)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@both_backends
@pytest.mark.parametrize("cls", SOME, ids=name_of)
def test_resume_and_bad_gradients(cls: type[MatrixOptimizer], backend: str, dtype: torch.dtype) -> None:
    values = {"backend": backend, "keep_mantissa": dtype is torch.bfloat16, **CAUTIOUS}
    check_resume_and_bad_gradients(lambda: both_kinds(cls, dtype, **values))


def test_beside_cautious_decay_and_by_the_fused_ops() -> None:
    optimizer, params = both_kinds(steepest.MuAdam, torch.float64, cautious_wd=True, **CAUTIOUS)
    plain, others = both_kinds(steepest.MuAdam, torch.float64, cautious_wd=True, backend="torch", **CAUTIOUS)
    train(optimizer, params, range(3))
    train(plain, others, range(3))
    for p, q in zip(params, others, strict=True):
        assert gap(p.detach(), q.detach()) < 1e-11
    usual, some = both_kinds(steepest.MuAdam)
    give_gradients(some, 0)
    assert optimizer.prepare() == usual.prepare()


def test_a_group_says_its_own() -> None:
    check_option_of_one_group(CAUTIOUS)


@pytest.mark.slow
@pytest.mark.parametrize("cls", [steepest.Muon, steepest.MuAdam], ids=name_of)
def test_a_compiled_step(cls: type[MatrixOptimizer]) -> None:
    check_compiled_step(lambda: both_kinds(cls, backend="torch", **CAUTIOUS))


@pytest.mark.parametrize("cls", REFUSING, ids=name_of)
def test_what_cannot_be_cautious_says_why(cls: type[MatrixOptimizer]) -> None:
    with pytest.raises(ValueError, match="cautious_update=True is not taken here: .*"):
        made(cls, [{"params": parameters([(4, 3)])}], **CAUTIOUS)
