"""What a training run leaves behind: a table on the terminal, the curves as CSV, and a picture of them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes

from demo.training import Point, Run

HEADER = ("step", "optimizer", "train_loss", "validation_loss", "seconds")
SMOOTHING = 0.9  # of the old value, in the moving average of the training loss


def table(runs: Sequence[Run]) -> str:
    """One line for each method, the lowest validation loss first."""
    head = ("optimizer", "learning rate", "validation loss", "step ms", "optimizer ms", "total s")
    rows = [head, *(_row(run) for run in sorted(runs, key=lambda run: run.validation_loss))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def catch_up(runs: Sequence[Run], reference: str = "adamw") -> list[str]:
    """For each other method, the step at which it had reached the reference's last validation loss, as a sentence."""
    target = next((run.validation_loss for run in runs if run.method.name == reference), None)
    if target is None:
        return []
    return [_sentence(run, target, reference) for run in runs if run.method.name != reference]


def write_csv(path: Path, runs: Sequence[Run]) -> None:
    """Every point of every run in order of steps; an empty cell where a loss was not measured."""
    points = sorted((point for run in runs for point in run.points), key=lambda point: point.step)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(HEADER)
        writer.writerows(_cells(point) for point in points)


def write_picture(path: Path, runs: Sequence[Run], title: str) -> None:
    """Validation loss and, faint, smoothed training loss: against steps on the left, against seconds on the right."""
    figure, axes = pyplot.subplots(1, 2, figsize=(9.6, 3.8), sharey=True, layout="constrained")
    for run in runs:
        seconds = {point.step: point.seconds for point in run.points}
        _curves(axes[0], run, {step: float(step) for step in seconds})
        _curves(axes[1], run, seconds)
    axes[0].set(xlabel="step", ylabel="loss (nats per byte)", ylim=_limits(runs))
    axes[1].set(xlabel="seconds of training")
    axes[0].legend(frameon=False)
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _row(run: Run) -> tuple[str, ...]:
    return (
        run.method.label,
        f"{run.lr:g}",
        f"{run.validation_loss:.4f}",
        f"{run.step_ms:.1f}",
        f"{run.optimizer_ms:.1f}",
        f"{run.points[-1].seconds:.1f}",
    )


def _sentence(run: Run, target: float, reference: str) -> str:
    last = run.points[-1].step
    reached = next((p.step for p in run.points if p.validation_loss is not None and p.validation_loss <= target), None)
    if reached is None:
        return f"{run.method.name} does not reach {reference}'s last validation loss ({target:.4f}) in {last} steps"
    return f"{run.method.name} reaches {reference}'s last validation loss ({target:.4f}) by step {reached} of {last}"


def _cells(point: Point) -> tuple[object, ...]:
    losses = ("" if loss is None else f"{loss:.6f}" for loss in (point.train_loss, point.validation_loss))
    return (point.step, point.method, *losses, f"{point.seconds:.3f}")


def _curves(ax: Axes, run: Run, position: dict[int, float]) -> None:
    validated = [(position[p.step], p.validation_loss) for p in run.points if p.validation_loss is not None]
    (line,) = ax.plot(*zip(*validated, strict=True), marker="o", markersize=2.5, label=run.method.label)
    ax.plot(*zip(*_smoothed(run, position), strict=True), color=line.get_color(), alpha=0.35, linewidth=1)


def _smoothed(run: Run, position: dict[int, float]) -> list[tuple[float, float]]:
    """Moving average of the training loss, divided by the weight it has gathered so far."""
    average = weight = 0.0
    curve = []
    for point in run.points:
        if point.train_loss is not None:
            average = SMOOTHING * average + (1 - SMOOTHING) * point.train_loss
            weight = SMOOTHING * weight + (1 - SMOOTHING)
            curve.append((position[point.step], average / weight))
    return curve


def _limits(runs: Sequence[Run]) -> tuple[float, float] | None:
    """The fall of the first steps would flatten the rest: the axis starts at the second validation."""
    losses = [[p.validation_loss for p in run.points if p.validation_loss is not None] for run in runs]
    lowest, highest = min(loss[-1] for loss in losses), max(loss[1] for loss in losses)
    margin = 0.08 * (highest - lowest)
    return (lowest - margin, highest + margin) if margin > 0 else None
