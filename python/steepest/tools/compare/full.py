"""The whole comparison: every method at the best rate of a grid that encloses it, and there again with more seeds.

A grid begins at the middle of `methods` and grows by a factor of RATIO on a side where it is still good, until the best
rate is inside and both ends are bad, or MOST rates have been tried. Good is a fall of the loss that is GOOD times the
best one's or more. What matrix methods leave to AdamW trains at the rate that was best for AdamW on the same task.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

from .jobs import Job
from .methods import ADAMW_RATE, Method
from .tasks import Task
from .training import Record

RATIO = 2.0
MOST = 10
GOOD = 0.98
SEEDS = 3
REFERENCE = "torch.AdamW"


def compare(
    task: Task, method: Method, steps: int, seed: int, adamw_lr: float, run: Callable[[Job], Record]
) -> list[Record]:
    """The runs of one method on one task: its grid with the first seed, and the best rate of it with the others."""
    grid: dict[int, Record] = {}
    while (place := next_place({place: fall(record) for place, record in grid.items()})) is not None:
        lr = method.rate(task.name, place, RATIO)
        grid[place] = run(Job(task, method, lr, steps, seed, adamw_lr))
    best = best_of(grid.values())
    if best is None:
        return list(grid.values())
    again = [run(Job(task, method, best["lr"], steps, seed + more, adamw_lr)) for more in range(1, SEEDS)]
    return [*grid.values(), *again]


def next_place(falls: Mapping[int, float]) -> int | None:
    """The place of the next rate in a grid whose rates lowered the loss by `falls`; None where it is enough.

    The best rate is enclosed first; then the grid grows at the good end that is nearest to it. Of equal rates the lower
    counts as the better one.
    """
    if not falls:
        return 0
    if len(falls) == MOST:
        return None
    low, high, best = min(falls), max(falls), max(sorted(falls), key=falls.__getitem__)
    if best in (low, high):
        return low - 1 if best == low else high + 1
    good = [end for end in (low, high) if is_good(falls[end], falls[best])]
    nearest = min(good, key=lambda end: (abs(end - best), -falls[end]), default=None)
    return None if nearest is None else nearest - 1 if nearest == low else nearest + 1


def is_good(some: float, best: float) -> bool:
    """Whether a fall of the loss is as good as the best one, but for 1 - GOOD of it."""
    return some >= best - (1 - GOOD) * abs(best)


def fall(record: Record) -> float:
    """The fall of the held-out loss, negative where it rose; minus infinity of a run that was not done."""
    return record["first_loss"] - record["loss"] if record["status"] == "done" else -math.inf


def best_of(records: Iterable[Record]) -> Record | None:
    """The record of the lowest loss; None where no run was done."""
    return min((each for each in records if each["status"] == "done"), key=lambda each: each["loss"], default=None)


def rate_of(records: Iterable[Record]) -> float:
    """The best learning rate, of AdamW, or ADAMW_RATE where none was done."""
    best = best_of(records)
    return ADAMW_RATE if best is None else best["lr"]
