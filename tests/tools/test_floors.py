"""The house as its imports draw it: CONTRIBUTING.md shows the picture that this file draws, all of it.

`python tests/tools/test_floors.py` prints the picture. A room is a module or a package of `steepest`; it stands one
floor above the highest room it imports, so that circles have no picture. `__init__`, which names everything, the tools
and `_version`, which is one number, are not drawn.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

import steepest
from steepest.ops import backend

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python" / "steepest"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
#: Rooms that are no part of the library's picture.
NOT_DRAWN = {"__init__", "__main__", "_moved", "_version", "tools"}
#: What each tool imports of the others; the command line imports a command's module when it is called.
TOOLS: dict[str, set[str]] = {
    "bench": {"files", "compare", "machine", "planner", "shapes"},
    "cli": set(),
    "compare": {"files", "machine"},
    "convert": {"files"},
    "doctor": {"facts"},
    "facts": set(),
    "files": set(),
    "machine": set(),
    "planner": {"scale"},
    "scale": {"shapes"},
    "shapes": set(),
    "tune": {"files", "bench", "shapes"},
    "__init__": set(),
}
#: How high the library may be, and how many files a gradient may go through.
FLOORS, FILES = 8, 8


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    """All nodes of a file's syntax, parsed once."""
    return list(ast.walk(ast.parse(path.read_text())))


@functools.cache
def imports(path: Path) -> set[str]:
    """Dotted names imported by a file, relative ones resolved against the package."""
    package = ["steepest", *path.relative_to(PACKAGE).parts[:-1]]
    found: set[str] = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            stem = ".".join(filter(None, [base, node.module]))
            found.update(f"{stem}.{alias.name}" for alias in node.names)
    return found


def room(path: Path, package: Path = PACKAGE) -> str:
    first = path.relative_to(package).parts[0]
    return first.removesuffix(".py")


def rooms() -> dict[str, set[str]]:
    """What each room of the library imports of the others."""
    drawn: dict[str, set[str]] = {}
    for path in sources():
        drawn.setdefault(room(path), set()).update(
            name.split(".")[1] for name in imports(path) if name.startswith("steepest.")
        )
    names = drawn.keys() - NOT_DRAWN
    return {name: (drawn[name] & names) - {name} for name in names}


def floors(house: dict[str, set[str]]) -> dict[str, int]:
    """The floor of every room, from 1; ValueError where rooms import one another in a circle."""
    heights: dict[str, int] = {}
    while len(heights) < len(house):
        ready = [name for name in house if name not in heights and house[name] <= heights.keys()]
        if not ready:
            raise ValueError(f"a circle of imports among {sorted(house.keys() - heights.keys())}")
        heights |= {name: 1 + max((heights[below] for below in house[name]), default=0) for name in ready}
    return heights


def picture() -> str:
    house = rooms()
    heights = floors(house)
    order = sorted(house, key=lambda name: (-heights[name], name))
    return "\n".join(f"{heights[name]}  {name:<13} {' '.join(sorted(house[name]))}".rstrip() for name in order)


def test_the_picture_is_that_of_the_imports() -> None:
    """If this fails, the house has changed: look whether it should, and copy the picture that this file prints."""
    shown = re.search(r"```\n(\d  .*?)\n```", CONTRIBUTING.read_text(), re.DOTALL)
    assert shown is not None
    assert shown[1] == picture()


def listed(docstring: str) -> set[str]:
    """The names that a package's docstring explains, a line each: `name   what it is`, `one, two   what they are`."""
    entries = re.findall(r"^ *(\w+(?:, \w+)*)(?:  +\S.*)?$", docstring, re.MULTILINE)
    return {name for entry in entries for name in entry.split(", ")}


def test_a_package_that_lists_its_files_lists_all_of_them() -> None:
    assert listed("Parts.\n\n    one   the first\n    two, three\n          the others\n") == {"one", "two", "three"}
    lists = 0
    for path in PACKAGE.rglob("__init__.py"):
        files = {each.stem for each in path.parent.iterdir() if each.suffix == ".py" or (each / "__init__.py").exists()}
        files -= {"__init__", "__main__"}
        names = listed(ast.get_docstring(ast.parse(path.read_text())) or "")
        if names & files:
            assert names == files, path
            lists += 1
    assert lists > 5


def test_the_library_has_few_floors() -> None:
    assert max(floors(rooms()).values()) <= FLOORS
    with pytest.raises(ValueError, match="a circle of imports among"):
        floors({"a": {"b"}, "b": {"a"}, "c": set()})


def test_no_module_imports_one_that_imports_it() -> None:
    """Nor through others, nor where a function is called: what is put off until then has no circle to avoid."""
    modules = {".".join(["steepest", *path.relative_to(PACKAGE).with_suffix("").parts]): path for path in sources()}
    modules = {name.removesuffix(".__init__"): path for name, path in modules.items()}
    # A name of a package is that of its module, or is in the package's own file.
    asked = {
        name: {each if each in modules else each.rpartition(".")[0] for each in imports(path)}
        for name, path in modules.items()
    }
    assert max(floors({name: names & modules.keys() - {name} for name, names in asked.items()}).values()) > FLOORS


def files_above(frame: FrameType | None) -> set[str]:
    """The files of the package that the call in this frame came through."""
    files = set()
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            files.add(path.relative_to(PACKAGE).as_posix())
        frame = frame.f_back
    return files


@pytest.mark.skipif(backend.extension is None, reason=f"{backend.extension_reason}")
def test_the_way_of_a_gradient_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """From `step` to the kernels of a step of Muon, on a GPU: no more files than CONTRIBUTING.md names.

    The plan is there, as after a first step. On every way hooks are looked for (optimizer/step_hooks.py) and torch's
    modes set aside (step/modes.py).
    """
    around = {"optimizer/step_hooks.py", "step/modes.py"}
    way: set[str] = set()

    def chain(xs: list[Tensor], ys: list[Tensor], *_: Any, **__: Any) -> None:
        way.update(files_above(sys._getframe(1)), {"ops/polar_chain.py"})
        torch._foreach_copy_(ys, xs)

    def launch(name: str, _: str) -> Callable[..., None]:
        way.update(files_above(sys._getframe(1)))
        return getattr(torch.ops.steepest, name)

    monkeypatch.setattr("steepest.ops.cpu_chain.takes", lambda *_: False)
    monkeypatch.setattr("steepest.linalg.newton_schulz.supports", lambda *_: True)
    monkeypatch.setattr("steepest.linalg.newton_schulz.polar_chain", chain)
    p = torch.nn.Parameter(torch.ones(6, 8))
    p.grad = torch.randn(6, 8)
    optimizer = steepest.Muon([p], polar="auto")
    optimizer.step()
    monkeypatch.setattr("steepest.ops.multi_tensor._op", launch)
    optimizer.step()
    told = re.search(r"\*\*The way of a gradient\.\*\*.*?\n\n", CONTRIBUTING.read_text(), re.DOTALL)
    assert told is not None
    assert way - around == set(re.findall(r"\(([a-z_/]+\.py)\)", told[0]))
    assert len(way - around) <= FILES


def test_the_library_imports_no_tool() -> None:
    """Nor does it import the compiled test module, or kernels outside of the ops."""
    guilty = []
    for path in sources():
        if room(path) in ("tools", "__main__"):
            continue
        used = {name.split(".")[1] for name in imports(path) if name.startswith("steepest.")}
        above = used & ({"tools", "_C"} | ({"kernels"} if room(path) != "ops" else set()))
        guilty += [f"{path.relative_to(PACKAGE)} imports {name}" for name in sorted(above)]
    assert not guilty


def test_a_tool_imports_only_the_tools_below_it() -> None:
    assert {room(path, PACKAGE / "tools") for path in sources() if room(path) == "tools"} == set(TOOLS)
    assert max(floors(TOOLS).values()) <= FLOORS  # and there is no circle
    guilty = []
    for path in (PACKAGE / "tools").rglob("*.py"):
        name = room(path, PACKAGE / "tools")
        used = {imported.split(".")[2] for imported in imports(path) if imported.startswith("steepest.tools.")}
        guilty += [f"{path.relative_to(PACKAGE)} imports {other}" for other in used & set(TOOLS) - TOOLS[name] - {name}]
    assert not guilty


#: Words that a docstring does not begin with: they hang on what the reader has to look up first.
HANGING = re.compile(
    r"(As|By|For|From|It|Likewise|Of|Over|So many|The same|Their|Them|These|They|Those|Where|While|With|Without)\b"
)


def test_a_docstring_begins_with_its_subject() -> None:
    guilty, count = [], 0
    for path in [*sources(), *sorted((ROOT / "kernels").glob("*.py"))]:
        for node in nodes(path):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = ast.get_docstring(node) or ""
                count += bool(text)
                if HANGING.match(text):
                    guilty.append(f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)} {text.splitlines()[0]}")
    assert not guilty, "\n".join(guilty)
    assert count > 1000


def test_only_the_optimizer_knows_torch_optim() -> None:
    guilty = []
    for path in sources():
        if room(path) in ("optimizer", "diagnostics", "integrations", "tools"):
            continue
        attributes = (node for node in nodes(path) if isinstance(node, ast.Attribute) and node.attr == "optim")
        if any(ast.unparse(node) == "torch.optim" for node in attributes):
            guilty.append(path)
        if any(name.startswith("torch.optim") for name in imports(path)):
            guilty.append(path)
    assert not guilty


def test_kernels_import_torch_and_triton_only() -> None:
    for path in (ROOT / "kernels").glob("*.py"):
        roots = {
            name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, (ast.Import, ast.ImportFrom)) and not getattr(node, "level", 0)
            for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""])
        }
        assert roots - sys.stdlib_module_names <= {"torch", "triton"}, path


def test_no_torch_header_below_the_door() -> None:
    inside = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cuh", ".cu", ".cpp")]
    inside = [p for p in inside if p.parent.name != "ops" and p.name not in ("library.cpp", "module.cpp")]
    assert inside
    guilty = [p.name for p in inside if re.search(r"#include\s*<(torch|ATen|c10|pybind11)/", p.read_text())]
    assert not guilty


PAPERS = sorted((Path(__file__).parents[1] / "papers").glob("test_*.py"))


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_references_from_papers_know_only_the_class_they_are_of(path: Path) -> None:
    """A statement of a paper that shares code with what it is held against says nothing.

    `infinite_descent` is a function, and what is held against its paper is a gradient within.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert re.search(r"[\w)] -?= ", ast.get_docstring(tree) or ""), "the equations are at the head"
    inner = {"steepest.zoo.infinite_descent"} if path.stem == "test_infinite_descent" else set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("steepest"):
            assert node.module == "steepest" or node.module in inner, node.module
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("support."):
            source = Path(__file__).parents[1] / f"{node.module.replace('.', '/')}.py"
            assert not re.search(r"^(from|import) steepest", source.read_text(encoding="utf-8"), re.MULTILINE), source
        elif isinstance(node, ast.Import):
            assert not [each.name for each in node.names if each.name.startswith("steepest.")]


if __name__ == "__main__":
    print(picture())
