"""The simulator of PTX as a Python module: compiled from C++ when first needed, called by ctypes."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sysconfig
from functools import cache
from pathlib import Path

SOURCES = Path(__file__).parent / "simulator"
FLAGS = ["-std=c++20", "-O2", "-g1", "-fPIC", "-fnon-call-exceptions", "-Wall", "-Wextra"]
if platform.machine() == "x86_64":
    FLAGS += ["-mavx2", "-mfma", "-mf16c"]
BUILD = Path(os.environ.get("STEEPEST_TEST_CACHE", Path(__file__).parents[2] / "build")) / "ptx"


def objects(compiler: str = "g++", cuda: Path | None = None) -> list[Path]:
    """The simulator's object files, compiled where their sources changed; with the CUDA runtime's stand-in if `cuda` is a toolkit."""
    headers = b"".join(p.read_bytes() for p in sorted(SOURCES.glob("*.h")))
    BUILD.mkdir(parents=True, exist_ok=True)
    out = []
    for source in sorted(SOURCES.glob("*.cpp")):
        if source.name == "cuda_runtime.cpp" and cuda is None:
            continue
        flags = [*FLAGS, *(["-isystem", str(cuda / "include")] if cuda else [])]
        key = hashlib.sha256(headers + source.read_bytes() + " ".join([compiler, *flags]).encode()).hexdigest()[:16]
        target = BUILD / f"{source.stem}-{key}.o"
        if not target.exists():
            partial = target.with_suffix(f".{os.getpid()}.o")
            subprocess.run([compiler, *flags, "-c", str(source), "-o", str(partial)], check=True)
            partial.rename(target)
        out.append(target)
    return out


@cache
def library() -> ctypes.CDLL:
    """The simulator without a CUDA runtime: for PTX from text."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or sysconfig.get_config_var("CXX").split()[0]
    parts = objects(compiler)
    key = hashlib.sha256(" ".join(p.name for p in parts).encode()).hexdigest()[:16]
    target = BUILD / f"libptxsim-{key}.so"
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}.so")
        subprocess.run([compiler, "-shared", "-o", str(partial), *map(str, parts)], check=True)
        partial.rename(target)
    return ctypes.CDLL(str(target))
