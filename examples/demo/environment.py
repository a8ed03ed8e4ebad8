"""Where a figure comes from: the columns every committed row of results carries."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import torch

import steepest
from steepest.tools.machine import cpu


def environment() -> dict[str, str]:
    """Machine, threads, versions and commit; a commit with a "+" had uncommitted changes."""
    return {
        "cpu": cpu(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "steepest": steepest.__version__,
        "commit": _commit(),
    }


def _commit() -> str:
    folder = Path(__file__).parent
    try:
        head = _git(folder, "rev-parse", "--short", "HEAD")
        return head + ("+" if _git(folder, "status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "none"


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()
