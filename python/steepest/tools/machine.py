"""What a figure must name: the hardware, the driver, the versions and the commit."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path

import torch

from steepest._version import __version__
from steepest.linalg import polar
from steepest.ops import backend


def machine(device: str = "cpu") -> dict[str, str]:
    """Facts by name, in the order of the columns. The commit is STEEPEST_COMMIT where it is set, else what git says of
    the checkout around the package, else that of the build."""
    cuda = device.startswith("cuda")
    name = torch.cuda.get_device_name() if cuda else f"{cpu()}, {threads()}"
    driver = {"driver": _driver(), "cuda": str(torch.version.cuda), "triton": _triton()} if cuda else {}
    versions = {"torch": torch.__version__, "python": platform.python_version(), "steepest": __version__}
    return {"machine": name, **driver, **versions, "commit": os.environ.get("STEEPEST_COMMIT") or commit()}


def commit(folder: Path | None = None) -> str:
    """The commit of the checkout the package lies in, "+changes" if it has any; else of the build; else "unknown"."""
    git = ["git", "-C", str(folder or Path(__file__).parent)]
    try:
        # A package installed into a checkout of something else is not part of it.
        known = subprocess.check_output([*git, "ls-files", "machine.py"], text=True, stderr=subprocess.DEVNULL)
        if known.strip():
            head = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True).strip()
            changed = subprocess.check_output([*git, "status", "--porcelain"], text=True).strip()
            return head + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        pass
    built = backend.extension.build_info()["commit"] if backend.extension is not None else ""
    return built or "unknown"


def cpu() -> str:
    """The processor's name, what it has for bf16 products, and STEEPEST_CPU_BF16 where that is set."""
    known = _fields(_cpuinfo())
    # /proc/cpuinfo of aarch64 has part numbers, whose names lscpu knows.
    name = known.get("model name") or _fields(_lscpu()).get("model name", "-")
    if name == "-":
        name = platform.processor() or platform.machine()
    features = f"{known.get('flags', '')} {known.get('features', '')}".split()
    bf16 = [f" with {each}" for each in ("amx_bf16", "avx512_bf16", "bf16") if each in features][:1]
    switch = [f", STEEPEST_CPU_BF16={polar.cpu_bf16}"] if polar.cpu_bf16 else []
    return "".join((name, *bf16, *switch))


def threads() -> str:
    """torch's threads, and the clock that goes with one (`timing`)."""
    number = torch.get_num_threads()
    return "1 thread, CPU time" if number == 1 else f"{number} threads"


def machine_class(name: str) -> str | None:
    """What makes ratios comparable between CPUs, of a machine's name: bf16 products and threads. None: of no CPU."""
    used = re.search(r"\d+ threads?\b", name)
    if used is None:
        return None
    bf16 = re.search(r" with (\w+)", name)
    without = bf16 is None or "STEEPEST_CPU_BF16=0" in name
    return f"CPU with {'no bf16' if without or bf16 is None else bf16[1]}, {used[0]}"


def _fields(text: str) -> dict[str, str]:
    """The first value of each key of lines "Key: value", keys in small letters."""
    pairs = [line.partition(":") for line in reversed(text.splitlines())]
    return {key.strip().lower(): value.strip() for key, _, value in pairs}


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def _lscpu() -> str:
    try:
        return subprocess.check_output(
            ["lscpu"], text=True, stderr=subprocess.DEVNULL, env={**os.environ, "LC_ALL": "C"}
        )
    except (OSError, subprocess.CalledProcessError):
        return ""


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.check_output(query, text=True).split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def _triton() -> str:
    try:
        import triton
    except ImportError:
        return "absent"
    return str(triton.__version__)
