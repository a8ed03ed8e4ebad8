"""Lists cut into runs whose work fits into a number of bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def chunk_by_bytes(things: Iterable[T], bytes_of: Callable[[T], int], max_bytes: int) -> Iterator[list[T]]:
    """The things in their order, in runs of at most max_bytes; one that is larger goes alone."""
    run: list[T] = []
    used = 0
    for thing in things:
        size = bytes_of(thing)
        if run and used + size > max_bytes:
            yield run
            run, used = [], 0
        run.append(thing)
        used += size
    if run:
        yield run
