"""What the state of a parameter in a checkpoint must be, and how it is taken over."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..parts.precondition.kronecker import FACTORS
from ..recipe import CLOCK, Recipe
from ..sharding.local import local_tensor
from .checkpoint_matching import GIVE_NAMES

__all__ = [
    "COUNTS",
    "Kept",
    "Missing",
    "check_kept",
    "check_no_meta",
    "check_state",
    "in_its_dtype",
    "refuse_incomplete",
    "restored",
    "without_kept",
]

#: What counts steps.
COUNTS = ("step", CLOCK)
_MOST_STEPS = 2**63
_BEGIN = "load an earlier checkpoint, or leave the parameter's entry out of checkpoint['state'] for it to begin anew"


Missing = Literal["refuse", "begin", "together", "leave"]


@dataclass(frozen=True)
class Kept:
    """A floating-point tensor that a class keeps of a parameter besides its recipe's state.

    limits: of its entries, None for any finite ones.   whole: it counts.   missing: what is done without it where the
    parameter has other state: "refuse"; "begin" anew, which a warning says; "together", refuse it where other
    parameters have it; "leave", for it is there at times.   later: before the first step it is never there.
    """

    shape: Sequence[int]
    limits: Literal[">= 0", "> 0"] | None = None
    whole: bool = False
    missing: Missing = "leave"
    later: bool = False


def check_state(
    tensors: Mapping[str, Any], what: str, p: Tensor, fresh: Mapping[str, Tensor], recipe: Recipe, owner: str
) -> list[str]:
    """The keys of what begins anew, because it may and is not there. TypeError or ValueError for state that is not of
    this parameter in this optimizer.

    what: names the parameter.   fresh: the state before a first gradient, for shapes and kinds.   owner: the
    optimizer's class.
    """
    may_lack = recipe.may_lack
    refuse_incomplete(tensors, what, [key for key in fresh if key not in tensors and key not in may_lack], owner)
    if any(key in tensors for key in recipe.average_keys):
        refuse_incomplete(tensors, what, [key for key in recipe.average_keys if key not in tensors], owner)
    for key, like in fresh.items():
        if key not in tensors:
            continue
        value, name = tensors[key], f"the checkpoint's {key!r} of {what}"
        if key in COUNTS:
            _check_count(name, value)
            continue
        base = key.partition(".")[0]
        may_overflow = recipe.kronecker is not None and base in recipe.kronecker.may_overflow
        _check_tensor(name, value, like.is_floating_point(), finite=not may_overflow)
        if like.dtype in (torch.int8, torch.uint8) and value.dtype != like.dtype:
            raise ValueError(f"{name} should be codes of {like.dtype} but is {value.dtype}")
        if value.shape != like.shape and not (key in recipe.rounding.keys and not value.numel()):
            raise ValueError(
                f"{name} has shape {tuple(value.shape)} and the parameter {tuple(p.shape)}: it is of another model, or "
                f"of another order of parameters. {GIVE_NAMES}"
            )
        if recipe.kronecker is not None and base in FACTORS and value.ndim > 1:
            _check_limits(name, value.diagonal(dim1=-2, dim2=-1), ">= 0")
        elif base in recipe.nonnegative:
            _check_limits(name, value, ">= 0")
        elif recipe.kronecker is not None and base in recipe.kronecker.within_one:
            _check_limits(name, value, "in [-1, 1]")
        here = in_its_dtype(key, value, like, recipe)
        if here is not value and not may_overflow and not _all(here, torch.isfinite):
            raise ValueError(f"{name} has numbers beyond {like.dtype}, in which it is kept here; {_BEGIN}")
    return [key for key in may_lack if key not in tensors and fresh[key].numel()]


def in_its_dtype(key: str, value: Tensor, like: Tensor, recipe: Recipe) -> Tensor:
    """State in the dtype that a step computes with it in; what is elementwise may be wider, and stays as it is.

    Narrower state is of what halves checkpoints, and squares of gradients vanish in it: bf16 alone stays, of averages
    that may be of gradients in bf16.
    """
    if not value.is_floating_point():
        return value
    base, narrower = key.partition(".")[0], value.dtype.itemsize < like.dtype.itemsize
    of_gradients = value.dtype == torch.bfloat16 and base not in recipe.nonnegative
    stays = recipe.layouts.get(key) == "elementwise" and (of_gradients or not narrower)
    return value if stays else value.to(like.dtype)


def check_kept(tensors: Mapping[str, Any], what: str, kept: Mapping[str, Kept]) -> None:
    """`check_state` of what a class keeps besides its recipe's state, where it is there."""
    for key, kind in kept.items():
        if key not in tensors:
            continue
        value, name = tensors[key], f"the checkpoint's {key!r} of {what}"
        _check_tensor(name, value, floating=True)
        if value.shape != torch.Size(kind.shape):
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}, not {tuple(kind.shape)}: it is of another model, or is read "
                f"otherwise here; {_BEGIN}"
            )
        if kind.limits is not None:
            _check_limits(name, value, kind.limits)
        if kind.whole and not _all(value, lambda t: t == t.round()):
            raise ValueError(f"{name} should be a whole number but is: {value}; {_BEGIN}")


def without_kept(tensors: Mapping[str, Any], kept: Mapping[str, Kept], missing: str) -> list[str]:
    """The keys that are not there, of those kinds that say so."""
    begun = any(float(tensors[key]) > 0 for key in COUNTS if key in tensors) or not any(
        key in tensors for key in COUNTS
    )
    return [
        key
        for key, kind in kept.items()
        if kind.missing == missing and key not in tensors and (begun or not kind.later)
    ]


def refuse_incomplete(tensors: Mapping[str, Any], what: str, lacking: Sequence[str], owner: str) -> None:
    """ValueError where a parameter's state lacks something."""
    if lacking:
        raise ValueError(
            f"the checkpoint's state of {what} has {', '.join(map(str, tensors))} and lacks {', '.join(lacking)}, "
            f"which {owner} keeps: it is incomplete or of another optimizer; without an entry for it in "
            "checkpoint['state'] the parameter begins anew"
        )


def check_no_meta(tensors: Mapping[str, Any], what: str) -> None:
    """ValueError for a tensor without values, whosever it is."""
    for key, value in tensors.items():
        if isinstance(value, Tensor) and value.is_meta:
            raise ValueError(
                f"the checkpoint's {key!r} of {what} is on the meta device and has no values: load the file with "
                "torch.load(..., map_location='cpu')"
            )


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
    if isinstance(value, Tensor) and (value.numel() != 1 or not _counts(value) or value.layout is not torch.strided):
        raise ValueError(
            f"{name} should be one number of steps but has shape {tuple(value.shape)}, {value.dtype} and {value.layout}"
        )
    too_large = isinstance(value, int) and abs(value) >= _MOST_STEPS
    count = math.inf if too_large else float(value)
    if not (0 <= count < _MOST_STEPS and count == round(count)):
        raise ValueError(f"{name} should be a whole number of steps >= 0 but is: {value}; {_BEGIN}")


def _counts(value: Tensor) -> bool:
    """Whether a tensor's dtype is one of numbers that count steps."""
    if value.is_floating_point():
        return value.itemsize > 1
    return not value.is_complex() and value.dtype is not torch.bool


#: The last with room for what rounding and an iteration leave.
_LIMITS: dict[str, Callable[[Tensor], Tensor]] = {
    ">= 0": lambda t: t >= 0,
    "> 0": lambda t: t > 0,
    "in [-1, 1]": lambda t: t.abs() <= 1.1,
}


def _check_limits(name: str, value: Tensor, limits: str) -> None:
    if not _all(value, _LIMITS[limits]):
        raise ValueError(f"{name} should be {limits} everywhere and is not: it is not what was saved; {_BEGIN}")


def _check_tensor(name: str, value: Any, floating: bool, finite: bool = True) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} should be a tensor but is: {value!r}")
    if value.layout is not torch.strided:
        raise ValueError(f"{name} should be dense but has the layout {value.layout}: call to_dense() on it")
    whole = not value.is_floating_point() and _counts(value)
    if not (value.is_floating_point() and value.itemsize > 1 if floating else whole):
        wanted = "floating-point numbers of 16 bits or more" if floating else "whole numbers"
        raise ValueError(f"{name} should be {wanted} but is {value.dtype}")
    if floating and finite and not _all(value, torch.isfinite):
        raise ValueError(f"{name} is not finite: the run that saved it had come apart; {_BEGIN}")


def _all(value: Tensor, holds: Callable[[Tensor], Tensor]) -> bool:
    """Whether something holds of every entry that lies here."""
    return bool(holds(local_tensor(value)).all())
