"""Pictures of a run (`pip install 'steepest[plot]'`): time by shape, roofline, error against time, and training.

SUITE.png              what was measured, by case, a mark for each variant with its spread
SUITE-roofline.png     FLOP a second against FLOP a byte, under the ceilings of the same run
SUITE-error.png        error against time, a panel for each case
train.png              held-out loss against steps and seconds, time of a step, and polar slack
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steepest.diagnostics.pictures import canvas

from .case import OK, Row
from .records import Record

MARKERS = "osD^v<>pPX*h"
ERRORS = ("relative_error", "whitening", "residual", "off_the_parts")
#: What a suite is about where that is not the time of a call: the numbers and their names.
SUBJECTS: Mapping[str, Sequence[tuple[str, str]]] = {
    "memory": (("state_mib", "state, MiB"), ("extra_mib", "beyond it in a step, MiB")),
    "launch": (("host_us", "host, us"), ("launches", "launches"), ("operators", "operators")),
}
MOST_PANELS = 4
WIDTH = 20  # letters of a case's name


def draw(folder: Path, record: Record) -> list[Path]:
    """Writes what there is to see of every suite; the files written. ImportError without matplotlib."""
    files: list[Path] = []
    for suite in dict.fromkeys(row["suite"] for row in record.rows):
        rows = [row for row in record.rows if row["suite"] == suite and row["status"] == OK]
        if suite == "train":
            files += _saved(folder / "train.png", training(rows))
            continue
        files += _saved(folder / f"{suite}.png", by_case(rows, SUBJECTS.get(suite, (("ms", "ms"),))))
        files += _saved(folder / f"{suite}-roofline.png", roofline(rows, record))
        files += _saved(folder / f"{suite}-error.png", error_against_time(rows))
    return files


def by_case(rows: Sequence[Row], subjects: Sequence[tuple[str, str]]) -> Any | None:
    """A panel for each subject and dtype."""
    panels = [
        (key, label, dtype, of_panel)
        for key, label in subjects
        for dtype in dict.fromkeys(row.get("dtype", "") for row in rows)
        if (of_panel := [row for row in rows if row.get(key) and row.get("dtype", "") == dtype])
    ][:MOST_PANELS]
    if not panels:
        return None
    looks = _looks(rows)
    figure, axes = canvas(len(panels), _height(looks))
    for ax, (key, label, dtype, of_panel) in zip(axes, panels):
        cases = list(dict.fromkeys(row["case"] for row in of_panel))
        for variant, look in looks.items():
            points = [(cases.index(row["case"]), row) for row in of_panel if row["variant"] == variant]
            if points:
                ax.errorbar(
                    [place for place, _ in points],
                    [row[key] for _, row in points],
                    yerr=[_spread(row, key) for _, row in points],
                    linewidth=0.8,
                    markersize=4,
                    **look,
                )
        ax.set_xticks(range(len(cases)), [case[:WIDTH] for case in cases], rotation=30, ha="right", fontsize="x-small")
        ax.set(yscale="log", ylabel=label, title=dtype)
    return _with_legend(figure, axes)


def roofline(rows: Sequence[Row], record: Record) -> Any | None:
    known = [row for row in rows if row.get("gflop") and row.get("mbyte") and row.get("ms")]
    ceilings = record.ceilings
    if not known or not ceilings.copy or not ceilings.products:
        return None
    looks = _looks(known)
    figure, axes = canvas(1, _height(looks))
    (ax,) = axes
    intensities = [1e3 * row["gflop"] / row["mbyte"] for row in known]
    ridge = min(ceilings.products.values()) / ceilings.copy
    xs = _logspace(min(*intensities, ridge) / 4, 4 * max(*intensities, ridge))
    for name, rate in ceilings.products.items():
        ax.plot(xs, [min(rate, x * ceilings.copy) / 1e12 for x in xs], color="0.6", linewidth=0.8)
        ax.annotate(name, (xs[-1], rate / 1e12), fontsize="xx-small", color="0.4", ha="right", va="bottom")
    for variant, look in looks.items():
        points = [(x, row) for x, row in zip(intensities, known) if row["variant"] == variant]
        ax.plot([x for x, _ in points], [row["tflop_per_s"] for _, row in points], linestyle="", markersize=4, **look)
    ax.set(xscale="log", yscale="log", xlabel="FLOP / byte", ylabel="TFLOP/s", title="roofline")
    return _with_legend(figure, axes)


def error_against_time(rows: Sequence[Row]) -> Any | None:
    """A panel for each of the slowest cases that have errors."""
    known = [(row, key) for row in rows for key in ERRORS if row.get(key) and row.get("ms")]
    cases: dict[tuple[str, str, str], list[Row]] = {}
    for row, key in known:
        cases.setdefault((row["case"], row.get("dtype", ""), key), []).append(row)
    slowest = sorted(cases, key=lambda case: -max(row["ms"] for row in cases[case]))[:MOST_PANELS]
    if not slowest:
        return None
    looks = _looks([row for row, _ in known])
    figure, axes = canvas(len(slowest), _height(looks))
    for ax, (case, dtype, key) in zip(axes, slowest):
        for row in cases[case, dtype, key]:
            look = looks[row["variant"]]
            ax.errorbar(row["ms"], row[key], xerr=_spread(row, "ms"), markersize=5, linestyle="", **look)
        ax.set(xscale="log", yscale="log", xlabel="ms", ylabel=key.replace("_", " "), title=f"{case[:WIDTH]} {dtype}")
    return _with_legend(figure, axes)


def training(rows: Sequence[Row]) -> Any | None:
    known = [row for row in rows if row.get("points")]
    if not known:
        return None
    figure, axes = canvas(4)
    steps, seconds, shares, slack = axes
    for number, row in enumerate(known):
        look = {"color": f"C{number}", "linewidth": 1.2, "label": row["variant"]}
        steps.plot([p[0] for p in row["points"]], [p[2] for p in row["points"]], **look)
        seconds.plot([p[1] for p in row["points"]], [p[2] for p in row["points"]], **look)
        rest = row["ms"] - row["optimizer_ms"]
        shares.barh(number, rest, color="0.8")
        shares.barh(number, row["optimizer_ms"], left=rest, color=f"C{number}")
        if row.get("slack"):
            last = sorted(values[-1] for values in row["slack"].values())
            slack.plot(range(1, len(last) + 1), last, marker=".", **look)
    shares.set_yticks(range(len(known)), [row["variant"] for row in known], fontsize="x-small")
    shares.set(xlabel="ms a step, coloured: the optimizer", title="time of a step")
    steps.set(xlabel="step", ylabel="held-out loss, nats a byte", title="by steps")
    seconds.set(xlabel="seconds of training", title="by time")
    slack.set(xlabel="matrix, sorted", ylabel="polar slack", title="at the end")
    return _with_legend(figure, axes)


def _looks(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """A colour and a mark for each variant; ours filled, the others hollow."""
    variants = dict.fromkeys((row["variant"], bool(row.get("ours"))) for row in rows)
    return {
        variant: {
            "color": f"C{number % 10}",
            "marker": MARKERS[number % len(MARKERS)],
            "markerfacecolor": f"C{number % 10}" if ours else "none",
            "label": variant,
        }
        for number, (variant, ours) in enumerate(variants)
    }


def _spread(row: Row, key: str) -> float:
    spread = row.get({"ms": "spread_ms", "host_us": "spread_us"}.get(key, ""), 0.0)
    return float(min(spread, 0.9 * row[key]))  # the axis is logarithmic


def _logspace(low: float, high: float, count: int = 100) -> list[float]:
    step = (math.log(high) - math.log(low)) / (count - 1)
    return [low * math.exp(step * i) for i in range(count)]


def _height(looks: Mapping[str, object]) -> float:
    return 4.0 + 0.22 * math.ceil(len(looks) / 3)


def _with_legend(figure: Any, axes: Sequence[Any]) -> Any:
    handles = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels())}
    if handles:
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, frameon=False, fontsize="x-small")
    return figure


def _saved(path: Path, figure: Any | None) -> list[Path]:
    if figure is None:
        return []
    figure.savefig(path, dpi=110)
    return [path]
