"""Interleaved timing of named callables, so that a slow minute of the machine is everybody's.

Each round calls every function once, in an order that rotates; the figure is the median over rounds and the spread is
half the distance between the quartiles.  On a GPU the clock is a pair of events around the call, and on request what
the L2 cache holds is written over before each.
"""

from __future__ import annotations

import csv
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

FLUSH_BYTES = 1 << 28  # several times the L2 cache of any GPU


@dataclass(frozen=True)
class Timing:
    median: float  # seconds
    spread: float  # seconds, half the interquartile range
    fastest: float  # seconds


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 9,
    warmup: int = 2,
    device: str = "cpu",
    flush: bool = False,
) -> dict[str, Timing]:
    """Time every function ``rounds`` times in turn, after ``warmup`` calls of each.

    flush: on a GPU, each call finds nothing of its tensors in the L2 cache.
    """
    cold = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if flush and device.startswith("cuda") else None
    for function in functions.values():
        for _ in range(warmup):
            function()
    names = list(functions)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            samples[name].append(seconds(functions[name], device, cold))
    return {name: _summary(values) for name, values in samples.items()}


def seconds(function: Callable[[], object], device: str, cold: Tensor | None = None) -> float:
    """One call; ``cold`` is memory to write over first."""
    if not device.startswith("cuda"):
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    if cold is not None:
        cold.zero_()
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _summary(values: list[float]) -> Timing:
    quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return Timing(statistics.median(values), (quartiles[2] - quartiles[0]) / 2, min(values))


def machine(device: str = "cpu") -> dict[str, str]:
    """What a figure must name: the hardware, the versions, the commit (STEEPEST_COMMIT where there is no git)."""
    cuda = device.startswith("cuda")
    name = torch.cuda.get_device_name() if cuda else f"{_cpu()}, {torch.get_num_threads()} threads"
    driver = {"driver": _driver()} if cuda else {}
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    return {"machine": name, **driver, **versions, "commit": os.environ.get("STEEPEST_COMMIT") or _commit()}


def header(device: str = "cpu") -> str:
    return "  ".join(f"{key}: {value}" for key, value in machine(device).items())


def write_csv(path: str | Path, rows: Iterable[Mapping[str, object]], device: str = "cpu") -> None:
    """One line a row, with the machine, the versions and the commit in every line."""
    facts = machine(device)
    lines = [{**facts, **row} for row in rows]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.check_output(query, text=True).split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def _commit() -> str:
    here = Path(__file__).parent
    git = ["git", "-C", str(here)]
    try:
        commit = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True, stderr=subprocess.DEVNULL)
        changed = subprocess.check_output([*git, "status", "--porcelain"], text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.strip() + ("+changes" if changed.strip() else "")
