"""What has been run, a line of JSON each, so that a comparison that was stopped goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from .. import files
from .training import Record

#: What must be alike for records of one file to be compared, besides the task.
SHARED = ("steps", "described")

#: Task, optimizer, learning rate, seed.
Key = tuple[str, str, float, int]


def read(path: Path) -> list[Record]:
    """The records of a file, without a last line that a stop has cut off; none if the file is not there. ValueError for
    a line that is no record.
    """
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
        files.replace(path, lambda beside: beside.write_text("".join(lines)))
    return [_record(path, number, line) for number, line in enumerate(lines, 1)]


def _record(path: Path, number: int, line: str) -> Record:
    try:
        record: object = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise ValueError(f"line {number} of {path} is no record of a run: take it out, or choose another --out")
    return record


def append(path: Path, record: Record) -> None:
    """Adds one record: what was measured survives a stop."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def key(record: Record) -> Key:
    """What one record is told from another by."""
    return record["task"], record["optimizer"], record["lr"], record["seed"]


def check_alike(path: Path, records: Sequence[Record], task: str, wanted: Record) -> None:
    """The check that a record of the task has the steps, model and data that are wanted now; else ValueError."""
    for record in records:
        if record["task"] == task:
            for key in SHARED:
                if record[key] != wanted[key]:
                    raise ValueError(
                        f"{path} holds runs on {task} with {key} {record[key]!r}, not {wanted[key]!r}: pass the same "
                        "options again, or another --out"
                    )
