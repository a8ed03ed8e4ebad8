"""Matrices travel while others are orthogonalized: what is begun before what, and the bits of one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import steepest
from steepest.ops import multi_tensor
from steepest.step.eager import Eager
from steepest.step.fused import Fused
from support.processes import Processes
from support.sharded import GPT, different, digest, full, optimizer, shard, train
from support.slow import slow

#: So little that every direction call has a round of its own.
ROOM = 20_000
CASES = {
    "Muon": (steepest.Muon, {}),
    "MuAdam by torch operations": (steepest.MuAdam, {"backend": "torch"}),
    "NorMuon": (steepest.NorMuon, {}),
    "Dion2": (steepest.Dion2, {}),
    "Dion3": (steepest.Dion2, {"after": "rows"}),
    "SOAP": (steepest.SOAP, {"precondition_frequency": 2}),
    "SOAP with late bases": (steepest.SOAP, {"precondition_frequency": 3, "refresh_delay": 2}),
    "KLShampoo by torch operations": (steepest.KLShampoo, {"backend": "torch"}),
    "MuonMax": (steepest.MuonMax, {}),
    "l2": (steepest.ProductNormDescent, {"product": "l2", "scale": "lmo"}),
    "l2 by torch operations": (steepest.ProductNormDescent, {"product": "l2", "scale": "lmo", "backend": "torch"}),
}
QUICK = ("Muon", "SOAP", "SOAP with late bases", "MuonMax")


def weights_of(name: str, sharded: bool) -> dict[str, Tensor]:
    cls, options = CASES[name]
    model = shard(GPT()) if sharded else GPT()
    train(model, optimizer(cls, model, **options, **({"max_workspace_bytes": ROOM} if sharded else {})))
    return full(model)


@pytest.mark.parametrize("name", [name if name in QUICK else slow(name) for name in CASES])
def test_many_rounds_give_the_bits_of_one_process(processes: Processes, name: str) -> None:
    alone = processes.alone(weights_of, name, False)
    for weights in processes.run(weights_of, name, True, ranks=2):
        assert digest(weights) == digest(alone), different(weights, alone)


def heard(calls: list[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def calling(*args: Any, **options: Any) -> Any:
        calls.append(name)
        return function(*args, **options)

    return calling


class Travelling:
    """A collective's work, which says when it is waited for."""

    def __init__(self, work: Any, name: str, calls: list[str]) -> None:
        self.work, self.name, self.calls = work, name, calls

    def wait(self) -> None:
        self.calls.append(f"wait {self.name}")
        self.work.wait()


def calls_of_a_step(name: str) -> list[str]:
    """What a step does, in its order: every exchange begun and waited for, directions, elementwise calls."""
    cls, options = CASES[name]
    model = shard(GPT())
    made = optimizer(cls, model, **options, max_workspace_bytes=ROOM)
    train(model, made)
    calls: list[str] = []
    begun = dist.all_to_all_single

    def begin(*args: Any, **options: Any) -> Travelling:
        number = str(sum(call.startswith("begin") for call in calls))
        calls.append(f"begin {number}")
        return Travelling(begun(*args, **options), number, calls)

    dist.all_to_all_single = begin
    for executor in (Fused, Eager):
        executor.directions = heard(calls, "directions", executor.directions)  # type: ignore[attr-defined]
    multi_tensor.update_moments = heard(calls, "moments", multi_tensor.update_moments)
    made.step()
    return calls


@pytest.mark.parametrize("name", ["Muon", slow("MuAdam by torch operations"), slow("NorMuon"), slow("Dion2")])
def test_the_next_and_the_last_travel_while_one_is_worked_on(processes: Processes, name: str) -> None:
    """Directions are taken between the beginning and the end of every exchange but the first there and the last back,
    and never more than one round each way is on its way: memory has room for that.
    """
    alike = processes.run(calls_of_a_step, name, ranks=2)
    assert alike[0] == alike[1]  # collectives in one order
    calls = alike[0]
    travelling: dict[str, int] = {}
    exposed, most = [], 0
    for at, call in enumerate(calls):
        what, _, number = call.partition(" ")
        if what == "begin":
            travelling[number] = at
            most = max(most, len(travelling))
        elif what == "wait" and "directions" not in calls[travelling.pop(number) : at]:
            exposed.append(number)
    exchanges = sum(call.startswith("begin") for call in calls)
    assert not travelling
    assert exchanges > 6
    assert set(exposed) <= {"0", str(exchanges - 1)}
    assert most == 3  # before the oldest is waited for


def test_vectors_are_stepped_while_the_first_round_travels(processes: Processes) -> None:
    for calls in processes.run(calls_of_a_step, "Muon", ranks=2):
        first = calls[: calls.index("wait 0")]
        assert first[:3] == ["moments", "begin 0", "moments"]


def test_without_shards_nothing_is_ahead() -> None:
    """One process has the inputs of one round at a time."""
    torch.manual_seed(0)
    model = GPT()
    made = optimizer(steepest.Muon, model, max_workspace_bytes=ROOM)
    train(model, made)
    assert made._plan is not None
    assert {executor.prefetch for executor in made._plan.executors} == {0}
