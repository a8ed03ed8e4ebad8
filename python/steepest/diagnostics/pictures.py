"""Curves of what `watch` logged, drawn with matplotlib (`pip install 'steepest[plot]'`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

#: Panels of a picture unless told otherwise, as far as they were logged.
QUANTITIES = ("cosine", "spectral_steepness", "metric_condition", "update_norm")
LOGARITHMIC = ("condition", "norm", "update", "dual", "lr")


def draw(
    history: Sequence[Mapping[str, float]],
    path: str | Path,
    *,
    quantities: Sequence[str] = QUANTITIES,
    layers: Sequence[str] | None = None,
) -> None:
    """Writes a picture (its kind by the ending of path) with a panel for each quantity and a line for each layer.

    history: the dicts that `watch` handed over. quantities: what follows the last "/" of a key; those that no dict has
    are left out. layers: what precedes it (None: all layers; "groups/0" is a group of parameters). ImportError without
    matplotlib; ValueError where nothing is left to draw.
    """
    panels = {name: _curves(history, name, layers) for name in quantities}
    panels = {name: curves for name, curves in panels.items() if curves}
    if not panels:
        logged = sorted({key.rpartition("/")[2] for numbers in history for key in numbers if "/" in key})
        raise ValueError(f"none of {', '.join(quantities)} was logged; draw some of {', '.join(logged) or 'nothing'}")
    figure, axes = canvas(len(panels))
    for ax, (name, curves) in zip(axes, panels.items(), strict=True):
        for layer, points in curves.items():
            ax.plot(*zip(*points, strict=True), linewidth=1, marker=".", markersize=3, label=layer)
        ax.set(xlabel="step", title=name.replace("_", " "))
        if name.endswith(LOGARITHMIC):
            ax.set_yscale("log")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize="x-small")
    figure.savefig(path, dpi=110)


def canvas(panels: int, height: float = 4.2) -> tuple[Any, Sequence[Any]]:
    """(figure, axes) side by side, in this library's look; height in inches. Needs no display."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures are drawn with matplotlib: pip install 'steepest[plot]'") from error
    figure = Figure(figsize=(4.2 * panels, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(1, panels, i + 1) for i in range(panels)]
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _curves(
    history: Sequence[Mapping[str, float]], quantity: str, layers: Sequence[str] | None
) -> dict[str, list[tuple[float, float]]]:
    curves: dict[str, list[tuple[float, float]]] = {}
    for numbers in history:
        for key, value in numbers.items():
            layer, _, name = key.rpartition("/")
            wanted = not layer.startswith("groups/") if layers is None else layer in layers
            if name == quantity and layer and wanted:
                curves.setdefault(layer, []).append((numbers["step"], value))
    return curves
