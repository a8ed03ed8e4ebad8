"""SPlus, arXiv:2506.07254.

M = b1 M + (1 - b1) G;  L, R average G G^T and G^T G;  Q their bases, every T steps
W = W - lr 2 / (m + n) Q_L sign(Q_L^T M Q_R) Q_R^T;  to evaluate: an average of the iterates
"""

from __future__ import annotations

import pytest
import torch

from steepest import SPlus
from support.references import eigenbases_of, eigenbasis, gap, gaussian, gradients

SIZES = pytest.mark.parametrize("shape", [(8, 5), (5, 8), (6, 6)], ids=str)
STEPS, EVERY = 50, 7


@pytest.mark.parametrize("parity", [None, "authors"])
@SIZES
def test_splus_is_the_authors_rule(shape: tuple[int, int], parity: str | None) -> None:
    """Bases of the refresh before the step, the identity at first; the average of the iterates, its weights 1."""
    w, lr, wd, b1, b2, rate = gaussian(*shape, seed=9), 0.1, 0.1, 0.9, 0.9, 0.95
    m, average, length = torch.zeros_like(w), torch.zeros_like(w), lr * 2 / sum(shape)
    bases = [torch.eye(n, dtype=torch.float64) for n in shape]
    factors = [torch.zeros(n, n, dtype=torch.float64) for n in shape]
    p = torch.nn.Parameter(w.clone())
    optimizer = SPlus(
        [p],
        lr=lr,
        weight_decay=wd,
        betas=(b1, b2),
        average_rate=rate,
        precondition_frequency=EVERY,
        parity=parity,
    )
    for t, g in enumerate(gradients(STEPS, *shape), 1):
        m = b1 * m + (1 - b1) * g
        u = bases[0] @ (bases[0].mT @ m @ bases[1]).sign() @ bases[1].mT
        w = (w - length * u) * (1 - length * wd) if parity else (1 - length * wd) * w - length * u
        average = rate * average + (1 - rate) * w
        factors = [b2 * f + (1 - b2) * product for f, product in zip(factors, (g @ g.mT, g.mT @ g))]
        p.grad = g
        optimizer.step()
        if t == 1:
            bases = eigenbases_of(optimizer.state[p], [g @ g.mT, g.mT @ g])
        elif t % EVERY == 0:
            bases = [eigenbasis(factor) for factor in factors]
    assert gap(p.detach(), w) < 1e-9
    optimizer.eval()
    assert gap(p.detach(), average / (1 - rate**STEPS)) < 1e-9
    optimizer.train()
    assert gap(p.detach(), w) < 1e-9
