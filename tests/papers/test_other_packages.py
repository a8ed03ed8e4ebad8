"""Rules of other packages, restated in fp64 from what they publish, for the options that stand for them here.

Emerging-Optimizers fd77292   legacy_soap/soap.py, "soap"; orthogonalized_optimizers/muon.py and mixin.py
    SOAP      L = b L + (1 - b) G G^T, R of G^T G, over 1 - b^t;  Q their bases, new in every step;  a bar: over 1 - b^t
              M = b1 M + (1 - b1) G;  V = b2 V + (1 - b2) (Q_L^T G Q_R)^2
              W = (1 - lr wd) W - lr Q_L (Q_L^T bar M Q_R / (sqrt(bar V) + eps)) Q_R^T
    Muon      M = b M + (1 - b) G;  W = (1 - wd) W - .2 lr sqrt(max(m, n)) polar(M)
timm aa4b585                  timm/optim/muon.py, algo="adamuon" with adjust_lr_fn="match_rms_adamw"
    AdaMuon   M = b M + (1 - b) G;  O = polar(M);  V = b V + (1 - b) O o O;  H = O / (sqrt V + eps)
              W = (1 - lr wd) W - .2 lr sqrt(m n) H / |H|
dion 0a059a4                  dion/muon.py, dion/normuon.py
    Muon      M = b M + G;  U = polar(b M + G);  W = W - lr wd [W o U >= 0] o W - lr sqrt(m / n) U
    NorMuon   M = b M + G;  O = polar(M);  v_i = b2 v_i + (1 - b2) mean_j O_ij^2;  H_ij = O_ij / (sqrt v_i + eps)
              W = (1 - lr wd) W - lr sqrt(m / n) |O| H / |H|

Tables of polynomials by their names are in tests/linalg/test_polar.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn

from steepest import KLSOAP, SOAP, AdaMuon, Muon, NorMuon
from support.references import (
    eigenbases_of,
    eigenbasis,
    gap,
    gaussian,
    gradients,
    polar_by_svd,
    trajectory,
    unequal_gradients,
)

SHAPES = pytest.mark.parametrize("shape", [(8, 5), (5, 8), (6, 6)], ids=str)
both_backends = pytest.mark.parametrize("backend", ["auto", "torch"])
LR, DECAY = 0.02, 0.1


def sorted_after(factor: Tensor, basis: Tensor) -> Tensor:
    """A step of orthogonal iteration, whose columns are sorted by what they have become."""
    q = torch.linalg.qr(factor @ basis).Q
    return q[:, (q.mT @ factor @ q).diagonal().argsort(descending=True)]


@SHAPES
@both_backends
@pytest.mark.parametrize("refresh", ["auto", "eigh"])
def test_soap_of_emerging_optimizers(shape: tuple[int, int], backend: str, refresh: str) -> None:
    """Factors, then bases, then Adam in them, at every step; v stays in its places; decay first.

    eps is large, as beside the diagonal the first gradient is rounding in its own bases, which eps is to outweigh.
    """
    w, b1, b2, of_factors, eps = gaussian(*shape, seed=9), 0.9, 0.95, 0.8, 1e-3
    p, m, v = nn.Parameter(w.clone()), torch.zeros_like(w), torch.zeros_like(w)
    optimizer = SOAP(
        [p],
        lr=LR,
        weight_decay=DECAY,
        betas=(b1, b2),
        eps=eps,
        shampoo_beta=of_factors,
        precondition_frequency=1,
        refresh=refresh,
        parity="emerging-optimizers",
        backend=backend,
    )
    factors = [torch.zeros(n, n, dtype=torch.float64) for n in shape]
    bases: list[Tensor] = []
    for t, g in enumerate(gradients(40, *shape), 1):
        p.grad = g
        optimizer.step()
        weight = (1 - of_factors) / (1 - of_factors**t)
        factors = [f + weight * (product - f) for f, product in zip(factors, (g @ g.mT, g.mT @ g))]
        if t == 1:
            bases = eigenbases_of(optimizer.state[p], factors)
        else:
            bases = [eigenbasis(f) if refresh == "eigh" else sorted_after(f, q) for f, q in zip(factors, bases)]
        left, right = bases
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * (left.mT @ g @ right) ** 2
        adam = (left.mT @ m @ right) / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + eps)
        w = w - LR * DECAY * w - LR * left @ adam @ right.mT
        assert gap(p.detach(), w) < 1e-9


@pytest.mark.parametrize(("cls", "message"), [(SOAP, "pass precondition_frequency=1"), (KLSOAP, "'authors'")])
def test_what_emerging_optimizers_does_not_do_is_refused(cls: type[SOAP], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls([nn.Parameter(torch.ones(3, 2))], parity="emerging-optimizers")


def adamuon_of_timm(w: Tensor, grads: Sequence[Tensor]) -> Iterator[Tensor]:
    """A polar factor of the momentum itself; entries over their root mean square; length .2 sqrt(m n)."""
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for g in grads:
        m = torch.lerp(m, g, 0.05)
        o = polar_by_svd(m)
        v = 0.95 * v + 0.05 * o * o
        u = o / (v.sqrt() + 1e-8)
        w = w * (1 - LR * DECAY) - LR * 0.2 * w.numel() ** 0.5 * u / u.norm()
        yield w


def muon_of_dion(w: Tensor, grads: Sequence[Tensor]) -> Iterator[Tensor]:
    """A heavy ball with Nesterov's reading, of the length that RMS to RMS asks for; decay where it agrees."""
    m = torch.zeros_like(w)
    for g in grads:
        m = 0.9 * m + g
        u = polar_by_svd(0.9 * m + g)
        w = w - LR * DECAY * torch.where(w * u >= 0, w, 0) - LR * (w.shape[0] / w.shape[1]) ** 0.5 * u
        yield w


def normuon_of_dion(w: Tensor, grads: Sequence[Tensor]) -> Iterator[Tensor]:
    """A heavy ball; rows over their root mean square; the length that the polar factor had."""
    m, v = torch.zeros_like(w), torch.zeros(len(w), 1, dtype=w.dtype)
    for g in grads:
        m = 0.95 * m + g
        o = polar_by_svd(m)
        v = v + 0.2 * ((o * o).mean(-1, keepdim=True) - v)
        u = o / (v.sqrt() + 1e-8)
        w = w * (1 - LR * DECAY) - LR * (w.shape[0] / w.shape[1]) ** 0.5 * u * (o.norm() / u.norm())
        yield w


def muon_of_emerging_optimizers(w: Tensor, grads: Sequence[Tensor]) -> Iterator[Tensor]:
    """scale_mode="spectral" with extra_scale_factor=0.2 and independent decay."""
    m = torch.zeros_like(w)
    for g in grads:
        w = w - DECAY * w
        m = torch.lerp(m, g, 0.05)
        w = w - LR * 0.2 * max(w.shape) ** 0.5 * polar_by_svd(m)
        yield w


RULES = {
    "timm's AdaMuon": (adamuon_of_timm, AdaMuon, {"parity": "timm"}),
    "dion's Muon": (
        muon_of_dion,
        Muon,
        {"momentum": 0.9, "nesterov": True, "adjust_lr_fn": "spectral_unclamped", "cautious_wd": True},
    ),
    "dion's NorMuon": (normuon_of_dion, NorMuon, {"beta2": 0.8, "adjust_lr_fn": "spectral_unclamped"}),
    "Emerging-Optimizers' Muon": (
        muon_of_emerging_optimizers,
        Muon,
        {"nesterov": False, "adjust_lr_fn": "match_rms_adamw", "weight_decay_method": "independent"},
    ),
}


@SHAPES
@both_backends
@pytest.mark.parametrize("name", RULES)
def test_the_rule_of_a_package(name: str, shape: tuple[int, int], backend: str) -> None:
    rule, cls, options = RULES[name]
    w, of = nn.Parameter(gaussian(*shape, seed=0)), unequal_gradients(20, shape)
    start = w.detach().clone()
    group = [{"params": [w], "use_muon": True}]
    optimizer = cls(group, lr=LR, weight_decay=DECAY, polar="svd", backend=backend, **options)
    for now, wanted in zip(trajectory(optimizer, w, of), rule(start, of), strict=True):
        assert float((now - wanted).norm() / (wanted - start).norm()) < 1e-10


def test_a_package_that_adamuon_does_not_follow_is_refused() -> None:
    with pytest.raises(ValueError, match="parity 'dion' is not known; use 'timm'"):
        AdaMuon([{"params": [nn.Parameter(torch.ones(3, 2))], "use_muon": True}], parity="dion")


@pytest.mark.parametrize(
    ("theirs", "ours"), [("rms_norm", "match_rms_adamw"), ("shape_scaling", "original"), ("rsqrt_in", "head_rows")]
)
def test_a_ratio_by_the_name_of_another_package_is_told_its_name_here(theirs: str, ours: str) -> None:
    with pytest.raises(ValueError, match=f"what other packages call {theirs} is '{ours}' here"):
        Muon([nn.Parameter(torch.ones(3, 2))], adjust_lr_fn=theirs)
