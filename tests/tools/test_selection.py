"""Which tests `make test-quick` and `.ci/run` take."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest

TESTS = Path(__file__).parents[1]


@pytest.fixture
def conftest(request: pytest.FixtureRequest) -> ModuleType:
    module = request.config.pluginmanager.get_plugin(str(TESTS / "conftest.py"))
    assert module is not None
    return cast(ModuleType, module)


def test_quick_is_of_every_part_and_of_files_that_are_there(
    request: pytest.FixtureRequest, conftest: ModuleType
) -> None:
    assert not [name for name in conftest.QUICK if not (TESTS / name).exists()]
    parts = {path.relative_to(TESTS).parts[0] for path in TESTS.rglob("test_*.py")}
    parts.remove("integrations")  # of packages that are not installed for it
    assert {name.partition("/")[0] for name in conftest.QUICK} == parts
    marked = {item.path for item in request.session.items if item.get_closest_marker("quick") is not None}
    named = {path for name in conftest.QUICK for path in (TESTS / name, *(TESTS / name).glob("*"))}
    assert marked == named & {item.path for item in request.session.items}


class Case:
    """An item with these parameters, of which `b` and `c` are from one list."""

    def __init__(self, name: str, slow: bool = False, path: Path = TESTS, **params: Any) -> None:
        self.nodeid, self.slow, self.path = name, slow, path
        self.callspec = SimpleNamespace(params=params)

    def get_closest_marker(self, name: str) -> object:
        return name if name == "slow" and self.slow else None

    def iter_markers(self, name: str) -> Iterator[pytest.Mark]:
        assert name == "parametrize"
        yield pytest.mark.parametrize("a", ()).mark
        yield pytest.mark.parametrize(argnames="b, c", argvalues=()).mark


def test_of_a_product_make_test_takes_each_value(conftest: ModuleType) -> None:
    """A case for every value of the longest list has those of the others too. Other tests, and papers, stay whole."""
    lists = {"a": [1, 2, 3, 4], "b, c": [(1, "x"), (1, "y"), (2, "x")], "fixture": ["f", "g"]}

    def cases(name: str, path: Path) -> list[Case]:
        return [
            Case(f"{name}[{a}-{b}{c}-{fixture}]", path=path, a=a, b=b, c=c, fixture=fixture)
            for a in lists["a"]
            for b, c in lists["b, c"]
            for fixture in lists["fixture"]
        ]

    product, paper = cases("one", TESTS / "optim" / "test_it.py"), cases("two", TESTS / "papers" / "test_it.py")
    alone = [Case(f"three[{a}]", a=a, b=0, c=0) for a in lists["a"]]
    items = [*product, *paper, *alone]
    left = conftest.of_products(items)
    taken = [item for item in items if item not in left]
    assert {*paper, *alone} <= {*taken}
    chosen = [item.callspec.params for item in product if item in taken]
    assert len(chosen) == len(lists["a"])
    for names, values in lists.items():
        assert {tuple(params[name] for name in names.split(", ")) for params in chosen} == {
            value if isinstance(value, tuple) else (value,) for value in values
        }


def test_one_in_three_is_of_every_slow_test_and_all_of_the_others(conftest: ModuleType) -> None:
    tests = {f"test_{i}": i for i in range(1, 40)}  # with so many slow cases, and as many that are not
    items = [
        Case(f"{name}[{j}]", slow) for name, cases in tests.items() for j in range(cases) for slow in (True, False)
    ]
    assert not conftest.one_in(1, items)
    left = {id(item) for item in conftest.one_in(3, items)}
    taken = [item for item in items if id(item) not in left]
    assert sum(not item.slow for item in taken) == sum(tests.values())
    firsts = set()
    for name, cases in tests.items():
        numbers = [
            int(item.nodeid.partition("[")[2][:-1])
            for item in taken
            if item.slow and item.nodeid.startswith(f"{name}[")
        ]
        assert cases // 3 <= len(numbers) <= cases // 3 + 1
        assert numbers
        assert numbers == list(range(numbers[0], cases, 3))
        firsts.add(numbers[0])
    assert firsts == {0, 1, 2}  # not the same class of every test
