"""Bytes to train on: a file, the Python standard library's own source, or, where that is not there, made-up sentences.

A text is a sequence of bytes, so the vocabulary is 256 and any file will do. It is split by blocks, some of which are
held out, and cut into windows.
"""

from __future__ import annotations

import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

LIMIT = 4_000_000  # bytes
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
    """The corpus in the file `path`; with None the standard library's source, or made-up sentences without one.

    `context` is the number of bytes the model sees; it decides how short a text may be.
    Raises ValueError for a missing, empty or too short file.
    """
    if path is not None:
        source, data = str(path), read(path)
    elif data := standard_library():
        source = "Python standard library"
    else:
        source, data = "made-up sentences", sentences()
    return Corpus(source, *split(data, source, context))


def manual(context: int, folder: Path | None = None) -> Corpus:
    """The English of Python's manual that `help` shows (pydoc_data/topics.py); made-up sentences without it."""
    path = (folder or Path(sysconfig.get_paths()["stdlib"])) / "pydoc_data" / "topics.py"
    source, data = ("Python's manual", path.read_bytes()) if path.is_file() else ("made-up sentences", sentences())
    return Corpus(source, *split(data, source, context))


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
    """The top-level modules of Python's standard library in order of their names, cut at LIMIT; empty without them."""
    folder = folder or Path(sysconfig.get_paths()["stdlib"])
    return b"\n".join(path.read_bytes() for path in sorted(folder.glob("*.py")))[:LIMIT]


def sentences(size: int = 500_000, seed: int = 0) -> bytes:
    """This many bytes of sentences over made-up words, frequent ones short and rare ones long; the same every time."""
    generator = random.Random(seed)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    words = ["".join(generator.choices(syllables, k=1 + rank // 150)) for rank in range(600)]
    weights = [1 / (1 + rank) for rank in range(len(words))]
    text: list[str] = []
    length = 0
    while length < size:
        text.append(" ".join(generator.choices(words, weights, k=generator.randint(4, 14))).capitalize() + ". ")
        length += len(text[-1])
    return "".join(text).encode()[:size]


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
