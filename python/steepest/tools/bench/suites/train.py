"""A training run of a GPT on real text: loss against steps and seconds, where a step's time goes, polar slack."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ...compare import text
from ...compare.progress import Progress
from ..case import Job, Row, Settings
from ..training import CPU, FULL, METHODS, QUICK, TINY, Size
from ..training import train as train_all


def train(settings: Settings) -> Iterator[Job]:
    yield Job("train", "GPT", "bfloat16 products" if settings.cuda else "float32", lambda ceilings: _rows(settings))


def _rows(settings: Settings) -> list[Row]:
    size = _size(settings)
    book: Path | None = settings.options.get("text")
    corpus = text.load(book, size.shape.context)
    budget = settings.options.get("budget") or math.inf
    names = settings.options.get("methods") or list(METHODS)
    for name in names:
        if name not in METHODS:
            raise ValueError(f"method {name!r} is not known; choose from {', '.join(METHODS)}")
    progress = Progress(size.steps)
    rows = train_all(
        names,
        {},
        size,
        corpus,
        settings.device,
        toy=not settings.cuda,
        deadline=time.monotonic() + budget,
        report=progress.update,
    )
    return [row | {"text": str(corpus)} for row in rows]


def _size(settings: Settings) -> Size:
    full, quick = (FULL, QUICK) if settings.cuda else (CPU, TINY)
    size = quick if settings.quick else full
    steps = settings.options.get("steps")
    return size if steps is None else replace(size, steps=steps, every=max(1, min(size.every, steps // 4)))
