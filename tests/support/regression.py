"""A regression with three matrices and two vectors, a fresh minibatch a step; fp64, nothing of the package."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from support.references import gaussian

MATRIX = (True, True, True, False, False)


def start() -> list[Tensor]:
    return [
        gaussian(8, 6, seed=1),
        gaussian(5, 8, seed=2),
        gaussian(5, 5, seed=3),
        gaussian(8, seed=4),
        0 * gaussian(5),
    ]


def loss_of(weights: list[Tensor], step: int) -> Tensor:
    a, b, c, shift, bias = weights
    x = gaussian(16, 6, seed=100 + step)
    target = gaussian(16, 5, seed=900 + step) * 0.3 + x[:, :5]
    return (torch.tanh(x @ a.mT / 3 + shift) @ b.mT @ c.mT / 4 + bias - target).square().mean()


def trained(optimizer_of: Callable[..., torch.optim.Optimizer], steps: int = 20) -> list[Tensor]:
    weights = [nn.Parameter(w) for w in start()]
    optimizer = optimizer_of([{"params": weights[:3]}, {"params": weights[3:], "use_muon": False}])
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(weights, step)
        loss.backward()
        optimizer.step(loss=loss)  # type: ignore[call-arg]
    return [w.detach() for w in weights]
