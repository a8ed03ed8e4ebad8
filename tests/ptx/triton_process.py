"""Processes in which a Triton finds the simulator in the place of the CUDA driver, one for each version of it.

Apart from the tests' own process: another Triton cannot be imported beside the first, and whoever else asks for
libcuda.so.1 must not get this one.
"""

from __future__ import annotations

import ctypes
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

import pytest

from ptx.simulator_library import BUILD, FLAGS, objects

ROOT = Path(__file__).parents[2]
SOURCE = Path(__file__).parent / "cuda_driver.cpp"
OLDEST = "3.6"
#: Where the oldest Triton is; a folder that is named there must have it.
OLDEST_AT = "STEEPEST_OLDEST_TRITON"
VERSIONS = ("installed", OLDEST)


def site(version: str) -> Path | None:
    """The folder to import a Triton from, None for the installed one; skips, or fails, where it is not there."""
    if version == "installed":
        if importlib.util.find_spec("triton") is None:
            pytest.skip("Triton is not installed")
        return None
    named = os.environ.get(OLDEST_AT)
    folder = Path(named) if named else ROOT / "build" / f"triton-{OLDEST}"
    if not (folder / "triton" / "__init__.py").exists():
        (pytest.fail if named else pytest.skip)(
            f"no Triton in {folder}; pip install --target {folder} --no-deps triton=={OLDEST}.0"
        )
    return folder.resolve()


@functools.cache
def stand_in() -> Path:
    """libcuda.so.1, compiled from the simulator and cuda_driver.cpp with the headers that Triton brings."""
    spec = importlib.util.find_spec("triton")
    assert spec is not None
    assert spec.origin is not None
    headers = Path(spec.origin).parent / "backends" / "nvidia" / "include"
    parts = [str(path) for path in objects()]
    command = ["g++", *FLAGS, "-shared", "-I", str(SOURCE.parent / "simulator"), "-isystem", str(headers), str(SOURCE), *parts, "-Wl,-soname,libcuda.so.1"]
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join(command).encode()).hexdigest()[:16]
    target = BUILD / f"driver-{key}" / "libcuda.so.1"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{os.getpid()}.so")
        subprocess.run([*command, "-o", str(partial)], check=True)
        partial.rename(target)
    return target


def prepare(folder: Path | None, libcuda: Path) -> None:
    """In the new process, before anything imports Triton."""
    if folder is not None:
        sys.path.insert(0, str(folder))
    os.environ["TRITON_CACHE_DIR"] = str(BUILD / "triton")
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
