"""Steps of a submatrix of matrices that ranks share, by the fused ops: weights, momenta and reports of one process."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import steepest
from steepest.ops import backend as backends
from support.processes import Processes
from support.training import noise

pytestmark = pytest.mark.skipif(backends.extension is None, reason=f"{backends.extension_reason}")

SHAPES = ((18, 5), (5, 9), (12, 12), (18, 5), (7,))
#: steps in which the first weight's gradient has an entry that is not finite, on one rank
BAD = {2: math.nan, 4: math.inf}


def steps(
    dim: int | None, dtype: torch.dtype, after: str | None
) -> tuple[set[str], list[Tensor], list[Tensor], list[dict[str, float]]]:
    """(backends, weights, momenta, what every step reported)."""

    def made(t: Tensor) -> Tensor:
        return t if dim is None else distribute_tensor(t, mesh, [Shard(dim if t.ndim > 1 else 0)])

    def whole(t: Tensor) -> Tensor:
        return (t.full_tensor() if isinstance(t, DTensor) else t).detach()

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    params = [nn.Parameter(made(noise(shape, i, dtype))) for i, shape in enumerate(SHAPES)]
    groups = [{"params": params[:2]}, {"params": params[2:4], "momentum": 0.5, "lr": 0.01}]
    every = [*groups, {"params": params[4:], "use_muon": False}]
    optimizer = steepest.Dion2(every, lr=0.02, weight_decay=0.1, fraction=0.4, after=after)
    reports = []
    for step in range(6):
        for i, p in enumerate(params):
            g = noise(p.shape, 10 * step + i + 3, dtype)
            if step in BAD and i == 0:
                g[-1, -1] = BAD[step]
            p.grad = made(g)
        taken = optimizer.prepare()
        optimizer.step()
        metrics = optimizer.metrics()
        reports.append({name: float(t) for name, t in metrics.items() if name.endswith("norm")})
    return (
        taken,
        [whole(p) for p in params],
        [whole(optimizer.state[p]["momentum_buffer"]) for p in params[:4]],
        reports,
    )


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("dim, after", [(0, None), (1, "rows"), pytest.param(1, None, marks=pytest.mark.slow)])
def test_they_are_those_of_one_process(processes: Processes, dim: int, after: str | None, dtype: torch.dtype) -> None:
    taken, weights, momenta, reports = processes.alone(steps, None, dtype, after)
    assert taken == {"cpu"}
    for here, some, others, said in processes.run(steps, dim, dtype, after, ranks=3):
        assert here == taken
        assert all(torch.equal(t, other) for t, other in zip(some, weights, strict=True))
        assert all(torch.equal(t, other) for t, other in zip(others, momenta, strict=True))
        for report, wanted in zip(said, reports, strict=True):
            assert report == pytest.approx(wanted, rel=1e-6)
