"""Packaging only: finds torch, nvcc and the architectures, and hands them to CMake.

Nothing here imports torch, so metadata can be had where torch is absent or broken. Environment:

    STEEPEST_CUDA         0 leaves CUDA out. 1 builds for all architectures, and a missing nvcc is an error. local
                          builds for the GPUs of this machine, without CUDA where there is none. Unset: CUDA when nvcc
                          is found, for the GPUs of this machine, or for all architectures where there is none
    TORCH_CUDA_ARCH_LIST  instead of "all architectures" (and when unset), as torch writes them, "8.0;9.0a+PTX"
    STEEPEST_LOCAL_VERSION  what tells wheels of one version apart, "cu130"
    CUDACXX, CUDA_HOME    where nvcc is (then PATH, then /usr/local/cuda/bin)
    MAX_JOBS, NVCC_THREADS  how many compilations at once, and how many architectures at once in each
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import setuptools

# First: an older one has no bdist_wheel, or cannot read pyproject.toml, and a venv of Python 3.11 brings 65.
if int(setuptools.__version__.split(".")[0]) < 77:
    raise RuntimeError(
        f"steepest needs setuptools>=77 to build and found {setuptools.__version__}: `pip install 'setuptools>=77'`"
    )

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
MINIMUM_TORCH = (2, 10)
# Ampere (A100, RTX 30), Ada, Hopper (90a: warpgroup instructions), Blackwell (B200, RTX 50); the newest also as PTX.
DEFAULT_ARCHITECTURES = "8.0;8.6;8.9;9.0a;10.0;12.0+PTX"
OLDEST_DEVICE = 8.0
DEVELOPERS_MODULE = "steepest._C"
# Of one core, about: host code, each architecture, the products for Hopper.
HOST_SECONDS, ARCHITECTURE_SECONDS, HOPPER_SECONDS = 30, 30, 200
# Where the wheels of the build tools say their programs are.
TOOL_FOLDERS = {"cmake": "CMAKE_BIN_DIR", "ninja": "BIN_DIR"}
# What CMake reads once, when it first configures a folder, and what it takes anew every time.
CACHED_ENVIRONMENT = ("CXX", "CXXFLAGS", "CUDAFLAGS", "CUDAHOSTCXX", "LDFLAGS")
TAKEN_ANEW = ("STEEPEST_VERSION", "STEEPEST_COMMIT", "STEEPEST_NVCC_THREADS", "pybind11_DIR")


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


def asked(environ: Mapping[str, str]) -> str:
    """STEEPEST_CUDA, which must be one of its values; empty where it is unset."""
    wish = environ.get("STEEPEST_CUDA", "")
    if wish not in ("", "0", "1", "local"):
        raise RuntimeError(
            f"STEEPEST_CUDA={wish!r}: 0 leaves CUDA out, 1 builds for all architectures and makes a missing nvcc an "
            "error, local builds for the GPUs of this machine, unset is automatic"
        )
    return wish


def asked_jobs(environ: Mapping[str, str]) -> str:
    """MAX_JOBS, which must be a number from 1 on; empty where it is unset."""
    jobs = environ.get("MAX_JOBS", "")
    if jobs and not re.fullmatch("0*[1-9][0-9]*", jobs):
        raise RuntimeError(f"MAX_JOBS={jobs!r}: a number of compilations at once, 1 or more, or unset for every core")
    return jobs


def asked_threads(environ: Mapping[str, str]) -> str:
    """NVCC_THREADS, a number; 1 where it is unset."""
    threads = environ.get("NVCC_THREADS") or "1"
    if not re.fullmatch("[0-9]+", threads):
        raise RuntimeError(
            f"NVCC_THREADS={threads!r}: a number of architectures that nvcc compiles at once, 0 for one on every core, "
            "or unset for one alone"
        )
    return threads


def find_devices(environ: Mapping[str, str]) -> list[str]:
    """Compute capabilities, "9.0", of the GPUs here that the kernels run on, as the driver's nvidia-smi tells them."""
    program = shutil.which("nvidia-smi", path=environ.get("PATH"))
    if program is None:
        return []
    command = [program, "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    capabilities = set(re.findall(r"^\d+\.\d$", answer, re.MULTILINE))
    return sorted((each for each in capabilities if float(each) >= OLDEST_DEVICE), key=float)


def stale_home(environ: Mapping[str, str]) -> str:
    """What to say of a CUDA_HOME (or CUDA_PATH) that leads to no nvcc; empty where none is set, or asked."""
    name = next((name for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)), None)
    if name is None or environ.get("CUDACXX") or shutil.which(os.path.join(environ[name], "bin", "nvcc")):
        return ""
    return f"{name}={environ[name]!r} has no bin/nvcc"


def find_nvcc(environ: Mapping[str, str], root: Path = Path("/"), *, required: bool = False) -> str | None:
    """nvcc through CUDACXX, CUDA_HOME (or CUDA_PATH), PATH and root/usr/local/cuda; None, or an error where it is
    required, if it is at none of them. Where it is required it has to be in a CUDA_HOME that is set."""
    homes = [environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)]
    at_home, usual = [os.path.join(home, "bin", "nvcc") for home in homes], root / "usr/local/cuda/bin/nvcc"
    named = environ.get("CUDACXX", "")
    if named and not shutil.which(named, path=environ.get("PATH")):
        raise RuntimeError(f"CUDACXX={named!r} is no program: set it to nvcc's path, or unset it to look for nvcc")
    if required and (stale := stale_home(environ)):
        raise RuntimeError(
            f"STEEPEST_CUDA=1 asks for the CUDA kernels, but {stale}: set it to the folder of a CUDA toolkit, or unset "
            "it to look for nvcc on PATH and in /usr/local/cuda/bin"
        )
    candidates = [named, *at_home, "nvcc", str(usual)]
    found = next((path for name in candidates if name and (path := shutil.which(name, path=environ.get("PATH")))), None)
    if found is None and required:
        raise RuntimeError(
            "STEEPEST_CUDA=1 asks for the CUDA kernels, but nvcc is not at CUDACXX, in CUDA_HOME/bin, on PATH or in "
            "/usr/local/cuda/bin: install the CUDA toolkit, or unset STEEPEST_CUDA to build without them"
        )
    return found


def parse_architectures(text: str) -> list[str]:
    """torch's architecture list ("8.0;9.0a+PTX", spaces or semicolons) as ["sm_80", "sm_90a", "compute_90a"]."""
    real, virtual = [], []
    for item in re.findall(r"[^;,\s]+", text):
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


def unknown(architectures: list[str], nvcc: str) -> list[str]:
    """Those of a list that this nvcc does not know."""
    done = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(
            f"{nvcc} --list-gpu-code ends with {done.returncode} ({done.stderr.strip()}): set CUDACXX to an nvcc that "
            "works, or STEEPEST_CUDA=0 to build without CUDA"
        )
    known = done.stdout.split()
    # nvcc lists sm_90 and not its variant sm_90a.
    return [name for name in architectures if name.replace("compute_", "sm_").rstrip("af") not in known]


def supported(architectures: list[str], nvcc: str) -> list[str]:
    """Those of a list that this nvcc knows; the newest of them is kept as PTX too."""
    strange = unknown(architectures, nvcc)
    kept = [name for name in architectures if name.startswith("sm_") and name not in strange]
    # PTX of compute_90a runs on 9.0 alone; without the suffix the driver can compile it for what comes after.
    return [*kept, kept[-1].replace("sm_", "compute_").rstrip("af")] if kept else []


class Build(NamedTuple):
    """What is built, and why."""

    nvcc: str | None  # None: without CUDA
    architectures: list[str]
    cutlass: Path | None  # its headers, where they are of use
    why: str

    @property
    def hopper(self) -> bool:
        """Whether the products for Hopper are among it."""
        return self.cutlass is not None and "sm_90a" in self.architectures

    @property
    def warning(self) -> str | None:
        """What a Hopper GPU misses."""
        if self.hopper or not any(name.startswith("sm_90") for name in self.architectures):
            return None
        return (
            "no CUTLASS headers: a Hopper GPU (H100, H200) gets the slower route: products one by one, in "
            "Triton. For the fast one: `pip install --no-deps nvidia-cutlass`, then build again"
        )

    def __str__(self) -> str:
        """A line for a person: what is built, why, and about how long it takes."""
        kinds = f"for {', '.join(self.architectures)}" if self.nvcc else "without CUDA"
        hopper = ", with the products for Hopper" if self.hopper else ""
        return f"compiling {kinds}{hopper} ({self.why}): about {self.minutes()}"

    def minutes(self) -> str:
        """A guess, in round numbers."""
        jobs = int(asked_jobs(os.environ) or os.cpu_count() or 1)
        real = sum(name.startswith("sm_") for name in self.architectures)
        seconds = HOST_SECONDS / min(jobs, 8)
        if self.nvcc:
            seconds += ARCHITECTURE_SECONDS * real / min(jobs, 4)
        if self.hopper:
            seconds += HOPPER_SECONDS / min(jobs, 4)
        return f"{10 * math.ceil(seconds / 10)} seconds" if seconds < 100 else f"{math.ceil(seconds / 60)} minutes"


def decide(environ: Mapping[str, str] = os.environ, root: Path = Path("/")) -> Build:
    """What to build, by what is asked for and what this machine has."""
    wish = asked(environ)
    if wish == "0":
        return Build(None, [], None, "STEEPEST_CUDA=0")
    devices = find_devices(environ) if wish != "1" else []
    if wish == "local" and not devices:
        return Build(
            None,
            [],
            None,
            f"no GPU of compute capability {OLDEST_DEVICE} or newer here; STEEPEST_CUDA=1 builds for all",
        )
    nvcc, cutlass = find_nvcc(environ, root, required=wish == "1"), find_cutlass()
    stale = f"; {stale}" if (stale := stale_home(environ)) else ""
    if nvcc is None:
        return Build(None, [], None, f"no nvcc{stale}; a GPU runs the Triton kernels")
    listed = "" if wish == "local" else environ.get("TORCH_CUDA_ARCH_LIST", "")
    if every := parse_architectures(listed):
        # Images with torch preset it to all that torch takes.
        names = [name for name in every if int(re.sub(r"\D", "", name)) >= 10 * OLDEST_DEVICE]
        if not names:
            raise RuntimeError(f"TORCH_CUDA_ARCH_LIST={listed!r}: the kernels are for {OLDEST_DEVICE} and newer")
        if strange := unknown(names, nvcc):
            raise RuntimeError(
                f"TORCH_CUDA_ARCH_LIST={listed!r}: {nvcc} does not know {', '.join(strange)}: leave them out, or set "
                "CUDACXX to an nvcc that does"
            )
        why = "TORCH_CUDA_ARCH_LIST" + (f" from {OLDEST_DEVICE} on" if len(names) < len(every) else "")
    elif devices and (names := supported(parse_architectures(";".join(devices)), nvcc)):
        why = "this machine's GPU"
    elif names := supported(parse_architectures(DEFAULT_ARCHITECTURES), nvcc):
        why = "all architectures"
    else:
        raise RuntimeError(f"{nvcc} knows none of {DEFAULT_ARCHITECTURES}: set TORCH_CUDA_ARCH_LIST to what it knows")
    taken = f"{stale}, {nvcc} is taken" if stale else ""
    return Build(nvcc, with_hopper(names) if cutlass else names, cutlass, why + taken)


def with_hopper(names: list[str]) -> list[str]:
    """The same devices, for which 9.0 is compiled as 9.0a.

    Code for sm_90a runs wherever code for sm_90 does, on compute capability 9.0, and the products for Hopper need it.
    """
    return list(dict.fromkeys("sm_90a" if name == "sm_90" else name for name in names))


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
    named = os.environ.get("CXX")
    names = named.split()[:1] or [named] if named else ["c++", "g++", "clang++"]
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


def build_folder(values: dict[str, str], environ: Mapping[str, str]) -> Path:
    """Where CMake builds with these variables: another compiler, torch or source folder gets a folder of its own.

    CMake keeps the first compiler it finds in a folder's cache and refuses a cache of another source folder.
    """
    kept = {name: value for name, value in values.items() if name not in TAKEN_ANEW}
    cached = {name: environ.get(name, "") for name in CACHED_ENVIRONMENT}
    digest = hashlib.sha256(repr((str(ROOT), sorted(kept.items()), sorted(cached.items()))).encode()).hexdigest()
    # Kept in the source tree, not in pip's temporary folder, so that a second build is incremental.
    return ROOT / "build" / f"{sys.implementation.cache_tag}-{digest[:8]}"


class CMakeBuild(build_ext):
    """Builds libsteepest.so, and `steepest._C` beside the sources, with CMake and ninja.

    A wheel holds the library alone, which no Python symbol ties to one version of it.
    """

    def run(self) -> None:
        if not self.inplace:
            self.extensions = [ext for ext in self.extensions if ext.name != DEVELOPERS_MODULE]
        super().run()

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.endswith("libsteepest"):
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        require_compiler()
        decided = decide()
        print(f"steepest: {decided}", file=sys.stderr, flush=True)  # pip shows it with -v, and if the build fails
        if decided.warning:
            warnings.warn(decided.warning, stacklevel=2)  # pip shows it from 26.3 on
        values = self.values(decided)
        cmake, build = find_tool("cmake"), build_folder(values, os.environ)
        options = [f"-D{name}={value}" for name, value in values.items()]
        subprocess.run([cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *options], check=True)
        jobs = asked_jobs(os.environ)
        subprocess.run([cmake, "--build", str(build), *(["-j", jobs] if jobs else [])], check=True)
        for ext in self.extensions:
            target = Path(self.get_ext_fullpath(ext.name)).resolve()
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)  # never written over: a running process may have it mapped
            shutil.copy2(build / target.name, target)

    def copy_extensions_to_source(self) -> None:
        for ext in self.extensions:
            inplace, _ = self._get_inplace_equivalent(self.get_finalized_command("build_py"), ext)
            Path(inplace).unlink(missing_ok=True)
        super().copy_extensions_to_source()

    def values(self, decided: Build) -> dict[str, str]:
        """Everything CMake is told, as cache variables."""
        torch, torch_version = find_torch()
        values = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": find_tool("ninja"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": "",
            "STEEPEST_VERSION": read_version(ROOT / "python" / "steepest" / "_version.py"),
            "STEEPEST_COMMIT": commit(),
            "STEEPEST_TORCH": str(torch),
            "STEEPEST_TORCH_VERSION": torch_version,
            "STEEPEST_CUTLASS": str(decided.cutlass or ""),
            "STEEPEST_ARCHITECTURES": ";".join(decided.architectures),
            "STEEPEST_NVCC_THREADS": asked_threads(os.environ),
        }
        if decided.nvcc:
            values["CMAKE_CUDA_COMPILER"] = decided.nvcc
        if any(ext.name == DEVELOPERS_MODULE for ext in self.extensions):
            import pybind11

            values["pybind11_DIR"] = pybind11.get_cmake_dir()
        return values


class Sources(build_py):
    """Python files; a wheel has none of the modules that are in setuptools' folder since an earlier one."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "steepest", ignore_errors=True)
        super().run()


class Wheel(bdist_wheel):
    """Of any Python: the library is loaded by ctypes."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class Archive(sdist):
    """Of the sources that MANIFEST.in names; setuptools would add its notes, and what these say an older one had."""

    def run(self) -> None:
        for listing in ROOT.glob("python/*.egg-info/SOURCES.txt"):
            listing.unlink()
        super().run()

    def make_distribution(self) -> None:
        self.filelist.files = [name for name in self.filelist.files if ".egg-info" not in name]
        super().make_distribution()


def long_description(text: str, project: str, version: str) -> str:
    """README.md for a page that has no folder around it.

    Links and pictures lead to the files of this version where `project`, pyproject.toml, says in its urls where the
    sources are. Otherwise a link is its words, and a picture is left out.
    """
    match = re.search(r"""^Source = ['"]([^'"]+?)/?['"]$""", project, re.MULTILINE)
    home = match and match[1]

    def absolute(link: re.Match[str]) -> str:
        picture, words, path = link.groups()
        if home:
            return f"{picture}[{words}]({home}/{'raw' if picture else 'blob'}/v{version}/{path})"
        return "" if picture else words

    return re.sub(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)]+)\)", absolute, text)


def version() -> str:
    """The package's, with a local part (PEP 440) where builds of it differ.

    STEEPEST_LOCAL_VERSION, and no.cutlass where a Hopper GPU would miss its products: of all that a build says, every
    pip shows the version. An archive of the sources has the package's, and pip refuses a build of one that it chose by
    its version and that says another.
    """
    public = read_version(ROOT / "python" / "steepest" / "_version.py")
    if "sdist" in sys.argv:
        return public
    unpacked = (ROOT / "PKG-INFO").exists()
    named = os.environ.get("STEEPEST_LOCAL_VERSION", "")
    if named and not re.fullmatch("[A-Za-z0-9]+([._-][A-Za-z0-9]+)*", named):
        raise RuntimeError(f"STEEPEST_LOCAL_VERSION={named!r}: letters and digits, in parts between dots, as in cu130")
    local = [named, None if unpacked or not decide().warning else "no.cutlass"]
    return "+".join(filter(None, [public, ".".join(filter(None, local))]))


if __name__ == "__main__":
    # About folders named as the package, of which there is none here; pip would show it at every make.
    warnings.filterwarnings("ignore", message="(?s).*Editable installation")
    setup(
        version=version(),
        long_description=long_description(
            (ROOT / "README.md").read_text(encoding="utf-8"),
            (ROOT / "pyproject.toml").read_text(encoding="utf-8"),
            read_version(ROOT / "python" / "steepest" / "_version.py"),
        ),
        long_description_content_type="text/markdown",
        packages=[*find_packages("python"), "steepest.kernels"],
        package_dir={"": "python", "steepest.kernels": "kernels"},
        package_data={"steepest": ["py.typed"]},
        ext_modules=[Extension("steepest.libsteepest", sources=[]), Extension(DEVELOPERS_MODULE, sources=[])],
        cmdclass={"build_ext": CMakeBuild, "build_py": Sources, "bdist_wheel": Wheel, "sdist": Archive},
        zip_safe=False,
    )
