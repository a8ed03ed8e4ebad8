"""Interleaved timing of named callables, so that a slow minute of the machine is everybody's.

Each round calls every function once, in an order that rotates; the figure is the median over rounds and the spread is
half the distance between the quartiles.  On a GPU the clock is a pair of events around the call.
"""

from __future__ import annotations

import csv
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Timing:
    median: float  # seconds
    spread: float  # seconds, half the interquartile range
    fastest: float  # seconds


def interleaved(
    functions: Mapping[str, Callable[[], object]], *, rounds: int = 9, warmup: int = 2, device: str = "cpu"
) -> dict[str, Timing]:
    """Time every function ``rounds`` times in turn, after ``warmup`` calls of each."""
    for function in functions.values():
        for _ in range(warmup):
            function()
    names = list(functions)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            samples[name].append(_seconds(functions[name], device))
    return {name: _summary(values) for name, values in samples.items()}


def _seconds(function: Callable[[], object], device: str) -> float:
    if not device.startswith("cuda"):
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _summary(values: list[float]) -> Timing:
    quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return Timing(statistics.median(values), (quartiles[2] - quartiles[0]) / 2, min(values))


def machine(device: str = "cpu") -> dict[str, str]:
    """What a figure must name: the hardware, the versions, the commit."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else f"{_cpu()}, {torch.get_num_threads()} threads"
    return {"machine": name, "torch": torch.__version__, "python": platform.python_version(), "commit": _commit()}


def header(device: str = "cpu") -> str:
    return "  ".join(f"{key}: {value}" for key, value in machine(device).items())


def write_csv(path: str | Path, rows: Iterable[Mapping[str, object]], device: str = "cpu") -> None:
    """One line a row, with the machine, the versions and the commit in every line."""
    lines = [{**machine(device), **row} for row in rows]
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


def _commit() -> str:
    here = Path(__file__).parent
    git = ["git", "-C", str(here)]
    try:
        commit = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True)
        changed = subprocess.check_output([*git, "status", "--porcelain"], text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.strip() + ("+changes" if changed.strip() else "")
