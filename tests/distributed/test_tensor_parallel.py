"""Tensor parallel matrices: by a sum of Gram matrices where that sends less, else by owners."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Shard, distribute_tensor

import steepest
from steepest.optimizer import MatrixOptimizer
from support.problems import gap
from support.processes import Processes
from support.training import noise

pytestmark = pytest.mark.slow

#: Newton-Schulz steps until every singular value is 1, so that nothing but rounding is left.
CONVERGED = [(1.5, -0.5, 0.0)] * 24
SHAPES = ((33, 12), (12, 33), (9, 9), (600, 6), (6, 600))


def steps(cls: type[MatrixOptimizer], name: str, placement: Placement | None, **values: object) -> list[Tensor]:
    """Weights after four steps; placement: None of plain parameters."""

    def made(t: Tensor) -> Tensor:
        return t if placement is None else distribute_tensor(t, mesh, [placement])

    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=(name,))
    params = [nn.Parameter(made(noise(shape, i))) for i, shape in enumerate(SHAPES)]
    optimizer = cls(params, **values)  # type: ignore[arg-type]
    for step in range(4):
        for i, p in enumerate(params):
            p.grad = made(noise(SHAPES[i], 100 * step + i + 50))
        optimizer.step()
    return [(p.full_tensor() if isinstance(p, DTensor) else p).detach() for p in params]


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("dim, by_gram", [(0, (3,)), (1, (4,))])
def test_the_long_side(processes: Processes, dim: int, by_gram: tuple[int, ...], backend: str) -> None:
    """Thin ones by the Gram form within rounding, others to the bits of one process; another mesh has owners only."""
    values = {"polar": CONVERGED, "backend": backend, "lr": 0.1, "weight_decay": 0.0}
    for name in ("tp", "shards"):
        together = processes.run(steps, steepest.Muon, name, Shard(dim), ranks=3, **values)
        alone = processes.alone(steps, steepest.Muon, name, None, **values)
        for rank in together[1:]:
            assert all(torch.equal(a, b) for a, b in zip(rank, together[0], strict=True))
        for i, (p, wanted, shape) in enumerate(zip(together[0], alone, SHAPES, strict=True)):
            if name == "shards" or i not in by_gram:
                assert torch.equal(p, wanted)
            else:
                moved = wanted - noise(shape, i)
                assert not torch.equal(p, wanted)
                assert gap(p - noise(shape, i), moved) < 0.03  # bf16 products where one process has them


def test_singular_values_of_a_step(processes: Processes) -> None:
    """What the Gram route steps along is a polar factor, by an fp64 SVD of what one process measures."""
    values = {"polar": CONVERGED, "lr": 1.0, "weight_decay": 0.0, "momentum": 0.0, "nesterov": False}
    for weights in processes.run(one_step, ranks=2, **values):
        for before, after in weights:
            s = torch.linalg.svdvals((before - after).double() / max(1, before.shape[0] / before.shape[1]) ** 0.5)
            assert (s - 1).abs().max() < 0.02


def one_step(**values: object) -> list[tuple[Tensor, Tensor]]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    params = [nn.Parameter(distribute_tensor(noise(shape, i), mesh, [Shard(0)])) for i, shape in enumerate(SHAPES)]
    before = [p.full_tensor().detach().clone() for p in params]  # type: ignore[attr-defined]
    optimizer = steepest.Muon(params, **values)  # type: ignore[arg-type]
    for i, p in enumerate(params):
        p.grad = distribute_tensor(noise(SHAPES[i], 7 + i), mesh, [Shard(0)])
    optimizer.step()
    return list(zip(before, [p.full_tensor().detach() for p in params], strict=True))  # type: ignore[attr-defined]
