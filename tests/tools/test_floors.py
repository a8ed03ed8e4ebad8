"""The floors of the house: a module imports only what lies below it.

    zoo -> optimizer -> plan -> {fused, unfused} -> rounds -> recipe -> parts -> linalg -> ops -> {lib, kernels, torch}

`matrices`, `stacks`, `values` and `routing` stand beside `recipe`, `budget` below all; `graph` and `diagnostics` stand
on `optimizer`. What a training job does not import is in `tools`, on top of all of them: in it `compare` stands alone,
`bench` on `compare` and `planner`, `tune` on `bench`, `doctor` on `facts`. Of the library only the command `__main__`
knows the tools. `kernels` imports
torch and triton only; only `optimizer`, and what looks at any optimizer from outside, knows `torch.optim`; only `ops`
knows the compiled part and the kernels; no torch header lies below csrc/ops. When the picture should change, change it
here in the same commit.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python" / "steepest"

BELOW = {
    "graph": {"optimizer", "values"},
    "diagnostics": {"optimizer", "matrices"},
    "zoo": {"optimizer", "values", "plan", "unfused", "recipe", "routing", "matrices", "parts", "linalg", "ops"},
    "optimizer": {"plan", "values", "unfused", "recipe", "stacks", "routing", "matrices", "parts", "ops"},
    "plan": {"fused", "unfused", "rounds", "recipe", "matrices", "parts", "ops"},
    "fused": {"rounds", "recipe", "parts", "ops"},
    "rounds": {"budget", "recipe", "matrices", "parts", "ops"},
    "unfused": {"budget", "recipe", "matrices", "parts", "ops"},
    "stacks": {"recipe"},
    "values": {"parts"},
    "routing": {"matrices"},
    "matrices": set(),
    "recipe": {"parts"},
    "parts": {"linalg", "ops"},
    "linalg": {"budget", "ops"},
    "budget": set(),
    "ops": {"_version", "kernels"},
    "tools": {"_version", "zoo", "graph", "diagnostics", "optimizer", "linalg", "ops"},
    "__main__": {"tools"},
    "__init__": {"_moved", "_version", "diagnostics", "graph", "zoo", "routing", "linalg", "ops"},
    "_moved": set(),
    "_version": set(),
}
#: Of the rooms of `tools`, each importing some of the others.
TOOLS = {
    "bench": {"compare", "planner"},
    "cli": set(),  # a command's module is imported when it is called
    "compare": set(),
    "doctor": {"facts"},
    "facts": set(),
    "planner": set(),
    "tune": {"bench"},
    "__init__": set(),
}


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Dotted names imported by a file, relative ones resolved against the package."""
    package = ["steepest", *path.relative_to(PACKAGE).parts[:-1]]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
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


def test_every_room_is_on_the_plan() -> None:
    assert {room(path) for path in sources()} == set(BELOW)
    assert {room(path, PACKAGE / "tools") for path in sources() if room(path) == "tools"} == set(TOOLS)


def test_imports_only_from_below() -> None:
    guilty = []
    for path in sources():
        used = {name.split(".")[1] for name in imports(path) if name.startswith("steepest.")}
        above = {name for name in used - BELOW[room(path)] - {room(path)} if name in BELOW or name in ("_C", "kernels")}
        guilty += [f"{path.relative_to(PACKAGE)} (floor {room(path)}) imports {name}" for name in sorted(above)]
    assert not guilty


def test_a_tool_imports_only_the_tools_below_it() -> None:
    guilty = []
    for path in (PACKAGE / "tools").rglob("*.py"):
        name = room(path, PACKAGE / "tools")
        used = {imported.split(".")[2] for imported in imports(path) if imported.startswith("steepest.tools.")}
        guilty += [f"{path.relative_to(PACKAGE)} imports {other}" for other in used & set(TOOLS) - TOOLS[name] - {name}]
    assert not guilty


def test_only_the_optimizer_knows_torch_optim() -> None:
    guilty = []
    for path in sources():
        if room(path) in ("optimizer", "diagnostics", "tools"):
            continue
        attributes = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute))
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
