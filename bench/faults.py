"""Writes docs/faults.md: what every optimizer does about every fault, measured now (some minutes on one core).

python bench/faults.py            writes docs/faults.md
python bench/faults.py --check    exit status 1 if it would change

The faults and how they are measured are tests/support/faults.py, which tests/optim/test_faults.py goes through too.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "faults.md"


def main(arguments: Sequence[str]) -> int:
    sys.path.insert(0, str(ROOT / "tests"))
    warnings.filterwarnings("ignore", message="Anomaly Detection")
    from support.faults import HEAD, SECTIONS, measured, written

    new = HEAD + "".join(written(section, measured(section)) for section in SECTIONS)
    old = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    if "--check" not in arguments:
        PAGE.write_text(new, encoding="utf-8")
    return int("--check" in arguments and new != old)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
