"""State tensors of equal shape in one piece of memory, each parameter's own being a view of it.

A model has thousands of state tensors and a few shapes. In a stack they are as many allocations as there are shapes and
dtypes, and every view begins at a multiple of 128 bytes, as if it had been allocated by itself.

Memory of some megabytes on a CPU is asked to lie in huge pages, which Linux grants by itself only where a process asks
(`transparent_hugepage=madvise`, its default): an elementwise step reads as fast as a core walks through page tables.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.backend import extension
from ..recipe import State
from ..sharding.local import is_sharded

ALIGNMENT = 128  # bytes
LARGE = 4 << 20  # bytes in which there is a whole huge page, wherever they begin


def stack(states: Sequence[State]) -> None:
    """Moves the tensors of these states into stacks, one for each key, shape, strides, dtype and device.

    The dictionaries take the views; values, strides and dtypes stay. Tensors that are not dense in memory, those that
    are alone and not large, and DTensors, which torch cannot pickle where they begin within a memory, stay where they
    are.
    """
    buckets: dict[tuple[str, tuple[object, ...]], list[State]] = {}
    for state in states:
        for key, t in state.items():
            if isinstance(t, Tensor) and not is_sharded(t) and t.numel() and t.layout is torch.strided and _is_dense(t):
                buckets.setdefault((key, (t.shape, t.stride(), t.dtype, t.device)), []).append(state)
    for (key, _), owners in buckets.items():
        if len(owners) > 1 or _gains_by_huge_pages(owners[0][key]):
            _move(key, owners)


def _move(key: str, owners: list[State]) -> None:
    like = owners[0][key]
    unit = max(1, ALIGNMENT // like.itemsize) if len(owners) > 1 else 1
    slot = -(-like.numel() // unit) * unit
    memory = torch.empty(slot * len(owners), dtype=like.dtype, device=like.device)
    if _gains_by_huge_pages(memory) and extension is not None:
        extension.advise_huge_pages(memory.data_ptr(), memory.nbytes)  # before it is written to: then pages are made
    memory.zero_()
    for i, state in enumerate(owners):
        view = memory.as_strided(like.shape, like.stride(), i * slot)
        state[key] = view.copy_(state[key])


def _gains_by_huge_pages(t: Tensor) -> bool:
    return type(t) is Tensor and t.device.type == "cpu" and t.nbytes >= LARGE


def _is_dense(t: Tensor) -> bool:
    """Whether the elements fill one range of memory, in whatever order of dimensions."""
    by_stride = sorted(range(t.dim()), key=t.stride, reverse=True)
    return t.permute(by_stride).is_contiguous()
