"""What a run may meet in the gradients of a step, of a list of parameters whose second one is a matrix."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def grad_of(p: nn.Parameter) -> Tensor:
    assert p.grad is not None
    return p.grad


def one_is_bad(params: list[nn.Parameter], step: int) -> None:
    if step in (0, 4):
        grad_of(params[1])[0, 0] = torch.nan


def one_is_strided(params: list[nn.Parameter], step: int) -> None:
    if step > 3:
        params[1].grad = grad_of(params[1]).mT.contiguous().mT


def turned(params: list[nn.Parameter], step: int) -> None:
    if step > 3:
        for p in params:
            p.grad = torch._neg_view(-grad_of(p))
