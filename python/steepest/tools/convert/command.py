"""`steepest convert`: reads files, translates and writes one."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from steepest.optimizer.checkpoint_matching import AUTHOR

from .. import files
from . import SOURCES, convert


def add_options(p: argparse.ArgumentParser) -> None:
    """The options of the command."""
    p.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="what torch.save wrote: state_dicts of optimizers"
    )
    p.add_argument("--source", required=True, choices=list(SOURCES), help="whose they are")
    p.add_argument("--out", required=True, type=Path, metavar="FILE", help="for torch.load and load_state_dict")
    p.add_argument("--key", default="", metavar="A.B", help="where in the files the state_dict is (default: all of it)")
    p.add_argument(
        "--names", type=Path, metavar="FILE", help="a name a line for every parameter, in the order of the checkpoints"
    )


def run(options: argparse.Namespace) -> int:
    """Reads, translates and writes; ValueError for files that are not what they should be."""
    names = _names(options.names) if options.names else None
    if not options.out.parent.is_dir() or options.out.is_dir():
        raise ValueError(f"{options.out} cannot be written: pass --out with a file in a folder that is there")
    try:
        converted = convert(options.source, *(_read(path, options.key) for path in options.files), names=names)
    except TypeError as error:
        raise ValueError(str(error)) from error
    _write(options.out, converted)
    rules = [converted[AUTHOR] if group["use_muon"] else "AdamW" for group in converted["param_groups"]]
    sizes = [f"{len(group['params'])} by {rule}" for group, rule in zip(converted["param_groups"], rules, strict=True)]
    print(f"{options.out} written: {', '.join(sizes)}")
    return 0


def _names(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as names, one a line: {error}") from error
    return [line.strip() for line in lines if line.strip()]


def _read(path: Path, key: str) -> Mapping[str, Any]:
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder, as torch.distributed.checkpoint writes them: have it made one file by "
            f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path} FILE"
        )
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # pickle, zip and torch have errors of many kinds for what is none of theirs
        why = (str(error).splitlines() or [""])[0][:_LONGEST]
        raise ValueError(
            f"{path} is no file of torch.save, is cut off, or holds objects of other classes than tensors, numbers and "
            f"containers ({type(error).__name__}: {why}): save the optimizer's state_dict() alone, or pass it to "
            "steepest.tools.convert.convert"
        ) from error
    for part in key.split(".") if key else ():
        if not isinstance(value, Mapping) or part not in value:
            raise ValueError(f"{path} has no {part!r}: pass --key with the place of the optimizer's state_dict")
        value = value[part]
    if not isinstance(value, Mapping):
        raise ValueError(f"{path} holds a {type(value).__name__}, no state_dict: pass --key with its place")
    return value


_LONGEST = 100  # text of another's error


def _write(path: Path, converted: Mapping[str, Any]) -> None:
    """Writes the file as a whole: it may be one of those that were read."""
    try:
        files.replace(path, lambda beside: torch.save(converted, beside))
    except (OSError, RuntimeError) as error:  # torch's file of archives has RuntimeErrors
        raise ValueError(f"{path} cannot be written: {error}") from error
