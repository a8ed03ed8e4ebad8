"""The floors of the house: a module imports only what lies below it.

    zoo -> optimizer -> plan -> {fused, unfused} -> rounds -> recipe -> parts -> linalg -> ops -> {lib, kernels, torch}

`matrices`, `stacks`, `values` and `routing` stand beside `recipe`, `budget` below all; `graph` and `diagnostics` stand
on `optimizer`, `compare` on `zoo`, `bench` on all of them, `tune` on `bench`, `doctor` on `ops`. `kernels` imports
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
    "bench": {"_version", "compare", "diagnostics", "graph", "linalg", "ops", "optimizer", "planner", "zoo"},
    "graph": {"optimizer", "values"},
    "diagnostics": {"optimizer", "matrices"},
    "compare": {"zoo", "optimizer", "diagnostics"},
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
    "planner": {"linalg", "ops"},
    "tune": {"bench", "linalg", "ops"},
    "doctor": {"ops"},
    "cli": {"_version", "bench", "compare", "doctor", "planner", "tune", "ops"},
    "__main__": {"cli"},
    "__init__": {"_version", "diagnostics", "graph", "zoo", "routing", "linalg", "ops"},
    "_version": set(),
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


def room(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def test_every_room_is_on_the_plan() -> None:
    assert {room(path) for path in sources()} == set(BELOW)


def test_imports_only_from_below() -> None:
    guilty = []
    for path in sources():
        used = {name.split(".")[1] for name in imports(path) if name.startswith("steepest.")}
        above = {name for name in used - BELOW[room(path)] - {room(path)} if name in BELOW or name in ("_C", "kernels")}
        guilty += [f"{path.relative_to(PACKAGE)} (floor {room(path)}) imports {name}" for name in sorted(above)]
    assert not guilty


def test_only_the_optimizer_knows_torch_optim() -> None:
    guilty = []
    for path in sources():
        if room(path) in ("optimizer", "diagnostics", "compare", "bench"):
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
