"""A picture for each task: held-out loss against steps, against seconds, and at the end against the learning rate.

Of the whole comparison: the loss of every method, its good learning rates and the time of its step.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from steepest.diagnostics.pictures import canvas

from .evidence import Row
from .full import REFERENCE
from .report import Summary

COLOURS = 10  # of matplotlib's own cycle; then the next line style
IN_A_ROW = 7  # names of the legend
STYLES = ("-", "--", ":", "-.")
BAND = ("lowest_good", "highest_good")


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


def draw_evidence(path: Path, rows: Sequence[Row]) -> None:
    """The picture of one task of the whole comparison, the best method above. ImportError without matplotlib."""
    rows = [row for row in reversed(rows) if row["loss"]]
    figure, (losses, bands, times) = canvas(3, 1.2 + 0.19 * len(rows))
    places = range(len(rows))
    colours = ["C1" if row["optimizer"] == REFERENCE else "C0" for row in rows]
    lowest, mean, highest = ([float(row[key]) for row in rows] for key in ("lowest", "loss", "highest"))
    losses.hlines(places, lowest, highest, colors=colours, linewidth=3, alpha=0.4)
    limit = _lowest_first(mean)
    shown = [min(loss, limit[1]) for loss in mean]
    losses.scatter(shown, places, c=colours, s=14, zorder=2, clip_on=False)
    low, high = ([float(row[key]) / float(row["learning_rate"]) for row in rows] for key in BAND)
    bands.hlines(places, low, high, colors=colours, linewidth=3)
    bands.scatter([1.0] * len(rows), places, c=colours, s=14)
    times.barh(places, [float(row["step_ratio"]) for row in rows], color=colours, height=0.6)
    losses.set(title="held-out loss: mean and ends over seeds", yticks=places, xlim=limit)
    losses.set_yticklabels([row["optimizer"] for row in rows], fontsize="small")
    bands.set(title="good learning rates over the best one", xscale="log", yticks=places, yticklabels=[])
    times.set(title=f"time of a step over {REFERENCE}'s", yticks=places, yticklabels=[])
    for ax in (losses, bands, times):
        ax.set_ylim(-1, len(rows))
    figure.suptitle(rows[0]["task"] if rows else "")
    figure.savefig(path, dpi=90)


def _lowest_first(mean: Sequence[float]) -> tuple[float, float]:
    """Limits of the axis of losses: the lowest to the upper quartile, and as much again; worse ones are at the edge."""
    low, middle = min(mean), statistics.quantiles(mean, n=4)[2] if len(mean) > 1 else max(mean)
    margin = 0.1 * (middle - low) or 0.1
    return low - margin, min(max(mean), 2 * middle - low) + margin


def limits(first: Sequence[float], last: Sequence[float]) -> tuple[float, float]:
    """Limits of the axis of losses: up to the start, or where no best run ends below it, to the highest of these."""
    low, high = min(*first, *last), max(first) if min(last) < max(first) else max(last)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.05
    return low - margin, high + margin
