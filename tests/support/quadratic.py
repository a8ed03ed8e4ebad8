"""A noisy quadratic in three matrices and a vector; fp64, nothing of the package."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from support.references import gaussian

SHAPES = ((6, 4), (3, 5), (4, 4), (7,))
STEPS = 22


def gradient(step: int, i: int, w: Tensor) -> Tensor:
    """Of a quadratic with noise: the trajectory matters."""
    return 0.5 * w + gaussian(*w.shape, seed=100 * step + i)


def run(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], **of_step: Any) -> list[Tensor]:
    for step in range(STEPS):
        for i, p in enumerate(params):
            p.grad = gradient(step, i, p.detach())
        optimizer.step(**of_step)
    return [p.detach() for p in params]


def start() -> list[nn.Parameter]:
    return [nn.Parameter(gaussian(*shape, seed=i)) for i, shape in enumerate(SHAPES)]
