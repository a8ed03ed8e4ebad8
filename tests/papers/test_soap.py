"""SOAP, arXiv:2409.11321, in the form of the authors' released optimizer.

L = b2 L + (1 - b2) G G^T;  R = b2 R + (1 - b2) G^T G;  Q their bases, every T steps by one orthogonal iteration
M, V average Q_L^T G Q_R and its square;  W -= lr c Q_L (M / (sqrt V + eps)) Q_R^T;  then W -= lr wd W
c = sqrt(1 - b2^t) / (1 - b1^t)
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from steepest import SOAP
from support.references import eigenbases_of, gap, gaussian, gradients, iterated

SIZES = pytest.mark.parametrize("shape", [(8, 5), (5, 8), (6, 6)], ids=str)
STEPS, EVERY = 50, 7


@SIZES
def test_soap_is_the_authors_rule(shape: tuple[int, int]) -> None:
    """The first step makes the bases; the moment in them; sorted orthogonal iteration with v permuted; decay last."""
    w, lr, wd, b1, b2, eps = gaussian(*shape, seed=9), 0.01, 0.1, 0.95, 0.9, 1e-8
    p, turned, v = torch.nn.Parameter(w.clone()), torch.zeros_like(w), torch.zeros_like(w)
    options = {"betas": (b1, b2), "precondition_frequency": EVERY, "parity": "authors"}
    optimizer = SOAP([p], lr=lr, weight_decay=wd, **options)
    factors: list[Tensor] = []
    bases: list[Tensor] = []
    for step, g in enumerate(gradients(STEPS, *shape)):
        p.grad = g
        optimizer.step()
        if step == 0:
            factors = [(1 - b2) * g @ g.mT, (1 - b2) * g.mT @ g]
            bases = eigenbases_of(optimizer.state[p], factors)
            continue
        own = bases[0].mT @ g @ bases[1]
        turned, v = b1 * turned + (1 - b1) * own, b2 * v + (1 - b2) * own**2
        u = bases[0] @ (turned / (v.sqrt() + eps)) @ bases[1].mT
        w = (w - lr * (1 - b2**step) ** 0.5 / (1 - b1**step) * u) * (1 - lr * wd)
        factors = [b2 * f + (1 - b2) * product for f, product in zip(factors, (g @ g.mT, g.mT @ g))]
        if step % EVERY == 0:
            m = bases[0] @ turned @ bases[1].mT
            bases[0], rows = iterated(factors[0], bases[0])
            bases[1], cols = iterated(factors[1], bases[1])
            v = v[rows][:, cols]
            turned = bases[0].mT @ m @ bases[1]
    assert gap(p.detach(), w) < 1e-9
