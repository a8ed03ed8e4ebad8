"""A row for every task and method of the whole comparison, at the best rate of its grid.

    loss, lowest, highest   held-out loss after the last step, mean and ends over the seeds
    enclosed                whether a lower and a higher rate were tried, and were worse
    band                    ratio of the highest to the lowest of the good rates around the best one
    closed                  whether the grid has a rate beyond each end of the band, which may else be wider
    steps_to_reference      the first step where the mean over the seeds of the held-out loss is down to what
                            torch.AdamW's was in the end; empty where it never is
    step_ratio              median time of a step over that of torch.AdamW
    tried                   every rate of the grid and the loss there

The best rate is that of the first seed, which is one of those that are averaged.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import full
from .report import aligned, number
from .training import Record

Row = Mapping[str, str]

COLUMNS = (
    "task",
    "optimizer",
    "status",
    "learning_rate",
    "adamw_rate",
    "enclosed",
    "band",
    "lowest_good",
    "highest_good",
    "closed",
    "loss",
    "lowest",
    "highest",
    "seeds",
    "first_loss",
    "steps",
    "steps_to_reference",
    "step_ms",
    "step_ratio",
    "optimizer_ms",
    "state_bytes",
    "tried",
)
#: What is printed.
SHOWN = (
    "optimizer",
    "loss",
    "lowest",
    "highest",
    "learning_rate",
    "band",
    "steps_to_reference",
    "step_ratio",
    "state_bytes",
)


@dataclass(frozen=True)
class Evidence:
    """The runs of a method on a task; those of the smallest seed are its grid."""

    runs: Sequence[Record]

    @property
    def grid(self) -> list[Record]:
        """The runs from the smallest to the largest learning rate."""
        first = min(run["seed"] for run in self.runs)
        return sorted((run for run in self.runs if run["seed"] == first), key=lambda run: run["lr"])

    @property
    def best(self) -> Record | None:
        return full.best_of(self.grid)

    @property
    def seeds(self) -> list[Record]:
        """The runs at the best rate; none where no run was done."""
        return [run for run in self.runs if self.best is not None and run["lr"] == self.best["lr"]]

    @property
    def good(self) -> list[float]:
        """The rates around the best one, itself among them, that are good (see `full`)."""
        grid, best = self.grid, self.best
        if best is None:
            return []
        good = [full.is_good(full.fall(run), full.fall(best)) for run in grid]
        at = grid.index(best)
        low = next((i + 1 for i in range(at, -1, -1) if not good[i]), 0)
        high = next((i for i in range(at, len(grid)) if not good[i]), len(grid))
        return [run["lr"] for run in grid[low:high]]

    @property
    def loss(self) -> float:
        """Mean over the seeds; infinite where one was not done."""
        losses = [run["loss"] if run["status"] == "done" else math.inf for run in self.seeds]
        return statistics.mean(losses) if losses else math.inf

    def curve(self) -> dict[int, float]:
        """Mean held-out loss by step, over the seeds."""
        curves = [{step: loss for step, _, _, loss in run["points"] if loss is not None} for run in self.seeds]
        shared = set.intersection(*map(set, curves)) if curves else set()
        return {step: statistics.mean(curve[step] for curve in curves) for step in sorted(shared)}

    def _median(self, name: str) -> float:
        """The median over all runs that took a step, which have the same work at every rate and seed."""
        return statistics.median(run[name] for run in self.runs if run[name] is not None)

    def row(self, reference: Evidence) -> Row:
        """The cells, by COLUMNS; names, status and `tried` alone where no run was done."""
        first, best, grid = self.runs[0], self.best, self.grid
        tried = " ".join(f"{run['lr']:g}:{_tried(run)}" for run in grid)
        known = {"task": first["task"], "optimizer": first["optimizer"], "status": first["status"], "tried": tried}
        if best is None:
            return dict.fromkeys(COLUMNS, "") | known
        good, rates = self.good, [run["lr"] for run in grid]
        done = [run["loss"] for run in self.seeds if run["status"] == "done"]
        reached = next((step for step, loss in self.curve().items() if loss <= reference.loss), None)
        step_ms = self._median("step_ms")
        return known | {
            "status": "done" if len(done) == len(self.seeds) else "diverged",
            "learning_rate": f"{best['lr']:g}",
            "adamw_rate": f"{best['adamw_lr']:g}",
            "enclosed": _yes(best["lr"] not in (rates[0], rates[-1])),
            "band": f"{full.RATIO ** round(math.log(good[-1] / good[0], full.RATIO)):g}",
            "lowest_good": f"{good[0]:g}",
            "highest_good": f"{good[-1]:g}",
            "closed": _yes(good[0] != rates[0] and good[-1] != rates[-1]),
            "loss": number(statistics.mean(done)),
            "lowest": number(min(done)),
            "highest": number(max(done)),
            "seeds": f"{len(done)}/{len(self.seeds)}",
            "first_loss": number(best["first_loss"]),
            "steps": f"{best['steps']}",
            "steps_to_reference": "" if reached is None else f"{reached}",
            "step_ms": f"{step_ms:.2f}",
            "step_ratio": f"{step_ms / reference._median('step_ms'):.2f}",
            "optimizer_ms": f"{self._median('optimizer_ms'):.2f}",
            "state_bytes": f"{best['state_bytes']:.1f}",
        }


def rows(records: Iterable[Record]) -> list[Row]:
    """A row a method: by tasks as they come, in each the lowest loss first and what never finished last.

    A task without AdamW has none.
    """
    groups: dict[str, dict[str, list[Record]]] = {}
    for record in records:
        groups.setdefault(record["task"], {}).setdefault(record["optimizer"], []).append(record)
    summary: list[Row] = []
    for of_task in groups.values():
        if full.REFERENCE not in of_task:
            continue
        evidence = sorted((Evidence(runs) for runs in of_task.values()), key=lambda each: each.loss)
        reference = Evidence(of_task[full.REFERENCE])
        summary += [each.row(reference) for each in evidence]
    return summary


def of(summary: Sequence[Row], task: str) -> list[Row]:
    """The rows of one task."""
    return [row for row in summary if row["task"] == task]


def table(summary: Sequence[Row]) -> str:
    """The rows as a person reads them: a block a task."""
    blocks = []
    for task in dict.fromkeys(row["task"] for row in summary):
        blocks.append(f"{task}\n" + aligned([SHOWN, *(_shown(row) for row in of(summary, task))], names=1))
    return "\n\n".join([*blocks, "* not enclosed: a rate beyond the grid may be better; > the band may be wider"])


def write_csv(path: Path, summary: Sequence[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(summary)


def _shown(row: Row) -> list[str]:
    star, wider = ("" if row[key] != "no" else mark for key, mark in (("enclosed", "*"), ("closed", ">")))
    marked = {**row, "learning_rate": star + row["learning_rate"], "band": wider + row["band"]}
    marked["loss"] = row["loss"] or row["status"]
    return [marked[name] for name in SHOWN]


def _tried(run: Record) -> str:
    return str(run["status"]) if run["loss"] is None else number(run["loss"])


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"
