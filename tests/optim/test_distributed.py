"""Two processes under DistributedDataParallel (gloo): the ranks stay identical, and equal one on the whole batch."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import steepest
from support.training import KRONECKER, RELATIVES

RANKS, STEPS, BATCH = 2, 3, 8
OPTIMIZERS = (steepest.Muon, steepest.MuAdam, steepest.MuAdamSANIA, steepest.KFAC, *RELATIVES)
# In the null space of few gradients a basis follows rounding errors: that of the whole batch is another one.
RANKS_ALONE = KRONECKER


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).double()


METHODS: dict[str, Any] = {
    **{cls.__name__: cls for cls in (*OPTIMIZERS, *RANKS_ALONE)},
    "later": partial(steepest.SOAP, precondition_frequency=1, refresh_delay=1, factor_dtype=torch.bfloat16),
    "newton": partial(steepest.Shampoo, precondition_frequency=2, refresh_delay=1, inverse_root="newton"),
}


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


def worker(rank: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    for name, cls in METHODS.items():
        model = nn.parallel.DistributedDataParallel(copy.deepcopy(network()))
        train(cls, model, rank)
        torch.save(model.module.state_dict(), folder / f"{name}-{rank}.pt")
    dist.barrier()  # the first to leave takes the meeting file with it
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo backend")
def test_ranks_agree_with_each_other_and_with_one_process(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)], env=environment, stderr=subprocess.PIPE)
        for rank in range(RANKS)
    ]
    try:
        for rank in ranks:
            _, error = rank.communicate(timeout=120)
            assert rank.returncode == 0, error.decode()
    finally:
        for rank in ranks:  # one that failed leaves the others waiting for it
            rank.kill()
            rank.communicate()
    for method, cls in METHODS.items():
        alone = network()
        train(cls, alone, None)
        first, second = (torch.load(tmp_path / f"{method}-{rank}.pt", weights_only=True) for rank in range(RANKS))
        for name, wanted in alone.state_dict().items():
            assert torch.equal(first[name], second[name])
            if cls in OPTIMIZERS:
                torch.testing.assert_close(first[name], wanted, rtol=1e-8, atol=1e-10)


if __name__ == "__main__":
    worker(int(sys.argv[1]), Path(sys.argv[2]))
