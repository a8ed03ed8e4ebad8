"""What `help` and `dir` show: every argument with a line and its true default, and public names alone."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from typing import Any

import pytest
from torch import nn

import steepest
from steepest.optimizer import MatrixOptimizer
from steepest.zoo.kronecker import BasesAndExtras
from steepest.zoo.product import Coupling
from steepest.zoo.shared import Extras
from support.training import EVERY, parameters

CLASSES: tuple[type[MatrixOptimizer], ...] = (*EVERY, steepest.KFAC)
KEYWORDS = {"Unpack[Extras]": Extras, "Unpack[BasesAndExtras]": BasesAndExtras, "Unpack[Coupling]": Coupling}
LINE = re.compile(r"^ {4}(\w+)(?:=(.*?))? {2,}(\S.*)$", re.MULTILINE)


def build(cls: type[MatrixOptimizer], **values: Any) -> MatrixOptimizer:
    return cls(nn.Linear(4, 3) if cls is steepest.KFAC else parameters([(4, 3)]), **values)


def refuses(cls: type[MatrixOptimizer], name: str) -> bool:
    try:
        build(cls, **{name: ()})
    except (TypeError, ValueError) as error:
        return "does not take" in str(error)
    return False


def shown(cls: type[MatrixOptimizer]) -> dict[str, tuple[str, str]]:
    """(default, what it is) of every argument that the help lists."""
    _, heading, listing = (inspect.getdoc(cls) or "").partition("\nAll arguments:\n")
    assert heading, f"{cls.__name__} lists no arguments"
    return {name: (default, text) for name, default, text in LINE.findall(listing)}


@pytest.mark.parametrize("cls", CLASSES)
def test_help_has_a_line_for_every_argument_that_the_class_takes(cls: type[MatrixOptimizer]) -> None:
    code, keywords = inspect.unwrap(cls.__init__).__code__, KEYWORDS[cls.__init__.__annotations__["extra"]]
    named = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
    taken = [*named, *(name for name in keywords.__optional_keys__ if name not in named and not refuses(cls, name))]
    assert sorted(shown(cls)) == sorted(taken)
    assert list(inspect.signature(cls).parameters) == list(shown(cls))
    assert all(len(line) <= 120 for line in (cls.__doc__ or "").splitlines())


@pytest.mark.parametrize("cls", CLASSES)
def test_the_defaults_that_help_shows_are_those_of_the_class(cls: type[MatrixOptimizer]) -> None:
    first, *others = inspect.signature(cls).parameters.values()
    assert first.default is first.empty
    assert {p.name: repr(p.default) for p in others} == {
        name: default for name, (default, _) in shown(cls).items() if name != first.name
    }
    bare, spelled = build(cls), build(cls, **{p.name: p.default for p in others})
    for ours, theirs in zip(bare.param_groups, spelled.param_groups, strict=True):
        assert {key: value for key, value in ours.items() if key != "params"} == {
            key: value for key, value in theirs.items() if key != "params"
        }


def test_a_subclass_with_a_constructor_of_its_own_shows_its_own() -> None:
    class Half(steepest.MuAdam):
        def __init__(self, params: Any, lr: float = 0.5) -> None:
            super().__init__(params, lr)

    assert list(inspect.signature(Half).parameters) == ["params", "lr"]


def test_the_help_of_a_mixin_lists_what_it_adds() -> None:
    assert {"lower_bound", "stale_dual", "reduce_loss"} <= set(shown(steepest.Momo))


@pytest.mark.slow  # Python compiles all of torch anew
def test_without_docstrings_there_is_no_help_and_all_else() -> None:
    told = "import inspect, steepest as s; print(s.MuAdam.__doc__, 'maximize' in str(inspect.signature(s.MuAdam)))"
    done = subprocess.run([sys.executable, "-OO", "-c", told], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["None", "True"], done.stderr


def test_dir_shows_the_public_names() -> None:
    assert dir(steepest) == sorted(steepest.__all__)
    assert all(hasattr(steepest, name) for name in dir(steepest))
