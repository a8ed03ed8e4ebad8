"""Optimizers that step inside backward, one for each parameter: equal to one optimizer for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward

import steepest

LR = 0.05


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5))


def backward(model: nn.Module, step: int) -> None:
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
    model(x).square().mean().backward()


def trained_at_once(cls: type[Any]) -> list[Tensor]:
    model = network()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = cls([{"params": matrices, "use_muon": True}, {"params": vectors, "use_muon": False}], lr=LR)
    for step in range(4):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def by_torch(model: nn.Module, cls: type[Any]) -> None:
    _apply_optimizer_in_backward(cls, model.parameters(), {"lr": LR})


def by_hooks(model: nn.Module, cls: type[Any]) -> None:
    """As in torch's tutorial on optimizer steps fused into backward."""
    optimizers = {p: cls([p], lr=LR) for p in model.parameters()}

    def step(p: Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)


@pytest.mark.parametrize("install", [by_torch, by_hooks])
@pytest.mark.parametrize("cls", [steepest.MuAdam, steepest.SOAP])
def test_steps_in_backward_equal_one_step(cls: type[Any], install: Callable[[nn.Module, type[Any]], None]) -> None:
    model = network()
    install(model, cls)
    for step in range(4):
        backward(model, step)
        assert all(p.grad is None for p in model.parameters())
    assert all(map(torch.equal, model.parameters(), trained_at_once(cls)))


@pytest.mark.parametrize("install", [by_torch, by_hooks])
def test_muon_takes_matrices_alone_as_torchs_does(install: Callable[[nn.Module, type[Any]], None]) -> None:
    with pytest.raises(ValueError, match="Muon only supports 2D parameters .* a group that says use_muon"):
        install(network(), steepest.Muon)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 5, bias=False))
    install(model, steepest.Muon)
    before = [p.detach().clone() for p in model.parameters()]
    backward(model, 0)
    assert not any(map(torch.equal, model.parameters(), before))
