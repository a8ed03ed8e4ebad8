"""Machine code of the kernels, read with cuobjdump on any machine."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from steepest.ops import backend
from support.requirements import unavailable


def tool(name: str) -> str:
    """A CUDA binary tool from PATH or from inside the Triton package; a test without it is skipped."""
    found = shutil.which(name)
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        found = shutil.which(name, path=str(Path(spec.origin).parent / "backends" / "nvidia" / "bin"))
    if found is None:
        unavailable(f"{name} is neither on PATH nor in an installed Triton")
    return found


def binary() -> str:
    """Path of the compiled part; a test is skipped when it has no CUDA code."""
    if backend.extension is None:
        unavailable(str(backend.extension_reason))
    if backend.extension.build_info()["cuda"] is None:
        unavailable("the compiled part was built without CUDA")
    return str(backend.extension.path)


@cache
def dump(*arguments: str) -> str:
    """What cuobjdump prints."""
    command = [tool("cuobjdump"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout


def by_architecture(text: str, begin: str) -> Iterator[tuple[str, str, str]]:
    """(architecture, mangled name, what follows) of each function in a dump."""
    for image in re.split(r"^arch = ", text, flags=re.MULTILINE)[1:]:
        for function in re.split(begin, image)[1:]:
            mangled, _, body = function.partition("\n")
            yield image.partition("\n")[0].strip(), mangled.strip().rstrip(":"), body
