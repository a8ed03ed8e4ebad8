"""What `make test-quick` runs: files that are there, of every part of the suite."""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


def test_quick_is_of_every_part_and_of_files_that_are_there(request: pytest.FixtureRequest) -> None:
    conftest = request.config.pluginmanager.get_plugin(str(TESTS / "conftest.py"))
    assert conftest is not None
    assert not [name for name in conftest.QUICK if not (TESTS / name).exists()]
    parts = {path.relative_to(TESTS).parts[0] for path in TESTS.rglob("test_*.py")}
    parts.remove("integrations")  # of packages that are not installed for it
    assert {name.partition("/")[0] for name in conftest.QUICK} == parts
    marked = {item.path for item in request.session.items if item.get_closest_marker("quick") is not None}
    named = {path for name in conftest.QUICK for path in (TESTS / name, *(TESTS / name).glob("*"))}
    assert marked == named & {item.path for item in request.session.items}
