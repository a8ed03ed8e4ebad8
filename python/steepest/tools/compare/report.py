"""A row for every task and optimizer: how good it is at its best learning rate, and how much the rate matters.

sensitivity     mean over the grid of min(loss, loss before training), less that of the best rate. A run that diverged
                counts with the loss before training. Source: arXiv:2309.14322, section 2
spread          highest less lowest of those losses
good rates      how many learning rates of the grid reach 90 % of the fall that the best one reaches
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .training import Record

GOOD = 0.9  # of the best fall of the loss
PLAIN = (1e-3, 1e4)  # losses below and above are written with a power of ten

HEADER = (
    "task",
    "optimizer",
    "learning rate",
    "loss",
    "sensitivity",
    "spread",
    "good rates",
    "step ms",
    "optimizer ms",
)


@dataclass(frozen=True)
class Summary:
    """An optimizer's runs on a task. best: the record of the lowest loss, None where no run was done."""

    task: str
    optimizer: str
    runs: Sequence[Record]

    @property
    def best(self) -> Record | None:
        finished = [run for run in self.runs if run["status"] == "done"]
        return min(finished, key=lambda run: run["loss"], default=None)

    @property
    def at_the_edge(self) -> bool:
        """Whether a rate beyond the grid may be better still."""
        rates = sorted(run["lr"] for run in self.runs)
        return self.best is not None and self.trained and len(rates) > 1 and self.best["lr"] in (rates[0], rates[-1])

    @property
    def trained(self) -> bool:
        """Whether any run ended below where it began."""
        return self.best is not None and self.best["loss"] < self.best["first_loss"]

    @property
    def sensitivity(self) -> float | None:
        """The mean loss over the rates less the lowest; None where nothing was trained."""
        if self.best is None or not self.trained:
            return None
        return statistics.mean(self._loss(run) for run in self.runs) - self._loss(self.best)

    @property
    def spread(self) -> float | None:
        """The largest loss over the rates less the lowest; None where nothing was trained."""
        if self.best is None or not self.trained:
            return None
        return max(self._loss(run) for run in self.runs) - self._loss(self.best)

    @property
    def good_rates(self) -> int:
        if self.best is None or not self.trained:
            return 0
        enough = self.best["first_loss"] - GOOD * (self.best["first_loss"] - self.best["loss"])
        return sum(self._loss(run) <= enough for run in self.runs)

    def _loss(self, run: Record) -> float:
        assert self.best is not None
        first: float = self.best["first_loss"]
        return min(first, run["loss"]) if run["status"] == "done" else first

    def row(self) -> tuple[str, ...]:
        """The cells of the row, under HEADER."""
        best = self.best
        if best is None:
            return (self.task, self.optimizer, "", self.runs[0]["status"], "", "", f"0/{len(self.runs)}", "", "")
        return (
            self.task,
            self.optimizer,
            f"{best['lr']:g}{' *' if self.at_the_edge else ''}",
            number(best["loss"]),
            "" if self.sensitivity is None else number(self.sensitivity),
            "" if self.spread is None else number(self.spread),
            f"{self.good_rates}/{len(self.runs)}",
            f"{best['step_ms']:.2f}",
            f"{best['optimizer_ms']:.2f}",
        )


def summaries(records: Sequence[Record]) -> dict[str, list[Summary]]:
    """The summaries by task, the lowest loss first and what never finished last."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record["task"], record["optimizer"]), []).append(record)
    by_task: dict[str, list[Summary]] = {}
    for (task, optimizer), runs in groups.items():
        by_task.setdefault(task, []).append(Summary(task, optimizer, runs))
    for of_task in by_task.values():
        of_task.sort(key=lambda each: float("inf") if each.best is None else each.best["loss"])
    return by_task


def table(by_task: Mapping[str, Sequence[Summary]]) -> str:
    """The table for a person: one block a task, then the reasons of what failed."""
    blocks = []
    for of_task in by_task.values():
        blocks.append(aligned([HEADER, *(each.row() for each in of_task)]))
    if any(each.at_the_edge for of_task in by_task.values() for each in of_task):
        blocks.append("* at the edge of its grid: a rate beyond it may be better, see --rates")
    failures = {
        f"{run['optimizer']} on {run['task']}: {run['reason']}"
        for of_task in by_task.values()
        for each in of_task
        for run in each.runs
        if run["status"] == "failed"
    }
    return "\n\n".join([*blocks, *sorted(failures)])


def write_csv(path: Path, by_task: Mapping[str, Sequence[Summary]]) -> None:
    """The rows of the table, without its marks."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([name.replace(" ", "_") for name in HEADER])
        for of_task in by_task.values():
            writer.writerows([cell.removesuffix(" *") for cell in summary.row()] for summary in of_task)


def number(value: float) -> str:
    """A loss as it is printed."""
    return f"{value:.4f}" if PLAIN[0] <= value < PLAIN[1] or value == 0 else f"{value:.1e}"


def aligned(rows: Sequence[Sequence[str]], names: int = 2) -> str:
    """The rows under the first of them, in columns; those of `names` are flush left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if column < names else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
