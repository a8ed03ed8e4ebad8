"""share_work=True: replicas share out what they would all do, and keep the bits of one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import steepest
from steepest.optimizer import MatrixOptimizer
from support.processes import Processes
from support.training import give_gradients, parameters

SHAPES = ((8, 5), (5, 8), (6, 6), (8, 5), (12, 7), (7,), (4, 3))
CLASSES = (steepest.Muon, steepest.MuAdam, steepest.SOAP, steepest.Shampoo, steepest.KLShampoo, steepest.MuonMax)


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
    (alone,) = processes.run(trained, cls, backend=backend, ranks=1)
    together = processes.run(trained, cls, share_work=True, backend=backend, ranks=3)
    for weights, state, _ in together:
        assert all(torch.equal(a, b) for a, b in zip(weights, alone[0], strict=True))
        assert state.keys() == alone[1].keys()
        for key, t in state.items():
            torch.testing.assert_close(t, alone[1][key], rtol=1e-6, atol=1e-7, msg=f"{key}: {{}}".format)
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
