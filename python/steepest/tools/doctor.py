"""`steepest doctor`: the facts of this machine, and every self-check of it (`steepest.ops.selfcheck`).

Each check runs in a process of its own. A kernel that crashes or hangs takes its process along and is a line of the
table; the next one starts afresh.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from steepest.ops import selfcheck

from . import facts

TIMEOUT = 180  # seconds of a process: Triton compiles a dozen kernels for a check
TIMES = 3  # that a check is run again, of which the fastest counts


def add_options(p: argparse.ArgumentParser) -> None:
    """The options of the command."""
    p.add_argument("--json", action="store_true", help="the same as JSON")


def run(options: argparse.Namespace) -> int:
    """Prints the facts and the outcomes; -> exit status, 1 where a check is wrong."""
    machine, outcomes = facts.diagnose(), check_all()
    if options.json:
        print(json.dumps({**machine, "checks": [outcome.json() for outcome in outcomes]}, indent=2))
    else:
        print("\n".join([facts.describe(machine), *describe(outcomes)]))
    return int(any(outcome.state == "wrong" for outcome in outcomes))


@dataclass(frozen=True)
class Outcome:
    """What became of a check. state: "not run" where something stands in the way; then text says what.

    first_ms: with what is compiled and loaded the first time; again_ms: what remains. None where it was not run.
    """

    family: str
    backend: str
    device: str
    state: Literal["right", "wrong", "not run"]
    text: str = ""
    first_ms: float | None = None
    again_ms: float | None = None

    def json(self) -> dict[str, Any]:
        return asdict(self)


def check_all() -> list[Outcome]:
    """The outcome of every family, backend and device."""
    every = list(_every())
    with ThreadPoolExecutor(max(1, min(4, (os.cpu_count() or 1) // 2))) as pool:
        return list(pool.map(_check, *zip(*every)))


def describe(outcomes: Sequence[Outcome]) -> list[str]:
    """Lines of a table for a person."""
    lines = ["checks    (each in a process of its own; the time of the first and of a later one)"]
    said: dict[str, str] = {}  # a reason, and who gave it first
    for each in outcomes:
        label = f"{each.family}, {each.backend}"
        first = said.setdefault(each.text, label) if each.state == "not run" else label
        text = each.text if first == label else f"as {first}"
        times = "" if each.first_ms is None else f"{each.first_ms:8.0f} ms {each.again_ms:6.1f} ms"
        line = f"  {each.family:<14} {each.backend:<7} {each.device:<7} {each.state:<8}{times}  {text}"
        lines.append(line.rstrip())
    return lines


def _every() -> Iterator[tuple[str, str, torch.device]]:
    devices = [torch.device("cuda", index) for index in range(max(1, torch.cuda.device_count()))]
    for family, backends in selfcheck.FAMILIES.items():
        for backend in backends:
            for device in [torch.device("cpu")] if backend == "cpu" else devices:
                yield family, backend, device


def _check(family: str, backend: str, device: torch.device) -> Outcome:
    if not selfcheck.enabled:
        return Outcome(family, backend, str(device), "not run", "STEEPEST_SELFCHECK=0 turns the checks off")
    reason = selfcheck.check_of(family).static(backend, device)
    if reason is not None:
        return Outcome(family, backend, str(device), "not run", reason)
    command = [sys.executable, "-m", __name__, family, backend, str(device)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return Outcome(family, backend, str(device), "wrong", f"no answer within {TIMEOUT} s")
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines:
        said = done.stderr.strip().rpartition("\n")[2]
        return Outcome(family, backend, str(device), "wrong", f"{_end(done.returncode)}: {said}")
    answer = json.loads(lines[-1])
    state: Literal["right", "wrong"] = "right" if answer["text"] == "" else "wrong"
    return Outcome(family, backend, str(device), state, **answer)


def _end(status: int) -> str:
    if status < 0:
        names = {each.value: each.name for each in signal.Signals}  # real-time signals have none
        return f"killed by {names.get(-status, f'signal {-status}')}"
    return f"exit status {status}"


def _run(family: str, backend: str, device: torch.device) -> dict[str, Any]:
    """One check in this process, again and again: what the first time said that was not good, and the times."""
    verdicts, times = [], []
    for _ in range(1 + TIMES):
        begun = time.perf_counter()
        verdicts.append(selfcheck.run(family, backend, device))
        times.append(1e3 * (time.perf_counter() - begun))
    text = next((verdict for verdict in verdicts if verdict is not None), "")
    return {"text": text, "first_ms": times[0], "again_ms": min(times[1:])}


if __name__ == "__main__":
    print(json.dumps(_run(sys.argv[1], sys.argv[2], torch.device(sys.argv[3]))))
