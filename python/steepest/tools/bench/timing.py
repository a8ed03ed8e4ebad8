"""Interleaved timing of named calls, so that a slow minute of the machine is everybody's.

Each round makes every call once, in an order that rotates; the figure is the median over rounds and the spread is half
the distance between the quartiles.  On a GPU the clock is a pair of events around the call.  Before each call

    what the L2 cache holds is written over,
    with ``hide`` the GPU is kept busy for as long as the host needs to issue the call, so that the gaps between its
    launches are not in the time.

What the host needs is measured apart, and is part of the result.  On a CPU with one thread the clock is the process's
CPU time, which does not count what other processes take.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FLUSH_BYTES = 1 << 28  # several times the L2 cache of any GPU
HOST_CALLS, HOST_ENOUGH = 3, 0.1  # calls at most, and the seconds after which no other is made
CLOCK = 2e9  # cycles a second at most of a GPU to keep busy: too many cycles are only a longer lead
MOST_LEAD = 0.02  # seconds
LEAD = 1.25  # of what the host needed


@dataclass(frozen=True)
class Call:
    """``before`` is made each time before ``run`` and not timed."""

    run: Callable[[], Any]
    before: Callable[[], Any] | None = None

    def prepare(self) -> None:
        if self.before is not None:
            self.before()


@dataclass(frozen=True)
class Timing:
    """The times of a call, in seconds."""

    median: float
    spread: float  # half the interquartile range
    fastest: float
    host: float | None = None  # until the call has returned, on a GPU


def interleaved(
    calls: Mapping[str, Call], *, rounds: int = 9, warmup: int = 2, device: str = "cpu", hide: bool = False
) -> dict[str, Timing]:
    """Times every call ``rounds`` times in turn, after ``warmup`` of each; see above for ``hide``."""
    cuda = device.startswith("cuda")
    cold = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if cuda else None
    for call in calls.values():
        for _ in range(warmup):
            call.prepare()
            call.run()
    hosts = {name: host_seconds(call) if cuda else None for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            lead = min(LEAD * (hosts[name] or 0.0), MOST_LEAD) if hide else 0.0
            samples[name].append(seconds(calls[name], device, cold=cold, lead=lead))
    return {name: summary(values, hosts[name]) for name, values in samples.items()}


def seconds(call: Call, device: str, *, cold: Tensor | None = None, lead: float = 0.0) -> float:
    """The time of one call. cold: memory to write over first; lead: seconds the GPU is kept busy before it."""
    call.prepare()
    if not device.startswith("cuda"):
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        start = clock()
        call.run()
        return clock() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    if cold is not None:
        cold.zero_()
    if lead > 0:
        torch.cuda._sleep(int(lead * CLOCK))
    begin.record()
    call.run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def host_seconds(call: Call, calls: int = HOST_CALLS) -> float:
    """The seconds until a call has returned, on an idle GPU: the median of a few."""
    measured: list[float] = []
    while len(measured) < calls and sum(measured) < HOST_ENOUGH:
        call.prepare()
        torch.cuda.synchronize()
        start = time.perf_counter()
        call.run()
        measured.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(measured)


def summary(values: list[float], host: float | None = None) -> Timing:
    quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return Timing(statistics.median(values), (quartiles[2] - quartiles[0]) / 2, min(values), host)


class Captured:
    """A call as one CUDA graph, captured when it is first made: its time without the host's part of it."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call
        self.graph: torch.cuda.CUDAGraph | None = None
        self.result: Any = None

    def __call__(self) -> Any:
        if self.graph is None:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # what is made on a first call must not be captured
                self.call()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.result = self.call()
            self.graph = graph
        self.graph.replay()
        return self.result
