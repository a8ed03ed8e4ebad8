"""MuonMax, MuonAdam and every other product norm with Momo's truncation, arXiv:2510.09827.

M = b1 M + (1 - b1) G,  V = b2 V + (1 - b2) G o G,  h = b1 h + (1 - b1) (loss - <W, G>),  from the first ones on
d_l, dz_l      dual norm and direction of a layer: a matrix' sum of singular values and U V^T; others below
w_l            max: 1 (lmo), d (dual);  l2: d_l / d, d_l;  hybrid: s S / d, s S of matrices, d_l / d, d_l of others
d              max: sum d_l;  l2: (sum d_l^2)^1/2;  hybrid: (s S^2 + sum others d_l^2)^1/2, S sum over matrices
t = min(lr, (h + <W, M> - lb)_+ / (d or d^2));  W_l = (1 - lr wd) W_l - t w_l dz_l
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steepest import MuonAdam, MuonMax, ProductNormDescent
from support.references import gap, gaussian, polar_by_svd
from support.regression import MATRIX, loss_of, start, trained
from support.slow import slow


def paper(
    *,
    product: str,
    scale: str,
    others: str,
    lower_bound: float | None,
    s: float,
    stale: bool,
    lr: float = 0.05,
    wd: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.8),
    eps: float = 1e-6,
    steps: int = 20,
    shares: list[float] | None = None,
) -> list[Tensor]:
    """Algorithms of arXiv:2510.09827, step by step: no parts of the library, every matrix by its SVD."""
    W = start()
    M: list[Tensor] = []
    V: list[Tensor] = []
    h, nuclear = 0.0, None
    for step in range(steps):
        leaves = [w.clone().requires_grad_() for w in W]
        loss = loss_of(leaves, step)
        G = torch.autograd.grad(loss, leaves)
        loss = loss.detach()
        inner = float(loss) - sum(float((w * g).sum()) for w, g in zip(W, G))
        if step == 0:
            M, V, h = list(G), [g * g for g in G], inner
        else:
            M = [betas[0] * m + (1 - betas[0]) * g for m, g in zip(M, G)]
            V = [betas[1] * v + (1 - betas[1]) * g * g for v, g in zip(V, G)]
            h = betas[0] * h + (1 - betas[0]) * inner
        dz, d, known = [], [], []
        for is_matrix, m, v in zip(MATRIX, M, V):
            below = v.sqrt() + eps
            norm = {
                "adam_2": (m**2 / below).sum().sqrt(),
                "adam_infty": (m**2 / below).sum(),
                "sign": m.abs().sum(),
                "euclidean": m.norm(),
            }[others]
            step_of = {"adam_2": m / below / norm, "adam_infty": m / below, "sign": m.sign(), "euclidean": m / norm}
            dz.append(polar_by_svd(m) if is_matrix else step_of[others])
            d.append(torch.linalg.svdvals(m).sum() if is_matrix else norm)
            known.append(d[-1])
        if stale and nuclear is not None and (product, scale) != ("l2", "lmo"):
            known[:3] = nuclear
        nuclear = d[:3]
        S, Q = sum(known[:3]), sum(x**2 for x in known[3:])
        dual = {"max": sum(known), "l2": sum(x**2 for x in known) ** 0.5, "hybrid": (s * S**2 + Q) ** 0.5}[product]
        if product == "max":
            w = [1.0 + 0 * dual] * 5 if scale == "lmo" else [dual] * 5
        elif product == "l2":
            w = [x / dual for x in d] if scale == "lmo" else d
        else:
            w = [s * S] * 3 + d[3:]
            w = [x / dual for x in w] if scale == "lmo" else w
        tau = lr
        if lower_bound is not None:
            model = h + sum(float((x * m).sum()) for x, m in zip(W, M))
            tau = min(lr, max(0.0, model - lower_bound) / float(dual if scale == "lmo" else dual**2))
        if shares is not None:
            shares.append(tau / lr)
        W = [(1 - lr * wd) * x - tau * y * z for x, y, z in zip(W, w, dz)]
    return W


#: norm of the other parameters, whether dual norms may be those of the previous step
OTHERS = (("adam_2", True), ("adam_2", False), ("adam_infty", True), ("sign", False), ("euclidean", False))
RULES = list(itertools.product(("max", "l2", "hybrid"), ("lmo", "dual"), OTHERS))
#: A lower bound shortens the step by one number, whatever the rule: every second rule has each of its choices in it.
EVERY_RULE = [(None, *rule) for rule in RULES[::2]] + [(0.3, *rule) for rule in RULES[1::4]]
EVERY_RULE += [slow(bound, *rule) for bound in (None, 0.3) for rule in RULES if (bound, *rule) not in EVERY_RULE]
OPTIONS: dict[str, Any] = {"betas": (0.9, 0.8), "eps": 1e-6, "polar": "svd"}


@pytest.mark.parametrize("lower_bound, product, scale, others", EVERY_RULE)
def test_every_rule_is_the_papers(
    lower_bound: float | None, product: str, scale: str, others: tuple[str, bool]
) -> None:
    rule: dict[str, Any] = {"product": product, "scale": scale, "others": others[0], "lower_bound": lower_bound}
    rule["lr"] = 0.4 if product == "l2" else 0.05
    shares: list[float] = []
    wanted = paper(**rule, s=4.0, stale=others[1], shares=shares)
    rule |= {"matrix_scale": 4.0, "stale_dual": others[1], **OPTIONS}
    found = trained(lambda params: ProductNormDescent(params, **rule))
    assert max(map(gap, found, wanted)) < 1e-12
    assert lower_bound is None or any(share < 1 for share in shares)  # the bound was met


@pytest.mark.parametrize("lower_bound", [None, 0.3], ids=["plain", "momo"])
@pytest.mark.parametrize(
    "cls, rule",
    [
        (MuonMax, {"product": "hybrid", "scale": "dual", "others": "adam_2", "s": 10.0}),
        (MuonAdam, {"product": "max", "scale": "lmo", "others": "adam_infty", "s": 1.0}),
    ],
)
def test_the_named_methods_are_the_papers(cls: Any, rule: dict[str, Any], lower_bound: float | None) -> None:
    lr = 0.01 if cls is MuonMax else 0.1
    wanted = paper(**rule, lower_bound=lower_bound, stale=True, lr=lr, betas=(0.95, 0.95), eps=1e-8)
    found = trained(lambda params: cls(params, lr=lr, polar="svd", lower_bound=lower_bound))
    assert max(map(gap, found, wanted)) < 1e-12


def test_with_one_matrix_muonmax_is_regularized_muon() -> None:
    """W <- W - lr ||M||_nuc polar(M), for any lr and no AdamW group at all."""
    p, w = nn.Parameter(gaussian(6, 4)), gaussian(6, 4)
    optimizer = MuonMax([p], lr=0.02, weight_decay=0.1, matrix_scale=1.0, stale_dual=False, polar="svd")
    m = gaussian(6, 4, seed=100)
    for step in range(20):
        g = gaussian(6, 4, seed=100 + step)
        m = 0.95 * m + 0.05 * g
        w = (1 - 0.02 * 0.1) * w - 0.02 * torch.linalg.svdvals(m).sum() * polar_by_svd(m)
        p.grad = g
        optimizer.step()
    assert gap(p.detach(), w) < 1e-13
