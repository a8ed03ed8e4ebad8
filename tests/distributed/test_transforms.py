"""Transforms that remember rows, entries or matrices: state at owners, and in a checkpoint as in one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import steepest
from support.processes import Processes
from support.training import noise

pytestmark = pytest.mark.slow

SHAPES = {"a": ((18, 5), {}), "qkv": ((24, 5), {"split_sizes": (12, 6, 6), "num_heads": (2, 1, 1)}), "b": ((5, 9), {})}


def steps(name: str, dim: int | None, backend: str, **values: object) -> tuple[list[Tensor], list[Tensor]]:
    """(weights, what transforms remember) after four steps, the last with what a checkpoint gave back."""

    def made(t: Tensor) -> Tensor:
        return t if dim is None else distribute_tensor(t, mesh, [Shard(dim)])

    def whole(t: Tensor) -> Tensor:
        return (t.full_tensor() if isinstance(t, DTensor) else t).detach()

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    params = {name: nn.Parameter(made(noise(shape, i))) for i, (name, (shape, _)) in enumerate(SHAPES.items())}
    groups = [{"params": [params[name]], "param_names": [name], **options} for name, (_, options) in SHAPES.items()]
    cls = getattr(steepest, name)
    optimizer = cls([dict(group) for group in groups], backend=backend, **values)
    for step in range(4):
        if step == 3:
            saved = optimizer.state_dict()
            optimizer = cls([dict(group) for group in groups], backend=backend, **values)
            optimizer.load_state_dict(saved)
        for i, p in enumerate(params.values()):
            p.grad = made(noise(p.shape, 10 * step + i + 3))
        optimizer.step()
    states = optimizer.state_dict()["state"].values()
    remembered = [whole(t) for state in states for key, t in state.items() if key.endswith("exp_avg_sq")]
    assert len(remembered) == len(SHAPES)
    return [whole(p) for p in params.values()], remembered


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", ["NorMuon", "AdaMuon", "NAMO", "Dion2"])
def test_updates_are_remembered_by_owners(processes: Processes, name: str, dim: int, backend: str) -> None:
    values = {"after": "rows", "cautious_update": backend == "torch"} if name == "Dion2" else {}
    alone = processes.alone(steps, name, None, backend, **values)
    for together in processes.run(steps, name, dim, backend, **values, ranks=3):
        for found, wanted in zip(together, alone, strict=True):
            for t, other in zip(found, wanted, strict=True):
                assert torch.equal(t, other)
