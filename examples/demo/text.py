"""Bytes to train on: a file, or the Python standard library's own source; split by blocks and cut into windows.

A text is a sequence of bytes, so the vocabulary is 256 and any file will do.
"""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

VOCABULARY = 256
STANDARD_LIBRARY_LIMIT = 4_000_000  # bytes
VALIDATION_EVERY = 10  # one block in ten is held out
LARGEST_BLOCK = 1 << 16  # bytes
WINDOWS_PER_BLOCK = 4  # a block must hold at least this many windows, or the text is too short


@dataclass(frozen=True)
class Corpus:
    """A text split in two: `train` and `validation` are 1-D uint8 tensors, `source` says where they come from."""

    source: str
    train: Tensor
    validation: Tensor

    def __str__(self) -> str:
        return f"{self.source}: {len(self.train):,} bytes to train on, {len(self.validation):,} held out"


def load(path: Path | None, context: int) -> Corpus:
    """The corpus in the file `path`, or the standard library's source if `path` is None.

    `context` is the number of bytes the model sees; it decides how short a text may be.
    Raises ValueError for a missing, empty or too short file.
    """
    source, data = ("Python standard library", standard_library()) if path is None else (str(path), read(path))
    train, validation = split(data, source, context)
    return Corpus(source, train, validation)


def read(path: Path) -> bytes:
    """The bytes of a text file; ValueError says what is wrong with a path that is none."""
    if not path.exists():
        raise ValueError(f"--text {path}: there is no such file; pass the path of a text file")
    if not path.is_file():
        raise ValueError(f"--text {path}: not a file; pass the path of one text file")
    data = path.read_bytes()
    if not data:
        raise ValueError(f"--text {path}: the file is empty; pass a file with text in it")
    return data


def standard_library(folder: Path | None = None) -> bytes:
    """The top-level modules of Python's standard library in order of their names, cut at STANDARD_LIBRARY_LIMIT."""
    folder = folder or Path(sysconfig.get_paths()["stdlib"])
    data = b"\n".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    if not data:
        raise ValueError(f"no Python source in the standard library's folder {folder}; pass a text with --text FILE")
    return data[:STANDARD_LIBRARY_LIMIT]


def split(data: bytes, source: str, context: int) -> tuple[Tensor, Tensor]:
    """Contiguous blocks, one in VALIDATION_EVERY held out; -> (train, validation), uint8."""
    needed = 2 * VALIDATION_EVERY * WINDOWS_PER_BLOCK * (context + 1)
    if len(data) < needed:
        raise ValueError(f"{source}: {len(data):,} bytes are too few; a context of {context} needs {needed:,} or more")
    blocks = torch.frombuffer(bytearray(data), dtype=torch.uint8).split(
        min(LARGEST_BLOCK, len(data) // (2 * VALIDATION_EVERY))
    )
    held_out = [i % VALIDATION_EVERY == VALIDATION_EVERY // 2 for i in range(len(blocks))]
    train = torch.cat([block for block, out in zip(blocks, held_out, strict=True) if not out])
    validation = torch.cat([block for block, out in zip(blocks, held_out, strict=True) if out])
    return train, validation


def windows(data: Tensor, count: int, context: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` random windows of `data`; -> inputs and next-byte targets, both (count, context) int64."""
    starts = torch.randint(len(data) - context, (count, 1), generator=generator)
    chunk = data[starts + torch.arange(context + 1)].long()
    return chunk[:, :-1], chunk[:, 1:]
