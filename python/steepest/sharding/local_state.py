"""The state of a sharded parameter as its step sees it: of every DTensor what lies on this rank."""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..state_layout import StateView
from .layout import Sharding
from .local import local_tensor

__all__ = ["LocalState", "as_shard"]


def as_shard(t: Tensor, sharding: Sharding, shape: tuple[int, ...] | None = None) -> Tensor:
    """The DTensor of the parameter's placements whose shard on this rank is t; t itself of a plain parameter.

    shape: of the DTensor; None: the parameter's.
    """
    if sharding.mesh is None:
        return t
    shape = sharding.shape if shape is None else shape
    stride = [1] * len(shape)
    for d in range(len(shape) - 2, -1, -1):
        stride[d] = stride[d + 1] * max(shape[d + 1], 1)
    return DTensor.from_local(
        _at_the_beginning(t),
        sharding.mesh,
        sharding.placements,
        run_check=False,
        shape=torch.Size(shape),
        stride=tuple(stride),
    )


def _at_the_beginning(t: Tensor) -> Tensor:
    """A tensor's memory as the beginning of a storage: async_save's staging takes a DTensor's offset for an address."""
    if not t.storage_offset():
        return t
    memory = t.untyped_storage()[t.storage_offset() * t.itemsize :]
    return torch.empty(0, dtype=t.dtype, device=t.device).set_(memory, 0, t.shape, t.stride())


class LocalState(StateView):
    """A view of the optimizer's dictionary for one parameter, to be used as that.

    Reading gives the local part of a DTensor. What is stored under a key that has a DTensor becomes its local part.
    """

    def __init__(self, state: MutableMapping[str, Tensor], sharding: Sharding) -> None:
        super().__init__(state)
        self._sharding = sharding

    def __getitem__(self, key: str) -> Tensor:
        return local_tensor(self._state[key])

    def __setitem__(self, key: str, value: Tensor) -> None:
        sharded = isinstance(self._state.get(key), DTensor)
        self._state[key] = as_shard(value, self._sharding) if sharded else value
