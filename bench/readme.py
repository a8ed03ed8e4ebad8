"""Fills the README's tables from the result files they stand for.

python bench/readme.py            writes README.md
python bench/readme.py --check    exit status 1 if it would change

A table is found by its heading; the rows under it are those of the file. Sentences with figures are written by hand and
held against their files by tests/tools/test_docs.py.
"""

from __future__ import annotations

import csv
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
LABELS = {"muadam": "MuAdam", "muon": "Muon", "adamw": "AdamW"}

Rows = Sequence[Mapping[str, str]]


def read(path: Path) -> Rows:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def step(rows: Rows, case: str) -> list[str]:
    """A variant each that was timed: name, median and spread, times torch's speed, error."""
    return [_step(row) for row in rows if row["case"] == case and row["ms"]]


def _step(row: Mapping[str, str]) -> str:
    ms, spread, ratio, error = (float(row[key]) for key in ("ms", "spread_ms", "ratio", "relative_error"))
    digits = 0 if ms >= 100 else 2
    return f"| {row['variant']} | {ms:.{digits}f} ± {spread:.{digits}f} | {ratio:.2f} | {error:.2f} |"


def losses(rows: Rows) -> list[str]:
    """An optimizer each: means over seeds of the loss and of the two times."""
    found = []
    for name in dict.fromkeys(row["optimizer"] for row in rows):
        own = [row for row in rows if row["optimizer"] == name]
        loss, whole, part = (
            statistics.mean(float(row[key]) for row in own) for key in ("validation_loss", "step_ms", "optimizer_ms")
        )
        found.append(f"| {LABELS[name]} | {loss:.3f} | {whole:.0f} ms | {part:.0f} ms |")
    return found


#: The heading of a table in the README, the file of its rows, and how they are made.
TABLES: Mapping[str, tuple[str, Callable[[Rows], list[str]]]] = {
    "| | validation loss (nats per byte) | step | of it the optimizer |": ("examples/results/seeds.csv", losses),
    "| | ms | times torch | error |": ("bench/results/step-cpu.csv", partial(step, case="gpt2-124m")),
}


def filled(text: str, root: Path = ROOT) -> str:
    """The README with the rows of every table; ValueError where a heading is not there."""
    for heading, (file, rows) in TABLES.items():
        before, found, after = text.partition(heading + "\n")
        if not found:
            raise ValueError(f"README.md has no table {heading!r}: change TABLES in bench/readme.py with it")
        rule, *rest = after.splitlines(keepends=True)
        end = next((i for i, line in enumerate(rest) if not line.startswith("|")), len(rest))
        text = before + found + rule + "".join(f"{row}\n" for row in rows(read(root / file))) + "".join(rest[end:])
    return text


def main(arguments: Sequence[str]) -> int:
    path = ROOT / "README.md"
    old = path.read_text(encoding="utf-8")
    new = filled(old)
    if "--check" not in arguments:
        path.write_text(new, encoding="utf-8")
    return int("--check" in arguments and new != old)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
