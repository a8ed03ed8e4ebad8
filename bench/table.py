"""The rows of the README's table, from the result file they stand for.

python bench/table.py bench/results/step-cpu.csv
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path


def rows(path: Path) -> list[str]:
    """One Markdown row per optimizer: name, median and spread, times torch's speed, error of the direction."""
    with path.open(newline="") as file:
        return [_row(row) for row in csv.DictReader(file)]


def _row(row: dict[str, str]) -> str:
    ms, spread, ratio, error = (float(row[key]) for key in ("ms", "spread_ms", "ratio", "relative_error"))
    return f"| {row['optimizer']} | {ms:.0f} ± {spread:.0f} | {ratio:.2f} | {error:.2f} |"


if __name__ == "__main__":
    print("\n".join(rows(Path(sys.argv[1]))))
