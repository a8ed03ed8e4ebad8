"""A picture for each task: held-out loss against steps, against seconds, and at the end against the learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from steepest.diagnostics.pictures import canvas

from .report import Summary

COLOURS = 10  # of matplotlib's own cycle; then the next line style
IN_A_ROW = 7  # names of the legend
STYLES = ("-", "--", ":", "-.")


def draw(path: Path, summaries: Sequence[Summary]) -> None:
    """The picture of one task. ImportError without matplotlib."""
    figure, (steps, seconds, rates) = canvas(3, 4.0 + 0.25 * math.ceil(len(summaries) / IN_A_ROW))
    first = [each.best["first_loss"] for each in summaries if each.best is not None]
    for number, each in enumerate(summaries):
        best = each.best
        if best is None:
            continue
        look = {
            "color": f"C{number % COLOURS}",
            "linestyle": STYLES[number // COLOURS % len(STYLES)],
            "linewidth": 1.2,
            "label": each.optimizer,
        }
        points = [(step, at, loss) for step, at, _, loss in best["points"] if loss is not None]
        steps.plot([step for step, _, _ in points], [loss for _, _, loss in points], **look)
        seconds.plot([at for _, at, _ in points], [loss for _, _, loss in points], **look)
        tried = sorted((run["lr"], run["loss"]) for run in each.runs if run["status"] == "done")
        rates.plot(*zip(*tried, strict=True), marker="o", markersize=3, **look)
    steps.set(xlabel="step", ylabel="held-out loss", title="at the best learning rate")
    seconds.set(xlabel="seconds of training", title="at the best learning rate")
    rates.set(xlabel="learning rate", title="after the last step", xscale="log")
    if first:
        last = [each.best["loss"] for each in summaries if each.best is not None]
        for ax in (steps, seconds, rates):
            ax.set_ylim(*limits(first, last))
    handles, labels = steps.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=IN_A_ROW, frameon=False, fontsize="small")
    figure.suptitle(summaries[0].task if summaries else "")
    figure.savefig(path, dpi=110)


def limits(first: Sequence[float], last: Sequence[float]) -> tuple[float, float]:
    """Of the axis of losses: up to the start, or where no best run ends below it, to the highest of these."""
    low, high = min(*first, *last), max(first) if min(last) < max(first) else max(last)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.05
    return low - margin, high + margin
