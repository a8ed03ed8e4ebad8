"""The learning rates the demo uses: for each method the best one of the sweep in results/sweep.csv.

`examples/sweep.py` writes that file; nobody edits it by hand.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"
SWEEP = RESULTS / "sweep.csv"

Row = Mapping[str, str]


def read(path: Path = SWEEP) -> list[dict[str, str]]:
    """The rows of a CSV of results, or none if the file is not there."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, row: Row) -> None:
    """Add one row at the end of a CSV, under a header if it is the first: what was measured survives a stop."""
    path.parent.mkdir(parents=True, exist_ok=True)
    first = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if first:
            writer.writeheader()
        writer.writerow(row)


def missing(path: Path, grids: Mapping[str, Sequence[float]], described: Row, what: str) -> Iterator[tuple[str, float]]:
    """(method, learning rate) of the rows `path` lacks; ValueError if what it holds was described otherwise."""
    rows = read(path)
    for row in rows:
        if other := [f"{key} {row[key]}" for key, value in described.items() if row[key] != value]:
            raise ValueError(f"{path} holds {what} with {', '.join(other)}; delete it or pass another --out")
    done = {(row["optimizer"], float(row["lr"])) for row in rows}
    return ((method, lr) for method, grid in grids.items() for lr in grid if (method, lr) not in done)


def best(rows: Sequence[Row], method: str) -> float:
    """The learning rate with the lowest validation loss; ValueError if the sweep has no finite one for `method`."""
    losses = {float(row["lr"]): float(row["validation_loss"]) for row in rows if row["optimizer"] == method}
    finite = {lr: loss for lr, loss in losses.items() if math.isfinite(loss)}
    if not finite:
        raise ValueError(
            f"the sweep has no learning rate for {method}; run examples/sweep.py or pass --lr {method}=VALUE"
        )
    return min(finite, key=finite.__getitem__)


def enclosed(rows: Sequence[Row], method: str) -> bool:
    """Whether smaller and larger learning rates than the best one were tried, and were worse."""
    tried = sorted(float(row["lr"]) for row in rows if row["optimizer"] == method)
    return best(rows, method) in tried[1:-1]
