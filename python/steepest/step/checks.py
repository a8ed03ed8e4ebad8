"""What a step would stumble over, said before anything is written."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..recipe import CLOCK, Recipe, State
from ..sharding.local import is_sharded, local_tensor

__all__ = ["check_gradient", "check_state", "refuse_capture"]


def check_gradient(optimizer: str, what: str, p: Tensor) -> None:
    """RuntimeError for a gradient that no step takes; what: names the parameter, optimizer: the class."""
    g = p.grad
    assert g is not None
    if torch.is_complex(p) or torch.is_complex(g):
        raise RuntimeError(
            f"{optimizer} does not support complex parameters; found {what}: make it of torch.view_as_real(...), and "
            "take torch.view_as_complex of that where it is used"
        )
    narrow = next((t.dtype for t in (p, g) if not t.is_floating_point() or t.itemsize < 2), None)
    if narrow is not None:
        raise RuntimeError(
            f"{optimizer} steps floating-point parameters of 16 bits or more, and {what} or its gradient is "
            f"{narrow}: keep the weights that are trained in one of those, or the parameter out of the optimizer"
        )
    if g.layout != torch.strided:
        raise RuntimeError(
            f"{optimizer} does not support sparse gradients; found one of {what}: make the layer with sparse=False, or "
            "leave the parameter to torch.optim.SparseAdam"
        )
    if not torch.compiler.is_compiling() and overlaps(p):
        raise RuntimeError(
            f"{what} holds one element at two indices, as an expanded tensor does, and cannot be updated in place: "
            "make the parameter from a clone(), and expand it where it is used"
        )
    if g.device != p.device:
        raise RuntimeError(f"{what} is on {p.device} and its gradient on {g.device}: move one to the other")
    if is_sharded(p) and (not is_sharded(g) or (g.device_mesh, g.placements) != (p.device_mesh, p.placements)):  # type: ignore[attr-defined]
        raise RuntimeError(
            f"{what} lies on {p.device_mesh} as {p.placements} and its gradient as "  # type: ignore[attr-defined]
            f"{getattr(g, 'placements', 'a plain tensor')}: redistribute the gradient to the parameter's placements"
        )
    if g.shape != p.shape:
        raise RuntimeError(f"{what} has a gradient of shape {tuple(g.shape)}: make them equal")


def overlaps(p: Tensor) -> bool:
    """Whether two indices of a tensor may be one place in memory."""
    reach = 1  # of the dimensions so far, from the densest: each must step over all that is below it
    for stride, size in sorted((stride, size) for stride, size in zip(p.stride(), p.shape, strict=True) if size > 1):
        if stride < reach:
            return p.numel() > 0
        reach = stride * (size - 1) + reach
    return False


def check_state(recipe: Recipe, what: str, p: Tensor, state: State, shapes: Mapping[str, torch.Size]) -> None:
    """RuntimeError for state that is of another parameter or lies elsewhere; shapes: what there should be.

    Drops what was kept of a weight's bits where the weight's dtype has changed.
    """
    for key, shape in shapes.items():
        value = state.get(key)
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise RuntimeError(f"{what} has a state {key!r} that is {value!r}: put a tensor there")
        if value.device != (torch.device("cpu") if key == CLOCK else p.device):
            where = "to the host" if key == CLOCK else "too"
            raise RuntimeError(
                f"{what} is on {p.device} and its state {key!r} on {value.device}: move the state {where}"
            )
        if key in recipe.rounding.keys and bool(value.numel()) != (
            p.dtype is torch.bfloat16 and local_tensor(p).numel() > 0
        ):
            del state[key]  # the parameter's dtype has changed: what was kept of the old one says nothing
        elif value.numel() and value.shape != shape:
            raise RuntimeError(
                f"{what} has a state {key!r} of shape {tuple(value.shape)}: a parameter that was resized, or a "
                "checkpoint of another model; delete optimizer.state[p] to start it anew"
            )


def refuse_capture(why: str) -> None:
    """RuntimeError where a CUDA graph is being captured."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"this step cannot be captured in a CUDA graph: {why}")
