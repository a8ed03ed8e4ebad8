"""The harness of the tests on several processes: what it says of cases that do not end well, and that it goes on."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from support.processes import Processes, RankError


@dataclass(frozen=True)
class Answer:
    """A class of this file, which pytest imports under a name of its own."""

    rank: int
    total: Tensor


class UnpicklableError(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__("its arguments are not those of its constructor")


def summed(value: Tensor, factor: float = 1.0) -> Answer:
    total = value * (dist.get_rank() + 1)
    dist.all_reduce(total)
    return Answer(dist.get_rank(), factor * total)


def first_returns_early() -> float:
    """Rank 0 has sent all that the others need before they listen."""
    value = torch.full((3,), dist.get_rank() + 1.0)
    if dist.get_rank() > 0:
        time.sleep(0.2)
    dist.broadcast(value, 0)
    return float(value.sum())


def prints_its_process_and_hangs() -> None:
    print(os.getpid(), flush=True)
    time.sleep(1000)


def process_id() -> int:
    return os.getpid()


def process_of(name: str, *, number: int) -> tuple[str, int, int]:
    return name, number, os.getpid()


def one_raises(rank: int) -> None:
    if dist.get_rank() == rank:
        raise KeyError(f"nothing on rank {rank}")
    dist.barrier()


def one_is_wrong(rank: int) -> None:
    total = torch.full((2,), 1.5 if dist.get_rank() == rank else 1.0)
    dist.barrier()
    torch.testing.assert_close(total, torch.ones(2))


def all_raise() -> NoReturn:
    raise UnpicklableError(1, 2)


def one_is_late(rank: int) -> None:
    if dist.get_rank() == rank:
        print("about to sleep")
        time.sleep(1000)
    dist.barrier()


def one_is_killed(rank: int) -> None:
    if dist.get_rank() == rank:
        print("my last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def leaves_something_behind() -> tuple[int, int, bool]:
    seen = getattr(torch, "_left_behind", 0)
    torch._left_behind = 1  # type: ignore[attr-defined]
    return seen, torch.get_num_threads(), torch.cuda.is_available()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_rank_gets_the_arguments_and_gives_a_result(processes: Processes, ranks: int) -> None:
    answers = processes.run(summed, torch.arange(3.0), ranks=ranks, factor=0.5)
    for rank, answer in enumerate(answers):
        assert isinstance(answer, Answer)
        assert answer.rank == rank
        assert torch.equal(answer.total, 0.25 * ranks * (ranks + 1) * torch.arange(3.0))


def test_a_rank_that_returns_early_does_not_disturb_the_others(processes: Processes) -> None:
    assert processes.run(first_returns_early, ranks=3) == [3.0, 3.0, 3.0]


def test_results_larger_than_a_pipe(processes: Processes) -> None:
    [answer] = processes.run(summed, torch.arange(1e6), ranks=1)
    assert torch.equal(answer.total, torch.arange(1e6))


def test_cases_leave_nothing_behind(processes: Processes) -> None:
    for _ in range(2):
        assert processes.run(leaves_something_behind, ranks=2) == [(0, 1, False)] * 2


def test_a_case_alone_runs_once(processes: Processes) -> None:
    """And again with other arguments, or after one that failed."""
    first = processes.alone(process_of, "a", number=1)
    assert first[:2] == ("a", 1)
    assert processes.alone(process_of, "a", number=1) == first
    others = [processes.alone(process_of, "b", number=1), processes.alone(process_of, "a", number=2)]
    assert [each[:2] for each in others] == [("b", 1), ("a", 2)]
    assert len({each[2] for each in (first, *others)}) == 3
    for _ in range(2):
        with pytest.raises(RankError, match="nothing on rank 0"):
            processes.alone(one_raises, 0)


def test_a_rank_that_raises_ends_the_case_for_all(processes: Processes) -> None:
    begun = time.monotonic()
    with pytest.raises(RankError, match="(?s)one_raises on 3 ranks.*rank 1 raised.*KeyError: 'nothing on rank 1'") as e:
        processes.run(one_raises, 1, ranks=3)
    assert time.monotonic() - begun < 60
    assert "line" in str(e.value)  # of a traceback
    assert "in one_raises" in str(e.value)
    error = e.value.outcomes[1].error
    assert isinstance(error, KeyError)
    assert error.args == ("nothing on rank 1",)
    assert [outcome.kind for outcome in e.value.outcomes[::2]] != ["returned"] * 2


def test_a_rank_with_a_wrong_result_is_named(processes: Processes) -> None:
    with pytest.raises(RankError, match="(?s)rank 0 returned\nrank 1 raised.*Tensor-likes are not close") as e:
        processes.run(one_is_wrong, 1, ranks=2)
    assert isinstance(e.value.outcomes[1].error, AssertionError)


def test_an_error_that_cannot_be_pickled_has_its_traceback(processes: Processes) -> None:
    outcomes = processes.outcomes(all_raise, ranks=2)
    assert [(outcome.kind, outcome.error) for outcome in outcomes] == [("raised", None)] * 2
    assert all("UnpicklableError: its arguments are not" in outcome.text for outcome in outcomes)


def test_a_case_that_hangs_says_where(processes: Processes) -> None:
    with pytest.raises(RankError, match="one_is_late on 2 ranks, after") as e:
        processes.run(one_is_late, 1, ranks=2, timeout=2)
    barrier, late = e.value.outcomes
    assert (barrier.kind, late.kind) == ("waiting", "waiting")
    assert "in one_is_late" in barrier.log
    assert "in barrier" in barrier.log
    assert "about to sleep" in late.log
    assert "in barrier" not in late.log.replace("in one_is_late", "")
    assert "rank 1 is still waiting" in str(e.value)


def test_a_rank_that_is_killed(processes: Processes) -> None:
    outcomes = processes.outcomes(one_is_killed, 0, ranks=3)
    assert outcomes[0].kind == "died"
    assert "my last words" in outcomes[0].log
    assert [outcome.kind for outcome in outcomes[1:]] == ["raised", "raised"]  # gloo says that a peer is gone


def test_after_failures_cases_go_on(processes: Processes) -> None:
    with pytest.raises(RankError):
        processes.run(one_is_late, 0, ranks=2, timeout=1)
    assert processes.run(process_id, ranks=1) != processes.run(process_id, ranks=1)


def test_a_case_is_a_function_that_ranks_can_import(processes: Processes) -> None:
    with pytest.raises(ValueError, match="a case must be a function of a module, so that ranks can import it"):
        processes.run(lambda: None, ranks=1)


def test_no_rank_outlives_its_case(processes: Processes) -> None:
    pids = processes.run(process_id, ranks=2)
    (hung,) = processes.outcomes(prints_its_process_and_hangs, ranks=1, timeout=1)
    for pid in (*pids, int(hung.log.splitlines()[0])):
        for _ in range(100):
            if not Path(f"/proc/{pid}").exists():
                break
            time.sleep(0.05)
        assert not Path(f"/proc/{pid}").exists()
