"""The simulator of PTX, compiled from C++ when first needed: kernels from text, launched on arrays of numpy."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

COMPILER = os.environ.get("CXX", "g++")
SOURCES = Path(__file__).parent / "simulator"
RUNTIME = SOURCES / "cuda_runtime.cpp"
FLAGS = ["-std=c++20", "-O3", "-g1", "-fPIC", "-fno-gnu-unique", "-fnon-call-exceptions", "-Wall", "-Wextra"]
if platform.machine() == "x86_64":
    FLAGS += ["-mavx2", "-mfma", "-mf16c"]
CACHE = Path(os.environ.get("STEEPEST_PTX_CACHE") or Path(__file__).parents[3] / "build" / "ptx-cache")


class LaunchError(Exception):
    """A launch that was refused or failed, or PTX that cannot be read."""


def _compile(target: Path, command: Sequence[str]) -> Path:
    if target.exists():
        os.utime(target)  # build.py throws away what nobody asks for
    else:
        partial = target.with_suffix(f".{os.getpid()}{target.suffix}")
        subprocess.run([*command, "-o", str(partial)], check=True)
        partial.rename(target)
    return target


def objects() -> list[Path]:
    """Compiles what changed, all but the stand-in for the CUDA runtime, which needs a toolkit."""
    headers = b"".join(p.read_bytes() for p in sorted(SOURCES.glob("*.h")))
    jobs = []
    for source in sorted(SOURCES.glob("*.cpp")):
        if source == RUNTIME:
            continue
        command = [COMPILER, *FLAGS, "-c", str(source)]
        key = hashlib.sha256(headers + source.read_bytes() + " ".join(command).encode()).hexdigest()[:16]
        jobs.append((CACHE / f"{source.stem}-{key}.o", command))
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "simulator.lock").open("w") as lock, ThreadPoolExecutor(os.cpu_count()) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several workers one compiles
        return list(pool.map(lambda job: _compile(*job), jobs))


@cache
def library() -> ctypes.CDLL:
    """The simulator without a CUDA runtime."""
    parts = objects()
    key = hashlib.sha256(" ".join(p.name for p in parts).encode()).hexdigest()[:16]
    path = _compile(CACHE / f"libptxsim-{key}.so", [COMPILER, "-shared", *map(str, parts)])
    loaded = ctypes.CDLL(str(path))
    for name in ("ptxsim_load", "ptxsim_launch", "ptxsim_tensor_map"):
        getattr(loaded, name).restype = ctypes.c_char_p
    return loaded


def _check(error: bytes | None) -> None:
    if error is not None:
        raise LaunchError(error.decode())


def _triple(size: int | Sequence[int]) -> Any:
    sides = [size] if isinstance(size, int) else list(size)
    return (ctypes.c_uint32 * 3)(*(sides + [1, 1])[:3])


class Module:
    """A module of PTX."""

    def __init__(self, text: str) -> None:
        self.handle = ctypes.c_void_p()
        _check(library().ptxsim_load(text.encode(), ctypes.byref(self.handle)))

    def __del__(self) -> None:
        if self.handle:
            library().ptxsim_unload(self.handle)

    def launch(
        self,
        kernel: str,
        *arguments: Any,
        grid: int | Sequence[int] = 1,
        block: int | Sequence[int] = 32,
        cluster: int = 1,
        shared: int = 0,
        seed: int = 1,
    ) -> None:
        """A kernel runs to its end, or LaunchError says why not. Arrays go by address, numbers as ctypes values."""
        values = [ctypes.c_void_p(a.ctypes.data) if isinstance(a, np.ndarray) else a for a in arguments]
        pointers = (ctypes.c_void_p * max(len(values), 1))(*(ctypes.addressof(v) for v in values))
        library().ptxsim_seed(ctypes.c_uint64(seed))
        shape = (_triple(grid), _triple(block), cluster, ctypes.c_uint64(shared))
        _check(library().ptxsim_launch(self.handle, kernel.encode(), *shape, pointers))


@contextmanager
def registered(*arrays: np.ndarray, writable: bool = True) -> Iterator[None]:
    """Lets kernels access these arrays only, until the end."""
    for number, array in enumerate(arrays):
        name = f"array {number}".encode()
        library().ptxsim_register(
            ctypes.c_void_p(array.ctypes.data), ctypes.c_uint64(array.nbytes), name, int(writable)
        )
    try:
        yield
    finally:
        for array in arrays:
            library().ptxsim_unregister(ctypes.c_void_p(array.ctypes.data))
