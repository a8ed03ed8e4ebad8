"""Sharded training for longer, and when a rank is lost."""

from __future__ import annotations

import os
import re
import signal
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import steepest
from steepest.optimizer import MatrixOptimizer
from support.processes import Processes
from support.sharded import GPT, TOKENS, VOCABULARY, backward, digest, full, optimizer, shard, train
from support.slow import slow

# ---- longer ---------------------------------------------------------------------------------------------------------


def losses(cls: type[MatrixOptimizer], sharded: bool, steps: int, **values: Any) -> tuple[list[float], str]:
    """Of every step, and the digest of the weights."""
    model: Any = shard(GPT()) if sharded else GPT()
    found = train(model, optimizer(cls, model, **values), range(steps))
    return found, digest(full(model))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("cls", [steepest.Muon, steepest.SOAP], ids=lambda cls: cls.__name__)
def test_a_hundred_steps_are_those_of_one_process(processes: Processes, cls: type[MatrixOptimizer], ranks: int) -> None:
    wanted = processes.alone(losses, cls, False, 100)
    assert processes.run(losses, cls, True, 100, ranks=ranks, timeout=300) == [wanted] * ranks


def sequence(start: Tensor) -> Tensor:
    """Tokens that follow from the first: what there is to learn."""
    tokens = [start]
    for _ in range(TOKENS):
        tokens.append((3 * tokens[-1] + 5) % VOCABULARY)
    return torch.stack(tokens, 1)


def learned(cls: type[MatrixOptimizer], sharded: bool, steps: int) -> list[float]:
    """Losses of the whole batch, of which every rank has its share."""
    model: Any = shard(GPT()) if sharded else GPT()
    made = optimizer(cls, model, lr=0.01)
    found = []
    for step in range(steps):
        start = torch.randint(VOCABULARY, (16,), generator=torch.Generator().manual_seed(step))
        tokens = sequence(start.chunk(dist.get_world_size())[dist.get_rank()])
        made.zero_grad()
        logits = model(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        made.step()
        whole = loss.detach().clone()
        dist.all_reduce(whole)
        found.append(float(whole) / dist.get_world_size())
    return found


@pytest.mark.parametrize("steps", [60, slow(500)])
@pytest.mark.parametrize("cls", [steepest.MuAdam], ids=lambda cls: cls.__name__)
def test_shares_of_a_batch_learn_as_the_whole(processes: Processes, cls: type[MatrixOptimizer], steps: int) -> None:
    [wanted] = processes.run(learned, cls, False, steps, ranks=1, timeout=300)
    first, second = processes.run(learned, cls, True, steps, ranks=2, timeout=300)
    assert first == second
    assert sum(wanted[-10:]) < 0.5 * sum(wanted[:10])
    assert abs(sum(first[-10:]) - sum(wanted[-10:])) < 0.02 * sum(wanted[:10])


# ---- a rank that is lost --------------------------------------------------------------------------------------------


def ended(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def a_rank_is_lost(how: str) -> str:
    """The error of the step of a rank whose neighbour has ended, or does not come."""
    model = shard(GPT())
    made = optimizer(steepest.MuAdam, model)
    train(model, made, range(2))
    made.zero_grad()
    backward(model, 2)
    if dist.get_rank() == 1:
        if how == "killed":
            ended()
        if how == "late":
            time.sleep(1000)
        dist.all_to_all_single = ended  # when matrices travel
    try:
        made.step()
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "how, what",
    [
        ("killed", "a word on whether all are about to take the same step"),
        ("killed on the way", r"parts of matrices of \d+ x \d+ of group \d"),
        slow("late", "a word on whether all are about to take the same step"),
    ],
)
def test_a_lost_rank_is_an_error_that_says_what_was_waited_for(processes: Processes, how: str, what: str) -> None:
    outcomes = processes.outcomes(a_rank_is_lost, how, ranks=2, timeout=20, group_timeout=3, grace=15)
    assert outcomes[1].kind == ("waiting" if how == "late" else "died")
    assert outcomes[0].kind == "returned", outcomes[0]
    assert re.match(
        rf"a collective of the step failed on rank 0 among the ranks \(0, 1\), waiting for {what}: ", outcomes[0].value
    ), outcomes[0].value
    assert "look for the first error of every rank" in outcomes[0].value
