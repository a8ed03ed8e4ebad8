"""Scion, arXiv:2502.07529: each layer in a norm of its own, in a ball (constrained) or by steps of its size.

M = (1 - alpha) M + alpha G;  W = (1 - lr [constrained]) W - lr rho dz(M),  dz of length 1 in the layer's norm
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steepest import Scion
from support.references import gap, gaussian, polar_by_svd

RADIUS, LR, ALPHA = 5.0, 0.02, 0.3

# norm: (shape of a parameter, steepest step of length 1)
LAYERS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "spectral": ((4, 6), lambda m: math.sqrt(4 / 6) * polar_by_svd(m)),
    "first": ((4, 6), polar_by_svd),
    "conv": ((4, 3, 3, 3), lambda m: (math.sqrt(4 / 3) / 9 * polar_by_svd(m.flatten(1))).reshape(m.shape)),
    "sign": ((4, 6), lambda m: m.sign() / 6),
    "rows": ((4, 6), lambda m: m / m.norm(dim=1)[:, None] / 6**0.5),
    "embedding": ((4, 6), lambda m: m / m.norm(dim=1)[:, None] * 6**0.5),
    "columns": ((4, 6), lambda m: m / m.norm(dim=0) * 2),
    "bias": ((7,), lambda m: m / m.square().mean().sqrt()),
}


def layer(norm: str, **options: Any) -> tuple[Scion, nn.Parameter]:
    p = nn.Parameter(gaussian(*LAYERS[norm][0]))
    values = {"lr": LR, "momentum": 1 - ALPHA, "norm": norm, "radius": RADIUS, "polar": "svd", **options}
    return Scion([{"params": [p]}], **values), p


@pytest.mark.parametrize("norm", LAYERS)
@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("constrained", [True, False])
def test_scion_is_its_rule(norm: str, constrained: bool, decay: float) -> None:
    optimizer, p = layer(norm, constrained=constrained, weight_decay=decay)
    w, m = p.detach().clone(), torch.zeros_like(p.detach())
    for t in range(20):
        p.grad = gaussian(*p.shape, seed=t + 1)
        m = (1 - ALPHA) * m + ALPHA * p.grad
        w = (1 - LR * (decay + constrained)) * w - LR * RADIUS * LAYERS[norm][1](m)
        optimizer.step()
    assert gap(p.detach(), w) < 1e-10
