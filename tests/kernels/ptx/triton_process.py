"""Processes in which a Triton finds the simulator in the place of the CUDA driver, one for each version of it.

Apart from the tests' own process: another Triton cannot be imported beside the first, and whoever else asks for
libcuda.so.1 must not get this one.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from ptx.simulator_library import CACHE, FLAGS, objects
from support.requirements import unavailable

ROOT = Path(__file__).parents[3]
SOURCE = Path(__file__).parent / "cuda_driver.cpp"
#: The installed Triton, the oldest that the kernels are for and the newest, which `make test-kernels` puts into build.
VERSIONS = ("installed", "3.6", "3.9")


def site(version: str) -> Path | None:
    """The folder to import a Triton from, None for the installed one."""
    if version == "installed":
        return None
    folder = ROOT / "build" / f"triton-{version}"
    if not (folder / "triton" / "__init__.py").exists():
        unavailable(f"{folder} has no Triton: pip install --target {folder} --no-deps triton=={version}.0")
    return folder


@functools.cache
def stand_in() -> Path:
    """libcuda.so.1, compiled from the simulator and cuda_driver.cpp with the headers that Triton brings."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        unavailable("Triton is not installed")
    headers = Path(spec.origin).parent / "backends" / "nvidia" / "include"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "driver.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several workers one compiles
        parts = [str(path) for path in objects()]
        include = ["-I", str(SOURCE.parent / "simulator"), "-isystem", str(headers)]
        command = ["g++", *FLAGS, "-shared", *include, str(SOURCE), *parts, "-Wl,-soname,libcuda.so.1"]
        key = hashlib.sha256(SOURCE.read_bytes() + " ".join(command).encode()).hexdigest()[:16]
        target = CACHE / f"driver-{key}" / "libcuda.so.1"
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            partial = target.with_suffix(".partial")
            subprocess.run([*command, "-o", str(partial)], check=True)
            partial.rename(target)
    return target


def prepare(folder: Path | None, libcuda: Path) -> None:
    """In the new process, before anything imports Triton."""
    if folder is not None:
        sys.path.insert(0, str(folder))
    os.environ["TRITON_CACHE_DIR"] = str(CACHE / "triton")
    os.environ["TRITON_LIBCUDA_PATH"] = str(libcuda.parent)
    os.environ.pop("TRITON_INTERPRET", None)
    ctypes.CDLL(str(libcuda), mode=ctypes.RTLD_GLOBAL)
    import torch

    torch.set_num_threads(1)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN


@functools.cache
def _process(version: str) -> ProcessPoolExecutor:
    arguments = (site(version), stand_in())
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, mp_context=context, initializer=prepare, initargs=arguments)


def _check(name: str, arguments: tuple[Any, ...]) -> Any:
    from ptx import triton_checks

    return getattr(triton_checks, name)(*arguments)


def run(version: str, check: str, *arguments: Any) -> Any:
    """What a function of triton_checks.py returns, or raises, in the process of a version."""
    try:
        return _process(version).submit(_check, check, arguments).result(timeout=600)
    except BrokenProcessPool:
        _process.cache_clear()
        raise
