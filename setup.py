"""Packaging only: finds torch, nvcc and the architectures, and hands them to CMake.

Nothing here imports torch, so metadata can be had where torch is absent or broken. Environment:

    STEEPEST_CUDA         0 leaves CUDA out, 1 makes a missing nvcc an error; unset: CUDA when nvcc is found
    TORCH_CUDA_ARCH_LIST  architectures as torch writes them, "8.0;9.0a+PTX"
    CUDACXX, CUDA_HOME    where nvcc is (then PATH, then /usr/local/cuda/bin)
    MAX_JOBS, NVCC_THREADS  how many compilations at once, and how many architectures at once in each
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MINIMUM_TORCH = (2, 10)
# Ampere (A100, RTX 30), Ada, Hopper (90a: warpgroup instructions), Blackwell (B200, RTX 50); the newest also as PTX.
DEFAULT_ARCHITECTURES = "8.0;8.6;8.9;9.0a;10.0;12.0+PTX"
# Where the wheels of the build tools say their programs are.
TOOL_FOLDERS = {"cmake": "CMAKE_BIN_DIR", "ninja": "BIN_DIR"}
# What CMake reads once, when it first configures a folder, and what it takes anew every time.
CACHED_ENVIRONMENT = ("CXX", "CXXFLAGS", "CUDAFLAGS", "CUDAHOSTCXX", "LDFLAGS")
TAKEN_ANEW = ("STEEPEST_VERSION", "STEEPEST_COMMIT", "STEEPEST_NVCC_THREADS")


def read_version(path: Path) -> str:
    """The value of `__version__ = "..."` in a Python file, read as text."""
    match = re.search(r"""^__version__[^=\n]*=\s*['"]([^'"]+)['"]""", path.read_text(), re.MULTILINE)
    if match is None:
        raise RuntimeError(f"{path} holds no line __version__ = '...'")
    return match.group(1)


def package_folder(name: str) -> Path | None:
    """Where an installed package lies, without importing it."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def find_torch() -> tuple[Path, str]:
    """torch's folder and version; an error that says what to install when it is absent or too old."""
    folder = package_folder("torch")
    if folder is None:
        raise RuntimeError(
            "steepest needs torch's headers to compile, and this Python has no torch: "
            "install torch>=2.10 first, then `pip install --no-build-isolation .`"
        )
    version = read_version(folder / "version.py")
    if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM_TORCH:
        raise RuntimeError(f"steepest needs torch>=2.10 and found {version} in {folder}: upgrade torch")
    return folder, version


def find_cutlass() -> Path | None:
    """CUTLASS headers from the `nvidia-cutlass` wheel, when it is installed."""
    folder = package_folder("cutlass_library")
    include = folder / "source" / "include" if folder is not None else None
    return include if include is not None and (include / "cutlass" / "version.h").exists() else None


def find_nvcc(environ: dict[str, str], root: Path = Path("/")) -> str | None:
    """nvcc through CUDACXX, CUDA_HOME (or CUDA_PATH), PATH and root/usr/local/cuda; None leaves CUDA out."""
    wish = environ.get("STEEPEST_CUDA", "")
    if wish not in ("", "0", "1"):
        raise RuntimeError(
            f"STEEPEST_CUDA={wish!r}: 0 leaves CUDA out, 1 makes a missing nvcc an error, unset is automatic"
        )
    if wish == "0":
        return None
    homes = [environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)]
    at_home, usual = [os.path.join(home, "bin", "nvcc") for home in homes], root / "usr/local/cuda/bin/nvcc"
    candidates = [environ.get("CUDACXX", ""), *at_home, "nvcc", str(usual)]
    found = next((path for name in candidates if name and (path := shutil.which(name, path=environ.get("PATH")))), None)
    if found is None and wish == "1":
        raise RuntimeError(
            "STEEPEST_CUDA=1 asks for the CUDA kernels, but nvcc is not at CUDACXX, in CUDA_HOME/bin, on PATH or in "
            "/usr/local/cuda/bin: install the CUDA toolkit, or unset STEEPEST_CUDA to build without them"
        )
    return found


def parse_architectures(text: str) -> list[str]:
    """torch's architecture list ("8.0;9.0a+PTX", spaces or semicolons) as ["sm_80", "sm_90a", "compute_90a"]."""
    real, virtual = [], []
    for item in re.split(r"[;,\s]+", text.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", item)
        if match is None:
            raise RuntimeError(
                f"TORCH_CUDA_ARCH_LIST: {item!r} is not an architecture; write it as 8.0, 9.0a or 12.0+PTX"
            )
        number = "".join(match.group(1, 2, 3))
        real.append(f"sm_{number}")
        if match.group(4):
            virtual.append(f"compute_{number}")
    return real + virtual


def supported(architectures: list[str], nvcc: str) -> list[str]:
    """The default list less what this nvcc does not know; the newest that is left is kept as PTX too."""
    known = set(subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split())
    # nvcc lists sm_90 and not its variant sm_90a.
    kept = [name for name in architectures if name.startswith("sm_") and name.rstrip("af") in known]
    if not kept:
        raise RuntimeError(
            f"{nvcc} knows none of {architectures}: set TORCH_CUDA_ARCH_LIST to what it knows, {sorted(known)}"
        )
    # PTX of compute_90a runs on 9.0 alone; without the suffix the driver can compile it for what comes after.
    return [*kept, kept[-1].replace("sm_", "compute_").rstrip("af")]


def architectures(nvcc: str, environ: dict[str, str]) -> list[str]:
    """What to compile for: the user's list as it stands, or the default as far as nvcc knows it."""
    if environ.get("TORCH_CUDA_ARCH_LIST"):
        return parse_architectures(environ["TORCH_CUDA_ARCH_LIST"])
    return supported(parse_architectures(DEFAULT_ARCHITECTURES), nvcc)


def find_tool(name: str) -> str:
    """A build tool from its installed package, PATH, or this Python's scripts folder (of a venv not activated)."""
    try:
        # First: under pip's build isolation it is the package that was asked for; PATH may hold an older program.
        folder = getattr(importlib.import_module(name), TOOL_FOLDERS[name], "")
    except ImportError:
        folder = ""
    search = [folder, *os.environ.get("PATH", "").split(os.pathsep), sysconfig.get_path("scripts")]
    found = shutil.which(name, path=os.pathsep.join(filter(None, search)))
    if found is None:
        raise RuntimeError(f"building steepest needs {name}: `pip install {name}`")
    return found


def require_compiler() -> None:
    """A sentence instead of a page of CMake when there is no C++ compiler."""
    names = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if not any(shutil.which(name) for name in names):
        raise RuntimeError(
            f"building steepest needs a C++17 compiler and none of {names} is on PATH: install g++ or clang, or set "
            "CXX. The pure Python part also runs from the source tree: PYTHONPATH=python"
        )


def commit() -> str:
    """The commit being built, or an empty string outside a git checkout of our own."""
    if not (ROOT / ".git").exists():
        return ""  # git would answer with the checkout around an unpacked archive
    command = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "--verify", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def build_folder(values: dict[str, str], environ: dict[str, str]) -> Path:
    """Where CMake builds with these variables: another compiler, torch or source folder gets a folder of its own.

    CMake keeps the first compiler it finds in a folder's cache and refuses a cache of another source folder.
    """
    kept = {name: value for name, value in values.items() if name not in TAKEN_ANEW}
    cached = {name: environ.get(name, "") for name in CACHED_ENVIRONMENT}
    digest = hashlib.sha256(repr((str(ROOT), sorted(kept.items()), sorted(cached.items()))).encode()).hexdigest()
    # Kept in the source tree, not in pip's temporary folder, so that a second build is incremental.
    return ROOT / "build" / f"{sys.implementation.cache_tag}-{digest[:8]}"


class CMakeBuild(build_ext):
    """Builds `steepest._C` with CMake and ninja where setuptools wants it (beside the sources when editable)."""

    def build_extension(self, ext: Extension) -> None:
        require_compiler()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        cmake, values = find_tool("cmake"), self.values()
        build = build_folder(values, dict(os.environ))
        options = [f"-D{name}={value}" for name, value in values.items()]
        subprocess.run([cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *options], check=True)
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        subprocess.run([cmake, "--build", str(build), *jobs], check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # never written over: a running process may have it mapped
        shutil.copy2(build / target.name, target)

    def values(self) -> dict[str, str]:
        """Everything CMake is told, as cache variables."""
        import pybind11

        torch, torch_version = find_torch()
        nvcc = find_nvcc(dict(os.environ))
        values = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": find_tool("ninja"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "STEEPEST_VERSION": read_version(ROOT / "python" / "steepest" / "_version.py"),
            "STEEPEST_COMMIT": commit(),
            "STEEPEST_TORCH": str(torch),
            "STEEPEST_TORCH_VERSION": torch_version,
            "STEEPEST_CUTLASS": str(find_cutlass() or ""),
            "STEEPEST_ARCHITECTURES": ";".join(architectures(nvcc, dict(os.environ))) if nvcc else "",
            "STEEPEST_NVCC_THREADS": os.environ.get("NVCC_THREADS", "1"),
        }
        if nvcc:
            values["CMAKE_CUDA_COMPILER"] = nvcc
        return values


if __name__ == "__main__":
    setup(
        version=read_version(ROOT / "python" / "steepest" / "_version.py"),
        packages=[*find_packages("python"), "steepest.kernels"],
        package_dir={"": "python", "steepest.kernels": "kernels"},
        package_data={"steepest": ["py.typed"]},
        ext_modules=[Extension("steepest._C", sources=[])],
        cmdclass={"build_ext": CMakeBuild},
        zip_safe=False,
    )
