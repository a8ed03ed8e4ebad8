"""What a method says to the shell around it are public names, all of them in optimizer/method.py."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import steepest.zoo
from steepest.optimizer import MatrixOptimizer
from steepest.optimizer.method import Method

ZOO = Path(steepest.zoo.__file__).parent
#: torch's own name, which a GradScaler looks for.
OF_TORCH = {"_step_supports_amp_scaling"}
SHELL = tuple(kind for kind in MatrixOptimizer.__mro__ if kind.__module__.startswith("steepest.optimizer"))


def below(kind: type) -> Iterator[type]:
    for each in kind.__subclasses__():
        yield from (each, *below(each))


def methods() -> list[type]:
    """The classes of the zoo, and their bases there."""
    for module in pkgutil.iter_modules(steepest.zoo.__path__):
        importlib.import_module(f"steepest.zoo.{module.name}")
    return [kind for kind in dict.fromkeys(below(MatrixOptimizer)) if kind.__module__.startswith("steepest.zoo")]


def names(*kinds: type) -> set[str]:
    """What classes define or annotate, less what Python calls."""
    defined = {name for kind in kinds for name in (*vars(kind), *vars(kind).get("__annotations__", {}))}
    return {name for name in defined if not name.startswith("__")}


def test_a_method_overrides_no_private_name_of_the_shell() -> None:
    assert len(methods()) > 35
    private = {name for name in names(*SHELL) if name.startswith("_")} - OF_TORCH
    assert len(private) > 50
    assert {kind.__name__: sorted(names(kind) & private) for kind in methods() if names(kind) & private} == {}


def test_a_method_overrides_what_the_protocol_has() -> None:
    """And of the calls that users make what takes or does more: `step`, with a loss, and switches of weights."""
    users = {"step", "zero_grad", "eval", "train"}
    overridden = {name for kind in methods() for name in names(kind) & names(*SHELL)} - OF_TORCH
    assert overridden - users <= names(Method)
    # Nothing is promised that no method uses, but for a newcomer's lines of help.
    assert names(Method) - overridden <= {"argument_lines"}


def test_a_method_asks_for_no_private_name_of_the_shell() -> None:
    """An attribute that begins with an underscore is one that the zoo has given."""
    trees = [ast.parse(path.read_text()) for path in ZOO.glob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    given = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    given |= names(*methods()) | {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    private = {name for name in names(*SHELL) if name.startswith("_")} - given
    asked = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    assert asked & private == set()
    assert len(private) > 50


def test_the_protocol_explains_every_name() -> None:
    """A method has a docstring, an attribute a comment above it."""
    path = Path(Method.__module__.replace(".", "/") + ".py")
    lines = (ZOO.parents[1] / path).read_text().splitlines()
    (tree,) = (n for n in ast.parse("\n".join(lines)).body if isinstance(n, ast.ClassDef))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            assert ast.get_docstring(node), node.name
        elif isinstance(node, ast.AnnAssign):
            assert lines[node.lineno - 2].lstrip().startswith("#: "), ast.unparse(node.target)
