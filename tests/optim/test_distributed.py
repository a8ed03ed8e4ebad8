"""Two processes under DistributedDataParallel (gloo): the ranks stay identical, and equal one on the whole batch."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import steepest
from support.processes import Processes
from support.training import KRONECKER, RELATIVES

RANKS, STEPS, BATCH = 2, 3, 8
OPTIMIZERS = (steepest.Muon, steepest.MuAdam, steepest.MuAdamSANIA, steepest.KFAC, *RELATIVES)
# In the null space of few gradients a basis follows rounding errors: that of the whole batch is another one.
RANKS_ALONE = KRONECKER

METHODS: dict[str, Any] = {
    **{cls.__name__: cls for cls in (*OPTIMIZERS, *RANKS_ALONE)},
    "later": partial(steepest.SOAP, precondition_frequency=1, refresh_delay=1, factor_dtype=torch.bfloat16),
    "newton": partial(steepest.Shampoo, precondition_frequency=2, refresh_delay=1, inverse_root="newton"),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).double()


def batch(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(BATCH, 6, generator=generator, dtype=torch.float64)


def train(cls: Any, model: nn.Module, rank: int | None) -> None:
    """rank None: the whole batch; otherwise its share."""
    optimizer = cls(model, lr=0.05)
    for step in range(STEPS):
        x = batch(step)
        optimizer.zero_grad()
        model(x if rank is None else x.chunk(RANKS)[rank]).square().mean().backward()
        optimizer.step()


def trained_on_a_share() -> dict[str, dict[str, Tensor]]:
    """The weights of this rank by method."""
    models = {name: nn.parallel.DistributedDataParallel(network()) for name in METHODS}
    for name, cls in METHODS.items():
        train(cls, models[name], dist.get_rank())
    return {name: model.module.state_dict() for name, model in models.items()}


@pytest.fixture(scope="module")
def by_rank(processes: Processes) -> list[dict[str, dict[str, Tensor]]]:
    return processes.run(trained_on_a_share, ranks=RANKS)


@pytest.mark.parametrize("method", METHODS)
def test_ranks_agree_with_each_other_and_with_one_process(
    method: str, by_rank: list[dict[str, dict[str, Tensor]]]
) -> None:
    first, second = (weights[method] for weights in by_rank)
    cls, alone = METHODS[method], network()
    train(cls, alone, None)
    for name, wanted in alone.state_dict().items():
        assert torch.equal(first[name], second[name])
        if cls in OPTIMIZERS:
            torch.testing.assert_close(first[name], wanted, rtol=1e-8, atol=1e-10)
