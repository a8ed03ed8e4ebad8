"""The import paths that the tools had before they were parted from the library, `steepest.bench` for one.

An old path gives the module of the new one, `steepest.tools.bench`, with a DeprecationWarning; version 1 drops them.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = ("bench", "cli", "compare", "doctor", "planner", "tune")


class Moved(MetaPathFinder, Loader):
    """Finds the module of an old path, and loads the one of the new path in its place."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        package, _, rest = name.partition(".")
        return ModuleSpec(name, Moved()) if package == __package__ and rest.partition(".")[0] in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = spec.name.replace(".", ".tools.", 1)
        warnings.warn(f"{spec.name} has moved: import {new}", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(new)
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec  # which importlib has replaced by that of the old path


def install() -> None:
    """Old paths are looked up before the finder that would load a file of a moved package a second time."""
    sys.meta_path.insert(0, Moved())
