"""What `steepest tune` chose: the fastest of a table's configurations for a product, by machine, kept in a file.

    {"NVIDIA H200, Triton 3.7.1, sm_90": {"24 x 1024 x 1024 x 4096, symmetric, 16 bits": {"block_m": 128, ...}}}

The file is STEEPEST_CACHE, or steepest/tuned.json in XDG_CACHE_HOME or ~/.cache. It is read once in a process, when a
configuration is first asked for, and written by `write` alone. A file that cannot be read counts as none, which is
logged once. Nothing here knows what a configuration is: whoever asks compares with what it has.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import json
import logging
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger("steepest")

ORPHANED = 3600.0  # seconds after which a file that is still being written is nobody's

Choices = dict[str, dict[str, dict[str, Any]]]  # machine, question, fields of the configuration


def path() -> Path:
    """The file's place, whether it is there or not. OSError where the system knows no home folder."""
    try:
        if folder := os.environ.get("STEEPEST_CACHE"):
            return Path(folder).expanduser()
        home = os.environ.get("XDG_CACHE_HOME")
        return (Path(home) if home else Path("~/.cache").expanduser()) / "steepest" / "tuned.json"
    except RuntimeError as error:  # a user id without a name, as in containers, and no HOME
        raise OSError(f"there is no home folder ({error}): set STEEPEST_CACHE to a file") from error


def read(file: Path) -> Choices:
    """What the file holds, {} without one. ValueError where it is none of ours, OSError where it cannot be read."""
    try:
        record: Choices = json.loads(file.read_bytes())  # of no JSON, and of no text: ValueError
    except FileNotFoundError:
        return {}
    except RecursionError as error:
        raise ValueError("it is nested more deeply than what steepest tune writes") from error
    if not _nested(record, depth=3):
        raise ValueError("it is not what steepest tune writes")
    return record


def _nested(value: Any, depth: int) -> bool:
    return isinstance(value, dict) and (depth == 1 or all(_nested(inner, depth - 1) for inner in value.values()))


def write(file: Path, machine: str, won: Mapping[str, Mapping[str, Any]]) -> None:
    """Adds these to what the file holds, or replaces them; a file that cannot be read is replaced as a whole.

    Whoever reads meanwhile sees the file as it was or as it will be. Of two who write at once the last one counts.
    """
    try:
        record = read(file)
    except ValueError:
        record = {}
    record[machine] = {**record.get(machine, {}), **{question: dict(fields) for question, fields in won.items()}}
    file.parent.mkdir(parents=True, exist_ok=True)
    _sweep(file)
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(descriptor, "w") as stream:
            json.dump(record, stream, indent=2, sort_keys=True)
        os.replace(name, file)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    held.cache_clear()


def _sweep(file: Path) -> None:
    """Removes what writers that were killed have left beside the file, once nobody can be writing it any more."""
    for left in file.parent.glob(f".{glob.escape(file.name)}.*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > ORPHANED:
                left.unlink()


@functools.cache
def held() -> Choices:
    """The file as it was when it was first asked for; {} where there is none, or none that can be read."""
    try:
        file = path()
    except OSError as error:
        note(f"no tuned configurations are looked for: {error}")
        return {}
    try:
        return read(file)
    except (OSError, ValueError) as error:
        note(f"{file} is ignored: {error}; `steepest tune --clear` removes it")
        return {}


def fields(machine: str, question: str) -> dict[str, Any] | None:
    """The fields of the configuration that won, if there is one."""
    return held().get(machine, {}).get(question)


@functools.cache
def note(text: str) -> None:
    """Logs a text once."""
    logger.warning(text)
