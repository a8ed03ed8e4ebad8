"""Where a figure comes from: the columns every committed row of results carries."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import torch

import steepest


def environment() -> dict[str, str]:
    """Machine, threads, versions and commit; a commit with a "+" had uncommitted changes."""
    return {
        "cpu": _cpu(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "steepest": steepest.__version__,
        "commit": _commit(),
    }


def _cpu() -> str:
    """The processor's name where Linux tells it, and what it has that a bf16 product needs."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    facts = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    names = {key.strip(): value.strip() for key, value in facts.items()}
    bf16 = " with avx512_bf16" if "avx512_bf16" in names.get("flags", "") else ""
    return names.get("model name", platform.machine()) + bf16


def _commit() -> str:
    folder = Path(__file__).parent
    try:
        head = _git(folder, "rev-parse", "--short", "HEAD")
        return head + ("+" if _git(folder, "status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "none"


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()
