"""Where every parameter of known architectures goes, beside what a person has read and found right: routes.txt.

If this fails, the routes have changed, or a package's model has: look at each line, and where it is right write the
file anew, `python tests/integrations/architectures.py > tests/integrations/routes.txt`.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from integrations.architectures import PACKAGES, table

REVIEWED = (Path(__file__).parent / "routes.txt").read_text(encoding="utf-8")
TABLES = {block.splitlines()[0].strip("[]"): block.splitlines()[1:] for block in REVIEWED.strip().split("\n\n")}


@pytest.mark.parametrize("name", TABLES)
def test_routes_are_the_reviewed_ones(name: str) -> None:
    package, network = name.split()
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed (make test-integrations)")
    assert table(package, network) == TABLES[name]


def test_every_network_is_in_the_file_and_they_are_many() -> None:
    assert list(TABLES) == [f"{package} {name}" for package, (_, names) in PACKAGES.items() for name in names]
    assert len(TABLES) >= 40


def test_vectors_are_adamw_s_everywhere() -> None:
    for lines in TABLES.values():
        assert [line.split()[0] for line in lines if line.endswith("vectors")] == ["adamw"]
