"""The provenance of runs: a file beside them with the tasks, the machines, versions and commits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import files
from ..machine import machine
from .tasks import Task


def write(path: Path, tasks: Sequence[tuple[Task, int]]) -> None:
    """Adds these tasks, with their steps, and this machine to what the file has."""
    known = json.loads(path.read_text()) if path.exists() else {"tasks": {}, "machines": []}
    known["tasks"] |= {task.name: {"steps": steps, "described": task.described} for task, steps in tasks}
    here: dict[str, Any] = dict(machine())
    if here not in known["machines"]:
        known["machines"].append(here)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.replace(path, lambda beside: beside.write_text(json.dumps(known, indent=1) + "\n"))
