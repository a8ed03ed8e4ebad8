"""What the state of a parameter in a checkpoint must be, and how it is taken over."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ..recipe import CLOCK
from ..sharding.local import is_sharded, local_tensor
from ..state_layout import Layout
from .checkpoint_matching import GIVE_NAMES

__all__ = ["check_kept", "check_state", "restored"]

_COUNTS = ("step", CLOCK)


def check_state(
    tensors: Mapping[str, Any], what: str, p: Tensor, fresh: Mapping[str, Tensor], may_lack: Collection[str], owner: str
) -> None:
    """TypeError or ValueError for state that is not of this parameter in this optimizer.

    what: names the parameter.   fresh: the state before a first gradient, for shapes and kinds.   may_lack: keys that
    may be missing, or have no elements.   owner: the optimizer's class.
    """
    lacking = [key for key in fresh if key not in tensors and key not in may_lack]
    if lacking:
        raise ValueError(
            f"the checkpoint's state of {what} has {', '.join(map(str, tensors))} and lacks {', '.join(lacking)}, "
            f"which {owner} keeps: it is incomplete or of another optimizer; without an entry for it in "
            "checkpoint['state'] the parameter begins anew"
        )
    for key, like in fresh.items():
        if key not in tensors:
            continue
        value, name = tensors[key], f"the checkpoint's {key!r} of {what}"
        if key in _COUNTS:
            _check_count(name, value)
            continue
        _check_tensor(name, value, like.is_floating_point())
        if value.shape != like.shape and not (key in may_lack and not value.numel()):
            raise ValueError(
                f"{name} has shape {tuple(value.shape)} and the parameter {tuple(p.shape)}: it is of another model, or "
                f"of another order of parameters. {GIVE_NAMES}"
            )


def check_kept(tensors: Mapping[str, Any], what: str, p: Tensor, layouts: Mapping[str, Layout | None]) -> None:
    """`check_state` of what a class keeps besides its recipe's state, where it is there."""
    for key, layout in layouts.items():
        if key not in tensors:
            continue
        value, name = tensors[key], f"the checkpoint's {key!r} of {what}"
        _check_tensor(name, value, floating=True)
        shape = {"elementwise": p.shape, "scalar": torch.Size()}.get(layout or "")
        if shape is not None and value.shape != shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, not {tuple(shape)}: it is of another model")


def restored(key: str, value: Any, p: Tensor) -> Any:
    """A copy of a state's value where it belongs, in the dtype it was saved in."""
    if key == CLOCK:
        return torch.as_tensor(value, dtype=torch.int64).clone().reshape(()).cpu()
    if key == "step":
        return torch.as_tensor(value).detach().clone().reshape(()).to(p.device, torch.float32)
    return value.detach().clone().to(p.device) if isinstance(value, Tensor) else copy.deepcopy(value)


def _check_count(name: str, value: Any) -> None:
    """A count of steps is a number, or a tensor of one."""
    if isinstance(value, bool) or not isinstance(value, Tensor | int | float):
        raise TypeError(f"{name} should be a number of steps but is: {value!r}")
    if isinstance(value, Tensor) and (value.numel() != 1 or value.is_complex()):
        raise ValueError(f"{name} should be one number of steps but has shape {tuple(value.shape)} and {value.dtype}")
    if not (math.isfinite(float(value)) and float(value) >= 0):
        raise ValueError(f"{name} should be a number of steps >= 0 but is: {float(value)}")


def _check_tensor(name: str, value: Any, floating: bool) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} should be a tensor but is: {value!r}")
    if value.layout is not torch.strided:
        raise ValueError(f"{name} should be dense but has the layout {value.layout}: call to_dense() on it")
    whole = not value.is_floating_point() and not value.is_complex() and value.dtype is not torch.bool
    if not (value.is_floating_point() and value.itemsize > 1 if floating else whole):
        wanted = "floating-point numbers of 16 bits or more" if floating else "whole numbers"
        raise ValueError(f"{name} should be {wanted} but is {value.dtype}")
    if floating and not all_finite(value):
        raise ValueError(
            f"{name} is not finite: the run that saved it had come apart; load an earlier checkpoint, or leave the "
            "parameter's entry out of checkpoint['state'] for it to begin anew"
        )


def all_finite(value: Tensor) -> bool:
    """Whether every entry is finite, on all ranks that have some of them."""
    finite = torch.isfinite(local_tensor(value)).all()
    if is_sharded(value):
        import torch.distributed as dist

        flag = finite.to(torch.int32)
        for group in value.device_mesh.get_all_groups():  # type: ignore[attr-defined]
            dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=group)
        finite = flag
    return bool(finite)
