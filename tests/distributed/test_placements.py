"""Every way in which a DTensor may lie on a mesh, with gradients that are the same whatever it is: the bits of one
process, where no rank's products are cut."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import steepest
from steepest.optimizer import MatrixOptimizer
from support.processes import Processes
from support.sharded import whole
from support.slow import slow
from support.training import made, noise, same_bits

pytestmark = pytest.mark.slow

STEPS = 4
#: name: shape, how it is read as matrices
SHAPES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "plain": ((8, 6), {}),
    "uneven": ((7, 5), {}),
    "few rows": ((2, 9), {}),
    "one row": ((1, 6), {}),
    "one column": ((6, 1), {}),
    "heads that shards do not cut": ((8, 6), {"num_heads": 4}),
    "heads that shards cut": ((12, 6), {"num_heads": 3}),
    "splits": ((11, 4), {"split_sizes": (6, 4, 1)}),
    "grouped queries": ((16, 6), {"split_sizes": (8, 4, 4), "num_heads": (4, 2, 2)}),
    "heads of several pieces": ((24, 7), {"split_sizes": (12, 6, 6), "num_heads": (6, 3, 3)}),
    "transposed heads": ((7, 24), {"split_sizes": (12, 6, 6), "num_heads": (6, 3, 3), "transposed": True}),
    "interleaved heads": ((24, 5), {"split_sizes": (8, 8, 8), "interleaved": 4}),
    "interleaved groups": ((24, 6), {"split_sizes": (12, 6, 6), "interleaved": 3, "num_heads": (6, 3, 3)}),
    "interleaved, heads across groups": ((24, 3), {"split_sizes": (12, 12), "interleaved": 6, "num_heads": (2, 4)}),
    "interleaved, transposed": ((5, 24), {"split_sizes": (12, 6, 6), "interleaved": 3, "transposed": True}),
    "interleaved experts": ((3, 10, 4), {"batch_dims": 1, "split_sizes": (5, 5), "interleaved": 5}),
    "experts": ((4, 6, 5), {"batch_dims": 1}),
    "uneven experts": ((3, 4, 6), {"batch_dims": 1}),
    "experts with heads": ((4, 8, 3), {"batch_dims": 1, "split_sizes": (4, 4), "num_heads": 2}),
    "convolution": ((6, 4, 3), {"batch_dims": 0}),
    "transposed convolution": ((7, 4, 2), {"batch_dims": 0, "transposed": True}),
    "transposed convolution of groups": ((8, 3, 2, 2), {"transposed": True, "num_heads": 2, "split_columns": True}),
    "empty": ((0, 4), {}),
}
VECTORS = ((9,), (1,), (5, 3), ())
S0, S1, R = Shard(0), Shard(1), Replicate()
#: name: ranks of every dimension of the mesh, placements
PLACEMENTS: dict[str, tuple[tuple[int, ...], tuple[Placement, ...]]] = {
    "rows over 2": ((2,), (S0,)),
    "rows over 4": ((4,), (S0,)),
    "columns over 2": ((2,), (S1,)),
    "columns over 4": ((4,), (S1,)),
    "replicated": ((2,), (R,)),
    "replicas of rows": ((2, 2), (R, S0)),
    "rows, then columns": ((2, 2), (S0, S1)),
    "columns, then rows": ((2, 2), (S1, S0)),
    "rows twice": ((2, 2), (S0, S0)),
    "rows of replicas": ((2, 2), (S0, R)),
}
CLASSES: tuple[type[MatrixOptimizer], ...] = (
    steepest.Muon,
    steepest.MuAdam,
    steepest.SOAP,
    steepest.KLShampoo,
    steepest.Dion2,
)


def options_of(cls: type[MatrixOptimizer]) -> dict[str, Any]:
    extra = {"precondition_frequency": 2} if issubclass(cls, (steepest.SOAP, steepest.KLShampoo)) else {}
    return {"lr": 0.05, "weight_decay": 0.1, "adamw_weight_decay": 0.1, "adamw_lr": 0.01, **extra}


def optimizer(cls: type[MatrixOptimizer], params: Sequence[nn.Parameter]) -> MatrixOptimizer:
    groups: list[dict[str, Any]] = [
        {"params": [(name, p)], "use_muon": True, **values}
        for (name, (_, values)), p in zip(SHAPES.items(), params, strict=False)
    ]
    vectors = [(f"vector {i}", p) for i, p in enumerate(params[len(SHAPES) :])]
    return made(cls, [*groups, {"params": vectors, "use_muon": False}], **options_of(cls))


def shapes() -> list[tuple[int, ...]]:
    return [*(shape for shape, _ in SHAPES.values()), *VECTORS]


def train(made: MatrixOptimizer, params: Sequence[nn.Parameter]) -> list[Tensor]:
    """Weights of steps with given gradients, which lie as the parameters do; state is saved and loaded in between."""
    for step in range(STEPS):
        if step == STEPS // 2:
            made.load_state_dict(made.state_dict())
        for i, p in enumerate(params):
            g = noise(p.shape, 1000 * (step + 1) + i)
            p.grad = distribute_tensor(g, p.device_mesh, p.placements) if isinstance(p, DTensor) else g
        made.step()
    return [whole(p.detach()) for p in params]


def alone(classes: Sequence[type[MatrixOptimizer]]) -> list[list[Tensor]]:
    found = []
    for cls in classes:
        params = [nn.Parameter(noise(shape, i)) for i, shape in enumerate(shapes())]
        found.append(train(optimizer(cls, params), params))
    return found


def placed(classes: Sequence[type[MatrixOptimizer]], name: str) -> list[list[Tensor]]:
    """By class. What has no such dimension is replicated along that of the mesh."""
    sizes, placements = PLACEMENTS[name]
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=tuple("ab"[: len(sizes)]))
    found = []
    for cls in classes:
        params = []
        for i, shape in enumerate(shapes()):
            lies = [R if isinstance(each, Shard) and each.dim >= len(shape) else each for each in placements]
            params.append(nn.Parameter(distribute_tensor(noise(shape, i), mesh, lies)))
        found.append(train(optimizer(cls, params), params))
    return found


def check(found: Sequence[Tensor], wanted: Sequence[Tensor], what: str) -> None:
    names = [*SHAPES, *(f"a vector of shape {shape}" for shape in VECTORS)]
    for name, a, b in zip(names, found, wanted, strict=True):
        assert same_bits(a, b), f"{what}, {name}: off by {float((a - b).abs().max())}"


#: For every run; the others look closer.
QUICK = ("columns over 2", "replicas of rows")


@pytest.mark.parametrize("name", [name if name in QUICK else slow(name) for name in PLACEMENTS])
def test_placements_do_not_change_a_bit(processes: Processes, name: str) -> None:
    wanted = processes.alone(alone, CLASSES)
    for found in processes.run(placed, CLASSES, name, ranks=prod(PLACEMENTS[name][0])):
        for number, cls in enumerate(CLASSES):
            check(found[number], wanted[number], cls.__name__)


# ---- tensor parallelism ---------------------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


def of_sequences(cls: type[MatrixOptimizer], parallel: bool) -> dict[str, Tensor]:
    """Layers whose norms see parts of the sequences: gradients that are yet to be summed over the ranks."""
    model: nn.Module = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8)).double()
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p)
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if parallel else (0, 1)
    if parallel:
        up, down = ColwiseParallel(input_layouts=Shard(1)), RowwiseParallel(output_layouts=Shard(1))
        mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))
        parallelize_module(model, mesh, {"0": SequenceParallel(), "1": up, "3": down})
    made = cls(model, **{key: value for key, value in options_of(cls).items() if key != "adamw_lr"})
    for step in range(STEPS):
        made.zero_grad()
        model(noise((4, 6, 8), step, torch.float64).chunk(ranks, 1)[rank]).square().sum().backward()
        if parallel:
            assert model[0].weight.grad.placements[0].is_partial()  # type: ignore[index, union-attr]
        made.step()
    return {name: whole(p.detach()) for name, p in model.named_parameters()}


@pytest.mark.parametrize("cls", [steepest.Muon, slow(steepest.MuAdam)], ids=lambda cls: cls.__name__)
def test_gradients_of_parts_of_sequences_are_summed(processes: Processes, cls: type[MatrixOptimizer]) -> None:
    wanted = processes.alone(of_sequences, cls, False)
    for found in processes.run(of_sequences, cls, True, ranks=2):
        for name, t in found.items():
            torch.testing.assert_close(t, wanted[name], rtol=1e-8, atol=1e-10)


def trained(cls: type[MatrixOptimizer], sizes: tuple[int, ...]) -> dict[str, Tensor]:
    """Layers in fp64: whole, with tensor parallelism over the ranks, or with fully_shard before it."""
    model = nn.Sequential(*(Layer() for _ in range(2))).double()
    if sizes:
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("dp", "tp")[-len(sizes) :])
        for layer in model:
            parallelize_module(layer, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        if len(sizes) == 2:
            for layer in model:
                fully_shard(layer, mesh=mesh["dp"])
            fully_shard(model, mesh=mesh["dp"])
    made = cls(model, **{key: value for key, value in options_of(cls).items() if key != "adamw_lr"})
    for step in range(STEPS):
        made.zero_grad()
        model(noise((16, 8), step, torch.float64)).square().mean().backward()
        made.step()
    return {name: whole(p.detach()) for name, p in model.named_parameters()}


@pytest.mark.parametrize("sizes", [(2,), slow((4,)), slow((2, 2))], ids=str)
@pytest.mark.parametrize("cls", [steepest.Muon, steepest.MuAdam], ids=lambda cls: cls.__name__)
def test_tensor_parallelism_trains_as_one_process(
    processes: Processes, cls: type[MatrixOptimizer], sizes: tuple[int, ...]
) -> None:
    """Sums of the layers' products are cut, so that the gradients are others in the last bits."""
    wanted = processes.alone(trained, cls, ())
    for found in processes.run(trained, cls, sizes, ranks=prod(sizes)):
        for name, t in found.items():
            torch.testing.assert_close(
                t, wanted[name], rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
            )
