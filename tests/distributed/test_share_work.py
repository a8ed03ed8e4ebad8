"""share_work=True: replicas share out what they would all do, and keep the bits of one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import steepest
from steepest.optimizer import MatrixOptimizer
from support.processes import Processes
from support.training import give_gradients, noise, parameters

pytestmark = pytest.mark.slow

SHAPES = ((8, 5), (5, 8), (6, 6), (8, 5), (12, 7), (7,), (4, 3))
CLASSES = (
    steepest.Muon,
    steepest.MuAdam,
    steepest.SOAP,
    steepest.Shampoo,
    steepest.KLShampoo,
    steepest.MuonMax,
    steepest.Dion2,
)


def trained(cls: type[MatrixOptimizer], **values: object) -> tuple[list[Tensor], dict[str, Tensor], int]:
    """(weights, the state of a checkpoint, numbers of state on this rank) after four steps, one of them with a NaN."""
    params = parameters(SHAPES)
    matrices = {"params": params[:5]}
    optimizer = cls([matrices, {"params": params[5:], "use_muon": False}], **values)  # type: ignore[arg-type]
    for step in range(4):
        give_gradients(params, step)
        if step == 2:
            assert params[1].grad is not None
            params[1].grad[0, 0] = torch.nan
        optimizer.step()
    saved = optimizer.state_dict()
    state = {f"{i}.{key}": t for i, of_one in saved["state"].items() for key, t in of_one.items()}
    numbers = sum(t.numel() for of_one in optimizer.state.values() for t in of_one.values())
    other = cls([{"params": params[:5]}, {"params": params[5:], "use_muon": False}], **values)  # type: ignore[arg-type]
    other.load_state_dict(saved)
    give_gradients(params, 9)
    other.step()
    return [p.detach() for p in params], state, numbers


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_the_bits_of_one_process(processes: Processes, cls: type[MatrixOptimizer], backend: str) -> None:
    alone = processes.alone(trained, cls, backend=backend)
    together = processes.run(trained, cls, share_work=True, backend=backend, ranks=3)
    for weights, state, _ in together:
        assert all(torch.equal(a, b) for a, b in zip(weights, alone[0], strict=True))
        assert state.keys() == alone[1].keys()
        for key, t in state.items():
            assert torch.equal(t, alone[1][key]), key
    if cls in (steepest.SOAP, steepest.Shampoo, steepest.KLShampoo):
        assert sum(numbers for *_, numbers in together) < 2 * alone[2]  # factors are at one rank, momenta at three


def without_ranks() -> str:
    dist.destroy_process_group()
    with pytest.raises(
        RuntimeError, match="share_work=True shares work among the ranks of torch.distributed, which is"
    ):
        steepest.Muon(parameters(SHAPES[:2]), share_work=True)
    return "refused"


def test_there_must_be_ranks(processes: Processes) -> None:
    assert processes.run(without_ranks, ranks=1) == ["refused"]


def of_copies(cls: type[MatrixOptimizer], share_work: bool | None) -> tuple[list[Tensor], list[int]]:
    """(whole weights after three steps on a mesh of two copies of two shards, matrices of each that this rank owns)."""

    def made(t: Tensor) -> Tensor:
        return t if share_work is None else distribute_tensor(t, mesh, [Replicate(), Shard(0)])

    mesh = init_device_mesh("cpu", (2, 2)) if share_work is not None else None  # type: ignore[assignment]
    params = [nn.Parameter(made(noise(shape, i))) for i, shape in enumerate(SHAPES[:5])]
    optimizer = cls([{"params": params}], **({} if share_work is None else {"share_work": share_work}))  # type: ignore[arg-type]
    for step in range(3):
        for i, p in enumerate(params):
            p.grad = made(noise(SHAPES[i], 10 * step + i + 7))
        optimizer.step()
    owned = [sum(piece.batch for piece in optimizer._pieces_here(p, optimizer.param_groups[0])) for p in params]
    return [(p.full_tensor() if isinstance(p, DTensor) else p).detach() for p in params], owned


@pytest.mark.parametrize("cls", [steepest.MuAdam, steepest.SOAP], ids=lambda cls: cls.__name__)
def test_copies_of_shards(processes: Processes, cls: type[MatrixOptimizer]) -> None:
    """HSDP: without share_work each copy has an owner for every matrix, with it there is one for all."""
    alone = processes.alone(of_copies, cls, None)
    for share_work, owners in ((False, 2), (True, 1)):
        together = processes.run(of_copies, cls, share_work, ranks=4)
        for weights, _ in together:
            assert all(torch.equal(a, b) for a, b in zip(weights, alone[0], strict=True))
        assert [sum(counts) for counts in zip(*(owned for _, owned in together), strict=True)] == [owners] * 5


def of_expert_copies(sharded: bool) -> tuple[Tensor, tuple[int, ...]]:
    """(four experts after three steps, the owner of each): two copies of two ranks that have two experts each."""
    mesh = init_device_mesh("cpu", (2, 2)) if sharded else None

    def made(t: Tensor) -> Tensor:
        return t if mesh is None else distribute_tensor(t, mesh, [Replicate(), Shard(0)])

    p = nn.Parameter(made(noise((4, 6, 5), 0)))
    optimizer = steepest.SOAP([{"params": [p], "batch_dims": 1}], share_work=sharded)
    for step in range(3):
        p.grad = made(noise((4, 6, 5), 10 + step))
        optimizer.step()
    owners = optimizer._owners_of(p, optimizer.param_groups[0])[0] if sharded else ()
    return (p.full_tensor() if isinstance(p, DTensor) else p).detach(), owners


def test_copies_of_experts_stay_where_they_are(processes: Processes) -> None:
    """Of the copies of an expert that no shard cuts one has the work, and no gradient leaves it."""
    wanted, _ = processes.alone(of_expert_copies, False)
    for weights, owners in processes.run(of_expert_copies, True, ranks=4):
        assert torch.equal(weights, wanted)
        assert [owner % 2 for owner in owners] == [0, 0, 1, 1]
        assert sorted(owners) == [0, 1, 2, 3]
