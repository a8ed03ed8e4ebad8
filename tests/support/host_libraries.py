"""Sources of csrc that need no CUDA, as libraries for ctypes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = os.environ.get("CXX", "g++")
FLAGS = (
    *("-std=c++17", "-O1", "-g1", "-fPIC", "-x", "c++", "-I", "csrc"),
    "-Dsteepest=steepest_host",  # a namespace of its own: another library of this process may hold the real one
)


def require_compiler() -> None:
    """Skips where nothing can be compiled."""
    if sys.platform != "linux":
        pytest.skip(f"the libraries to link are those of Linux, not of {sys.platform}")
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no C++ compiler: {COMPILER} is not on PATH")


def sanitizer() -> list[str]:
    """Flags that find undefined behaviour at run time, an access that is not aligned, where the compiler has them."""
    said = subprocess.run([COMPILER, "-print-file-name=libubsan.so"], capture_output=True, text=True, check=True)
    return ["-fsanitize=undefined"] if Path(said.stdout.strip()).is_absolute() else []


def run(commands: Sequence[Sequence[str]]) -> None:
    """All at once; the first that fails is an error with what it said."""
    running = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    for each in running:
        _, errors = each.communicate(timeout=300)
        assert each.returncode == 0, errors


def shared_library(path: Path, sources: Sequence[str]) -> Path:
    """Sources that need no torch."""
    require_compiler()
    run([[COMPILER, *FLAGS, *sanitizer(), "-shared", *sources, "-o", str(path), "-ldl"]])
    return path
