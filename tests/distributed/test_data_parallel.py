"""DistributedDataParallel: ranks that see shares of a batch, and so losses of their own, step as one process."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from steepest.zoo.product import MuonMax
from support.problems import gap, gaussian
from support.processes import Processes

STEPS = 4


def fitted(shared: bool) -> dict[str, Tensor]:
    """Weights after four steps with a lower bound on the loss; shared: each rank has its share of every batch."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)).double()
    model = nn.parallel.DistributedDataParallel(network) if shared else network
    optimizer = MuonMax(model, lr=0.5, lower_bound=0.1, polar="svd")
    for step in range(STEPS):
        x = gaussian(8, 6, seed=100 + step)
        x = x.chunk(dist.get_world_size())[dist.get_rank()] if shared else x
        optimizer.zero_grad()
        loss = (model(x) - x).square().mean()
        loss.backward()
        optimizer.step(loss=loss)
    return network.state_dict()


def test_ranks_agree_though_their_losses_differ(processes: Processes) -> None:
    whole = fitted(shared=False)
    first, second = processes.run(fitted, True, ranks=2)
    for key, wanted in whole.items():
        assert torch.equal(first[key], second[key])
        assert gap(first[key], wanted) < 1e-12
