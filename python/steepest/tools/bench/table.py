"""Rows for a person: a block for each case, a line for each variant, what is wrong in words."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from .case import OK, Row

#: Columns of numbers in their order, and how each is headed; a block shows those that a row of it has.
COLUMNS = {
    "ms": "ms",
    "spread_ms": "+-",
    "host_ms": "host ms",
    "host_us": "host us",
    "spread_us": "+-",
    "ratio": "times",
    "optimizer_ms": "optimizer ms",
    "optimizer_share": "share",
    "tokens_per_s": "tokens/s",
    "loss": "loss",
    "slack_median": "slack",
    "slack_least": "least",
    "launches": "launches",
    "operators": "operators",
    "state_mib": "state MiB",
    "state_bytes_per_parameter": "bytes/param",
    "extra_mib": "extra MiB",
    "tflop_per_s": "TFLOP/s",
    "of_products": "of products",
    "gb_per_s": "GB/s",
    "of_copy": "of copy",
    "relative_error": "error",
    "off_diagonal": "off-diagonal",
    "off_the_parts": "off the parts",
    "whitening": "whitening",
    "orthonormality": "orthonormality",
    "residual": "residual",
    "asymmetry": "asymmetry",
}


def text(rows: Sequence[Row]) -> str:
    """The rows as a table, case by case."""
    blocks = [_block(label, list(of_block)) for label, of_block in groupby(rows, _label)]
    return "\n\n".join(blocks)


def _label(row: Row) -> str:
    return " ".join(filter(None, (row["suite"], row.get("case", ""), row.get("dtype", ""))))


def _block(label: str, rows: list[Row]) -> str:
    shown = [key for key in COLUMNS if any(key in row for row in rows)]
    head = ["variant", *(COLUMNS[key] for key in shown), ""]
    lines = [[row.get("variant", ""), *(number(row.get(key)) for key in shown), _remark(row)] for row in rows]
    return f"{label}{_base(rows)}\n{aligned([head, *lines])}"


def _base(rows: list[Row]) -> str:
    bases = {row["base"] for row in rows if "base" in row}
    return f"   (times: {' or '.join(sorted(bases))} over this, more is faster)" if bases else ""


def _remark(row: Row) -> str:
    return "" if row["status"] == OK else str(row["status"])


def number(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.1e}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns under one another, numbers between the first and the last, which are words."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in (0, len(row) - 1) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    )
