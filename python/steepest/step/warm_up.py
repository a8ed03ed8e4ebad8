"""Directions are tried out when a plan is made, so that no step is the first to meet a kernel."""

from __future__ import annotations

import torch

from ..ops import selfcheck
from ..ops.backend import prepare
from ..ops.polar_chain import Update
from ..parts import Direction

__all__ = ["warm_up"]

_warm: set[tuple[object, ...]] = set()


def warm_up(
    direction: Direction,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    weights: torch.dtype | None = None,
) -> None:
    """Takes the direction of a zero matrix on a GPU, once for every shape; of one that waits for the device its kernels
    are checked alone.

    Whatever its kernels meet for the first time, they meet here: their self-check, their compilation, a launch that
    fails. weights: the dtype of those that the direction moves itself.
    """
    key = (direction, shape, dtype, device, weights)
    if device.type != "cuda" or not (direction.batched and selfcheck.enabled) or key in _warm:
        return
    if not direction.capturable(dtype, device):
        prepare(direction.families, device)
        return
    x = torch.zeros(1, *shape, dtype=dtype, device=device)
    slack = torch.empty(1, dtype=torch.float32, device=device)
    if weights is None:
        direction.units([x], [slack])
    else:
        eta = torch.zeros(1, dtype=torch.float32, device=device)
        direction.move([x], [slack], [Update([torch.zeros(shape, dtype=weights, device=device)], eta, eta + 1)])
    _warm.add(key)
