"""Lists cut into runs whose work fits into a number of bytes, and how many these are where nobody says it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch

T = TypeVar("T")

#: what a step may borrow at once, on a CPU at most
WORKSPACE = 1 << 30
# Several matrices of GPT-2 124M: with 1 GiB a step takes 1.01 to 1.07 times as long, and ten times the memory.
_OF_A_THREAD = 1 << 25


def default_workspace(device: torch.device, *, shared: bool = False) -> int:
    """What a step on a device may borrow at once, in bytes. shared: matrices of several ranks, which cut them alike.

    A step that torch.compile traces, which the number of threads would cut in two, has no batches.
    """
    if device.type != "cpu" or shared or torch.compiler.is_compiling():
        return WORKSPACE
    return min(WORKSPACE, torch.get_num_threads() * _OF_A_THREAD)


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
