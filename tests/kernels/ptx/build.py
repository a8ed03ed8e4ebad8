"""The kernels of csrc as PTX, with the product's doors and the simulator in one library that this CPU runs.

`PYTHONPATH=tests/kernels python -m ptx.build` builds it and prints its path. Objects are kept by what they are made of,
in build/ptx-cache or $STEEPEST_PTX_CACHE.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ptx.simulator_library import CACHE, COMPILER, RUNTIME
from ptx.simulator_library import FLAGS as SIMULATOR_FLAGS
from ptx.simulator_library import objects as simulator_objects

ROOT = Path(__file__).parents[3]
CSRC = ROOT / "csrc"
HERE = Path(__file__).parent
DAYS = 14  # that an object nobody asks for is kept

#: Loops that are compiled once more for wider vectors, and products for them; the module for Python lies in no folder.
LEFT_OUT = (
    *("multi_tensor/host_avx2", "multi_tensor/host_avx512"),
    *("cpu_polar/kernels_avx2", "cpu_polar/kernels_avx512", "cpu_polar/kernels_avx512_bf16", "cpu_polar/kernels_amx"),
)
PRODUCTS = "symm_gemm/sm90_"  # for sm_90a alone; the rest is compiled for devices with clusters and for those without

#: What the doors ask of torch, the runtime or the planner and door.cpp answers; see there.
WRAPPED = (
    *("aoti_torch_get_device_type", "aoti_torch_get_device_index", "aoti_torch_create_device_guard"),
    *("aoti_torch_delete_device_guard", "aoti_torch_aten_new_empty", "aoti_torch_aten_new_zeros"),
    *("aoti_torch_library_init_impl", "aoti_torch_delete_tensor_object"),
    *("torch_get_mutable_data_ptr", "torch_get_const_data_ptr"),
    *("__cudaLaunchKernel", "cudaLaunchKernelExC", "cudaFuncSetAttribute"),
    *("cudaGetErrorString", "cudaGetLastError"),
)
#: Functions of the product that door.cpp stands before, by the source that defines or calls them.
RENAMED = {"symm_gemm/plan": "-Dmake_plan=planned", "ops/polar": "-Dpolar_on_device=polar_in_launches"}
# A namespace of its own: another library of this process may hold the real one.
NAMESPACE = "-Dsteepest=steepest_ptx"
# Function-local statics of templates stay this library's.
HOST_FLAGS = ("-std=c++20", "-O1", "-g1", "-fPIC", "-fno-gnu-unique")
DOOR_FLAGS = (*HOST_FLAGS, NAMESPACE, "-DSTEEPEST_HAS_CUDA", "-DSTEEPEST_HAS_HOPPER", f"-I{CSRC}")
NVCC_FLAGS = (
    *("-std=c++17", "-no-compress", "-cudart", "none", NAMESPACE, f"-I{CSRC}"),
    *("-Xcompiler", "-fPIC", "-Xcompiler", "-fno-gnu-unique"),
)
SM90A = ("-gencode", "arch=compute_90a,code=compute_90a")
PORTABLE = ("-gencode", "arch=compute_90,code=compute_90", "-gencode", "arch=compute_80,code=compute_80")


class UnavailableError(Exception):
    """What this machine lacks."""


def _tool(name: str, *elsewhere: str) -> str:
    for candidate in (name, *elsewhere):
        found = shutil.which(candidate)
        if found is not None:
            return found
    raise UnavailableError(f"{name} is not on PATH")


@cache
def nvcc() -> str:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    return _tool(os.environ.get("CUDACXX", "nvcc"), *(f"{home}/bin/nvcc" for home in homes), "/usr/local/cuda/bin/nvcc")


@cache
def cuda_headers() -> Path:
    """The folder of cuda_runtime.h, as nvcc has it."""
    said = subprocess.run([nvcc(), "--dryrun", "-c", "none.cu"], capture_output=True, text=True).stderr
    folders = [Path(each) for each in re.findall(r'-I"?([^"\s]+)', said)]
    for folder in folders:
        if (folder / "cuda_runtime.h").is_file():
            return folder
    raise UnavailableError(f"{nvcc()} names no folder with cuda_runtime.h")


@cache
def cutlass() -> Path:
    """The headers, from the package nvidia-cutlass."""
    spec = importlib.util.find_spec("cutlass_library")
    folder = Path(spec.origin).parent / "source" / "include" if spec is not None and spec.origin is not None else None
    if folder is None or not (folder / "cutlass" / "cutlass.h").is_file():
        raise UnavailableError("the package nvidia-cutlass, which has the headers, is not installed")
    return folder


def check_tools() -> None:
    """Raises UnavailableError with the first thing that is missing."""
    if sys.platform != "linux":
        raise UnavailableError(f"kernels are compiled and run on Linux, not on {sys.platform}")
    _tool(COMPILER)
    cuda_headers()
    cutlass()


@dataclass(frozen=True)
class Job:
    """An object file: the command that makes it, less its output, and the file that it is made of."""

    name: str
    command: Sequence[str]
    source: Path

    @property
    def path(self) -> Path:
        return CACHE / f"{self.name}-{self.key()}.o"

    def key(self) -> str:
        digest = hashlib.sha256(_version(self.command[0]).encode())
        for part in self.command:
            digest.update(part.replace(str(ROOT), "").encode() + b"\0")
        for path in sorted(included(self.source)):
            digest.update(path.read_bytes())
        return digest.hexdigest()[:16]


@cache
def _version(program: str) -> str:
    return subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout


@cache
def included(source: Path) -> frozenset[Path]:
    """The file and every file of this project that it includes; of others their version counts."""
    seen: set[Path] = set()
    waiting = [source]
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        for name in re.findall(r'^\s*#include "([^"]+)"', path.read_text(), re.MULTILINE):
            waiting += [each for each in (path.parent / name, CSRC / name) if each.is_file()]
    return frozenset(seen)


def sources(suffix: str) -> list[str]:
    """What the folders of csrc have, less what is left out, without the suffix."""
    paths = (path.relative_to(CSRC).with_suffix("").as_posix() for path in CSRC.glob(f"*/*{suffix}"))
    return sorted(set(paths) - set(LEFT_OUT))


def jobs() -> list[Job]:
    """Of every object in the library but the simulator's, those that take longest first."""
    import torch

    torch_headers = Path(torch.__file__).parent / "include"
    door = (*DOOR_FLAGS, "-DTORCH_TARGET_VERSION=0x020a000000000000ULL", "-isystem", str(torch_headers))
    door = (*door, f"-DTORCH_{torch.__version__.replace('.', '_').replace('+', '_')}")  # a part of the key
    cuda, made = f"-I{cuda_headers()}", []
    version = re.findall(
        r"#define CUTLASS_(?:MAJOR|MINOR|PATCH) (\d+)", (cutlass() / "cutlass" / "version.h").read_text()
    )
    products = (*NVCC_FLAGS, *SM90A, "-DNDEBUG", "--expt-relaxed-constexpr", f"-DCUTLASS_{'_'.join(version)}")
    kernels = sources(".cu")
    for dtype in ("f16", "bf16"):
        # One source of all products of a type: CUTLASS is read once instead of five times.
        text = "".join(f'#include "{name}.cu"\n' for name in kernels if name.startswith(f"{PRODUCTS}{dtype}_"))
        source = CACHE / f"products_{dtype}.cu"
        if not source.is_file() or source.read_text() != text:
            source.write_text(text)
        made.append(Job(f"products_{dtype}", (nvcc(), *products, "-isystem", str(cutlass())), source))
    for name in sorted(kernels, key=lambda name: -(CSRC / f"{name}.cu").stat().st_size):
        if not name.startswith(PRODUCTS):
            made.append(Job(name.replace("/", "_"), (nvcc(), *NVCC_FLAGS, *PORTABLE), CSRC / f"{name}.cu"))
    made.append(Job("cuda_runtime", (COMPILER, *SIMULATOR_FLAGS, cuda), RUNTIME))
    for name in sources(".cpp"):
        renamed = [RENAMED[name]] if name in RENAMED else []
        made.append(Job(f"host_{name.replace('/', '_')}", (COMPILER, *door, *renamed), CSRC / f"{name}.cpp"))
    made.append(Job("door", (COMPILER, *door, cuda), HERE / "door.cpp"))
    return made


def compile_one(job: Job) -> None:
    path = job.path
    if path.is_file():
        os.utime(path)
        return
    partial = path.with_suffix(f".{os.getpid()}.o")
    done = subprocess.run(
        [*job.command, "-c", str(job.source), "-o", str(partial)], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise RuntimeError(f"{job.source} does not compile:\n{done.stdout}{done.stderr}")
    partial.rename(path)


@contextmanager
def locked() -> Iterator[None]:
    """Of several processes one builds, and the others find what it made."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def link(objects: Sequence[Path]) -> Path:
    import torch

    flags = [f"-Wl,--wrap={name}" for name in WRAPPED]
    # Symbols of this library before those of a CUDA runtime that torch has loaded.
    flags += ["-Wl,-Bsymbolic", "-Wl,--no-as-needed", f"-L{Path(torch.__file__).parent / 'lib'}"]
    flags += ["-ltorch", "-ltorch_cpu", "-lc10", "-ldl"]
    names = " ".join([*(path.name for path in objects), *flags])
    path = CACHE / f"kernels-{hashlib.sha256(names.encode()).hexdigest()[:16]}.so"
    if path.is_file():
        os.utime(path)
        return path
    partial = path.with_suffix(f".{os.getpid()}.so")
    command = [COMPILER, "-shared", "-o", str(partial), *map(str, objects), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the kernels cannot be linked:\n{done.stdout}{done.stderr}")
    partial.rename(path)
    return path


def build() -> Path:
    """Path of the library; a minute and a half on two cores where nothing is in the cache."""
    check_tools()
    with locked():
        todo, simulator = jobs(), simulator_objects()
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            list(pool.map(compile_one, todo))
        # The simulator first: its tables must be ready before kernels register themselves.
        library = link([*simulator, *(job.path for job in todo)])
        for path in CACHE.glob("*-*.*"):
            if time.time() - path.stat().st_mtime > DAYS * 86400:
                path.unlink()
        return library


if __name__ == "__main__":
    begin = time.perf_counter()
    print(f"{build()}\n{time.perf_counter() - begin:.0f} s")
