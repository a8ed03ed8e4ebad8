"""What of a tensor lies on this rank, and all of it, without the import of torch.distributed.tensor."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["is_partial", "is_sharded", "local_tensor", "whole_tensor"]

#: types that are asked no further: an attribute that is not there takes a microsecond to miss
_PLAIN = (Tensor, nn.Parameter)


def is_sharded(t: Tensor) -> bool:
    """Whether a tensor is a DTensor, on whatever mesh."""
    return type(t) not in _PLAIN and hasattr(t, "device_mesh") and hasattr(t, "to_local")


def is_partial(p: Tensor) -> bool:
    """Whether a DTensor has a gradient on its mesh that is a sum of what ranks have."""
    g = p.grad
    if g is None or not is_sharded(p) or not is_sharded(g):
        return False
    if g.device_mesh != p.device_mesh:  # type: ignore[attr-defined]
        return False
    return any(placement.is_partial() for placement in g.placements)  # type: ignore[attr-defined]


def local_tensor(t: Tensor) -> Tensor:
    """The shard of a DTensor, all of another tensor."""
    return t.to_local() if is_sharded(t) else t  # type: ignore[attr-defined,no-any-return]


def whole_tensor(t: Tensor) -> Tensor:
    """All of a DTensor, which its ranks gather together; another tensor itself."""
    if not is_sharded(t):
        return t
    if not t.numel():  # torch gathers (0, n) cut by columns as the columns that are here
        return local_tensor(t).new_empty(t.shape)
    return t.full_tensor()  # type: ignore[attr-defined,no-any-return]
