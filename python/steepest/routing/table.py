"""Routes as text: one line for a log, and the aligned table of `describe()`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .routes import Route

COLUMNS = ("name", "shape", "rule", "reason", "effective lr", "backend")


def summary(routes: Iterable[Route], method: str) -> str:
    """One line for a log: "48 matrices (85.0M) by MuAdam, 50 others (39.6M) by AdamW"."""
    sizes: dict[str, list[int]] = {"matrix": [], "adamw": []}
    for r in routes:
        sizes[r.rule].append(r.param.numel())
    matrices, others = sizes["matrix"], sizes["adamw"]
    text = f"{_count(len(matrices), 'matrix', 'matrices')} ({_size(sum(matrices))}) by {method}"
    return f"{text}, {_count(len(others), 'other', 'others')} ({_size(sum(others))}) by AdamW" if others else text


def format_table(rows: Sequence[Sequence[object]], columns: Sequence[str] = COLUMNS) -> str:
    """Aligned text, a header and one line per row. Floats have four digits, None is "-"; numbers align right."""
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"a row has {len(row)} cells for {len(columns)} columns {tuple(columns)}: {tuple(row)}")
    cells = [list(columns), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    right = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(columns))]
    lines = (
        "  ".join(text.rjust(w) if r else text.ljust(w) for text, w, r in zip(line, widths, right, strict=True))
        for line in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _count(n: int, one: str, many: str) -> str:
    return f"{n} {one if n == 1 else many}"


def _size(n: int) -> str:
    """Elements with one decimal: 512, 39.4K, 85.0M, 1.2B."""
    for unit, scale in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if n >= scale:
            return f"{n / scale:.1f}{unit}"
    return str(n)
