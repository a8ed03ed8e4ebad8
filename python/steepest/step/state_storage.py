"""State tensors of equal shape in one piece of memory, each parameter's own being a view of it.

A model has thousands of state tensors and a few shapes. In a stack they are as many allocations as there are shapes and
dtypes, and every view begins at a multiple of 128 bytes, as if it had been allocated by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..recipe import State
from ..sharding.local import is_sharded

ALIGNMENT = 128  # bytes


def stack(states: Sequence[State]) -> None:
    """Moves the tensors of these states into stacks, one for each key, shape, strides, dtype and device.

    The dictionaries take the views; values, strides and dtypes stay. Tensors that are not dense in memory, those that
    are alone and DTensors, which torch cannot pickle where they begin within a memory, stay where they are.
    """
    buckets: dict[tuple[str, tuple[object, ...]], list[State]] = {}
    for state in states:
        for key, t in state.items():
            if isinstance(t, Tensor) and not is_sharded(t) and t.numel() and t.layout is torch.strided and _is_dense(t):
                buckets.setdefault((key, (t.shape, t.stride(), t.dtype, t.device)), []).append(state)
    for (key, _), owners in buckets.items():
        if len(owners) > 1:
            _move(key, owners)


def _move(key: str, owners: list[State]) -> None:
    like = owners[0][key]
    unit = max(1, ALIGNMENT // like.itemsize)
    slot = -(-like.numel() // unit) * unit
    memory = torch.zeros(slot * len(owners), dtype=like.dtype, device=like.device)
    for i, state in enumerate(owners):
        view = memory.as_strided(like.shape, like.stride(), i * slot)
        state[key] = view.copy_(state[key])


def _is_dense(t: Tensor) -> bool:
    """Whether the elements fill one range of memory, in whatever order of dimensions."""
    by_stride = sorted(range(t.dim()), key=t.stride, reverse=True)
    return t.permute(by_stride).is_contiguous()
