"""Schattor, arXiv:2606.15702.

M = b M + (1 - b) G = U S V^T,  q = p / (p - 1);  W_b = (1 - lr wd) W_b - lr w_b U (S / ||S||_q)^(q-1) V^T
w_b = 1 (lmo) or ||M_b||_q (dual); all blocks together: sum of ||M_c||_q, or ||M_b||_q over the norm of all of these
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steepest import Schattor
from support.quadratic import STEPS, gradient, run, start
from support.references import gap
from support.slow import slow

LR, DECAY, BETA = 0.05, 0.1, 0.9


def unit(m: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """(U (S / ||S||_q)^(q-1) V^T, ||S||_q) by the SVD; a vector is a matrix of one column."""
    u, s, vh = torch.linalg.svd(m.reshape(len(m), -1), full_matrices=False)
    q = 1.0 if p == math.inf else p / (p - 1)
    norm = (s / s[0]).pow(q).sum().pow(1 / q) * s[0]
    return ((u * (s / norm).pow(q - 1)) @ vh).reshape(m.shape), norm


def paper(block_norm: str, scale: str, p: float, zero: bool) -> list[Tensor]:
    W = [w.detach().clone() for w in start()]
    M = [torch.zeros_like(w) for w in W]
    for step in range(STEPS):
        G = [gradient(step, i, w) for i, w in enumerate(W)]
        M = G if step == 0 and not zero else [BETA * m + (1 - BETA) * g for m, g in zip(M, G)]
        found = [unit(m, p) for m in M]
        norms = [norm for _, norm in found]
        total = torch.stack(norms).norm()
        lengths = {
            ("max", "lmo"): [1.0 + 0 * total] * len(W),
            ("l2", "dual"): norms,
            ("max", "dual"): [torch.stack(norms).sum()] * len(W),
            ("l2", "lmo"): [norm / total for norm in norms],
        }[block_norm, scale]
        W = [(1 - LR * DECAY) * w - LR * x * d for w, x, (d, _) in zip(W, lengths, found)]
    return W


def schattor(params: list[nn.Parameter], **options: Any) -> Schattor:
    groups: list[dict[str, Any]] = [{"params": params[:3]}, {"params": params[3:], "use_muon": False}]
    return Schattor(groups[: 2 if len(params) > 3 else 1], lr=LR, weight_decay=DECAY, momentum=BETA, **options)


P = (1.5, 2.0, 3.0, 4.0, 7.0, 8.0, math.inf)
NORMS = (("max", "lmo"), ("l2", "dual"), ("max", "dual"), ("l2", "lmo"))
#: Every second p is at an end or a formula of its own. Where the momentum begins is no concern of the oracle.
ORACLES = [(*norm, p, "zero") for norm in NORMS for p in P[::2]] + [(*NORMS[0], 2.0, "first")]
ORACLES += [slow(*norm, p, "zero") for norm in NORMS for p in P[1::2]]
ORACLES += [slow(*norm, p, "first") for norm in NORMS for p in P[::2]]


@pytest.mark.parametrize("block_norm, scale, p, begin", ORACLES)
def test_every_oracle_is_its_formula(block_norm: Any, scale: Any, p: float, begin: Any) -> None:
    """With the defaults for everything else, in fp64: no direction is approximate and no norm is stale."""
    options = {"block_norm": block_norm, "scale": scale, "p": p, "start": begin}
    found = run(schattor(params := start(), polar="svd", **options), params)
    assert max(map(gap, found, paper(block_norm, scale, p, begin == "zero"))) < 1e-10
