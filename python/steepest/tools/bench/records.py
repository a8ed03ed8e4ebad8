"""A run of suites as one JSON file, and its rows as CSV with the machine, the versions and the commit in every line.

{"format": 1, "machine": {...}, "ceilings": {...}, "peers": {...}, "settings": {...}, "rows": [...]}
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .case import Row
from .ceilings import Ceilings

FORMAT = 1
FIRST = ("suite", "case", "dtype", "variant", "ours", "version", "status")  # columns


@dataclass
class Record:
    """What was measured, and on what; peers: by name and role, "found" or why not."""

    machine: Mapping[str, str]
    ceilings: Ceilings = field(default_factory=Ceilings)
    peers: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def json(self) -> dict[str, Any]:
        facts = {"format": FORMAT, "machine": dict(self.machine), "ceilings": self.ceilings.json()}
        return {**facts, "peers": dict(self.peers), "settings": dict(self.settings), "rows": self.rows}

    def write(self, path: Path) -> None:
        """``path`` as JSON, and the rows beside it as .csv; lists and dicts in a row are in the JSON alone."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.json(), indent=1) + "\n")
        write_csv(path.with_suffix(".csv"), self.rows, self.machine)


def write_csv(path: Path, rows: Sequence[Row], machine: Mapping[str, str]) -> None:
    flat = [{key: value for key, value in row.items() if not isinstance(value, (list, dict))} for row in rows]
    columns = dict.fromkeys([*machine, *FIRST, *(key for row in flat for key in row)])
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(columns), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({**machine, **row} for row in flat)


def read(path: Path) -> list[Record]:
    """The records of a file, or of every JSON file in a folder; ValueError for what is none."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} holds no JSON file of steepest bench")
    return [_read(file) for file in files]


def _read(path: Path) -> Record:
    try:
        data = json.loads(path.read_text())
        if data["format"] != FORMAT:
            raise ValueError(f"{path} has format {data['format']}, and this version of steepest reads {FORMAT}")
        return Record(data["machine"], Ceilings(**data["ceilings"]), data["peers"], data["settings"], data["rows"])
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; pass a file that steepest bench wrote") from None
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a file of steepest bench ({type(error).__name__}: {error})") from None
