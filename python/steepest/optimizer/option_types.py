"""What every option of every optimizer must be, said once: `OPTION_TYPES`.

A value of another type is a TypeError that names the option, the value and what is wanted; one out of range a
ValueError, in torch's words where torch has the option. Numbers of numpy become Python's own, so that checkpoints stay
plain, and whole numbers that no machine word holds become floats.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "BELOW_ONE",
    "HEAVY_BALL",
    "OPTION_TYPES",
    "OptionType",
    "check_option",
    "check_options",
    "check_type",
    "is_on_host",
    "is_within",
    "plain_numbers",
]


@dataclass(frozen=True)
class OptionType:
    """The type of an option, and its range where that is the same in every optimizer.

    wanted: what the option should be.   accepts: whether a value is of the type.   limits: what its value should be, ""
    for no limits.   fits: whether a value of the type is within them.   called: its name in torch's messages.
    finite: whether an infinite number is beyond the limits too.   advice: what to take instead of a value beyond them.
    """

    wanted: str
    accepts: Callable[[Any], bool]
    limits: str = ""
    fits: Callable[[Any], bool] = lambda value: True
    called: str | None = None
    finite: bool = False
    advice: str = ""


def check_option(name: str, value: Any, kind: OptionType | None = None, of: str = "") -> Any:
    """The value, of Python's own numbers. TypeError or ValueError unless it is what `kind` says, by default the
    table's entry of this name; adamw_ in front of a name is no part of it. of: whose it is, in front of the message.
    """
    kind = kind or OPTION_TYPES[name.removeprefix("adamw_")]
    value = check_type(name, value, kind, of)
    if not is_within(value, kind):
        more = f"; {name} takes finite numbers {kind.limits}" if kind.finite else kind.advice and f"; {kind.advice}"
        raise ValueError(f"{of}{kind.called or name} should be {kind.limits} but is: {_shown(value, str)}{more}")
    return value


def check_type(name: str, value: Any, kind: OptionType, of: str = "") -> Any:
    """`check_option` but for the limits, so that a tensor is not read."""
    value = _plain(value)
    if not kind.accepts(value):
        if isinstance(value, Tensor) and value.numel() != 1 and kind.accepts(0.5):
            raise ValueError(f"{of}Tensor {name} must be 1-element but has {value.numel()}")
        raise TypeError(f"{of}{name} should be {kind.wanted} but is: {_shown(value)}{_way_out(value)}")
    if any(each.is_meta for each in _tensors(value)):
        raise ValueError(
            f"{of}{name} should be {kind.wanted} but is on the meta device, where it has no value: use cpu"
        )
    return value


def check_options(
    values: MutableMapping[str, Any],
    special: Mapping[str, OptionType] | None = None,
    prefix: str = "",
    of: str = "",
    *,
    on_host: bool = False,
) -> None:
    """`check_option` of every value the table knows, in place. special: types that go before those of the table;
    prefix: of the names in messages; of: as in `check_option`.   on_host: tensors on a device are not
    read, which would wait for it.
    """
    for key in values:
        kind = (special or {}).get(key, OPTION_TYPES.get(key))
        if kind is not None:
            elsewhere = on_host and not all(map(is_on_host, _tensors(values[key])))
            check = check_type if elsewhere else check_option
            values[key] = check(prefix + key, values[key], kind, of)


def is_within(value: Any, kind: OptionType) -> bool:
    """Whether a value is of the type and within its limits, by comparisons alone, which torch.compile traces."""
    return kind.accepts(value) and bool(kind.fits(value)) and not (kind.finite and not _is_finite(value))


def _plain(value: Any) -> Any:
    """Numbers of numpy, alone or in a sequence, as Python's; sequences of other libraries as tuples; whole numbers of
    more than 63 bits as floats.
    """
    if isinstance(value, Tensor | str | bytes):
        return value
    if isinstance(value, int) and abs(value) >= _TOO_LARGE:
        return float(value) if abs(value) < 2**1023 else math.inf if value > 0 else -math.inf
    if _is_number_of_numpy(value):
        return value.item()
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return tuple(map(_plain, value)) if isinstance(value, Sequence) else value


def plain_numbers(value: Any) -> Any:
    """The value with numpy's numbers, alone or in lists and tuples, as Python's; all else stays what it is."""
    if type(value) in (list, tuple):
        return type(value)(map(plain_numbers, value))
    return value.item() if _is_number_of_numpy(value) else value


def _is_number_of_numpy(value: Any) -> bool:
    return not isinstance(value, Tensor) and getattr(value, "ndim", None) == 0 and hasattr(value, "item")


_TOO_LARGE = 2**63
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)  # what torch compares
_LONGEST = 200  # text of a value
_SHORT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}


def _way_out(value: Any) -> str:
    if value is None:
        return "; leave it out for its default"
    if isinstance(value, list | tuple):
        inner = next((each for each in value if isinstance(each, str)), None)
        return "" if inner is None else f", in which {inner!r} is{_way_out(inner).removeprefix(',')}"
    if isinstance(value, float) and abs(value) >= _TOO_LARGE:
        return ", which is too large"
    if not isinstance(value, str):
        return ""
    name = _SHORT_DTYPES.get(value, value.removeprefix("torch."))
    if isinstance(getattr(torch, name, None), torch.dtype):
        return f"; write torch.{name}"
    if value.strip().lower() in ("true", "false", "none", "null", "yes", "no", "on", "off"):
        return ", a string: unquote it"
    try:
        float(value)
    except ValueError:
        return ", a string"
    yaml = "; YAML reads 1e-4 as a string, write 1.0e-4 there" if "e" in value.lower() else ""
    return f", a string: unquote it{yaml}"


def _shown(value: Any, text: Callable[[Any], str] = repr) -> str:
    """A value in a message, which is no place for a long one."""
    shown = text(value)
    return shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}..., of type {type(value).__name__}"


def _tensors(value: Any) -> list[Tensor]:
    return [each for each in (value if isinstance(value, list | tuple) else (value,)) if isinstance(each, Tensor)]


def is_on_host(t: Tensor) -> bool:
    """Whether a tensor's value can be read without waiting for a device."""
    plain = type(t) in (Tensor, torch.nn.Parameter)  # a fake tensor has no value
    return plain and t.device.type == "cpu" and t.layout is torch.strided


def _is_finite(value: Any) -> bool:
    """Whether a number is finite; what is no number counts as finite."""
    if isinstance(value, Tensor):
        return bool(value.isfinite())
    return not isinstance(value, float) or abs(value) <= sys.float_info.max


def _is_real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        of_numbers = value.itemsize > 1 if value.is_floating_point() else value.dtype in _INTEGERS
        return value.numel() == 1 and of_numbers and value.layout is torch.strided
    return _is_real(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_dtype(value: Any) -> bool:
    return isinstance(value, torch.dtype)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _sequence_of(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and all(map(accepts, value))


_are_reals = _sequence_of(_is_real)


def _or_none(kind: OptionType) -> OptionType:
    accepts, fits = kind.accepts, kind.fits
    return replace(
        kind,
        wanted=f"{kind.wanted} or None",
        accepts=lambda value: value is None or accepts(value),
        limits=kind.limits and f"{kind.limits} or None",
        fits=lambda value: value is None or fits(value),
    )


def _at_least(least: int) -> OptionType:
    text = f"a whole number of at least {least}"
    return OptionType(text, _is_whole, text, lambda value: value >= least)


def _positive(kind: OptionType) -> OptionType:
    return replace(kind, limits="> 0", fits=lambda value: value > 0, finite=True)


AT_LEAST_ZERO = OptionType(
    "a number >= 0 or a tensor of one element", _is_number, ">= 0", lambda value: value >= 0, finite=True
)
#: A decay rate that the authors keep below 1.
BELOW_ONE = OptionType("a number in [0, 1)", _is_number, "in [0, 1)", lambda value: 0 <= value < 1)
_COMMON = "0.9 and 0.95 are common, and 0 is none"
#: The momentum of an average.
MOMENTUM = replace(BELOW_ONE, advice=f"with 1 an average takes in no gradient, beyond 1 it only grows: {_COMMON}")
#: The momentum of a sum.
HEAVY_BALL = OptionType(
    "a number in [0, 1]",
    _is_number,
    "in [0, 1]",
    lambda value: 0 <= value <= 1,
    advice=f"beyond 1 a sum of gradients only grows: {_COMMON}",
)
REAL = OptionType("a number", _is_real)
POSITIVE = _positive(OptionType("a number > 0", _is_real))
POSITIVE_NUMBER = _positive(OptionType("a number > 0 or a tensor of one element", _is_number))
WHOLE = OptionType("a whole number", _is_whole)
BOOL = OptionType("True or False", _is_bool)
TEXT = OptionType("a name", _is_text)
DTYPE = OptionType("a torch.dtype", _is_dtype)
BETAS = OptionType(
    "two numbers in [0, 1), as in (0.9, 0.95),",
    _sequence_of(_is_number),
    "two numbers in [0, 1)",
    lambda betas: len(betas) == 2 and all(0.0 <= beta < 1.0 for beta in betas),
)
ROWS = OptionType("a whole number or a list of them", lambda value: _is_whole(value) or _sequence_of(_is_whole)(value))
POLAR = OptionType(
    "a preset's name or coefficients as `steepest.polar` takes them, (a, b, c) or a list of such, one a step,",
    lambda value: _is_text(value) or ((_are_reals(value) or _sequence_of(_are_reals)(value)) and bool(value)),
)


#: By the name of an argument, which is that of a group value but for those of a whole optimizer.
OPTION_TYPES: dict[str, OptionType] = {
    "loss_scale": OptionType(
        "a number, 'sum' or a tensor of one element",
        lambda value: value == "sum" if isinstance(value, str) else _is_number(value),
        "> 0",
        lambda value: isinstance(value, str) or bool(value > 0),
        finite=True,
    ),
    # numbers of a step
    "lr": replace(AT_LEAST_ZERO, called="Learning rate"),
    "weight_decay": replace(AT_LEAST_ZERO, called="weight decay"),
    "momentum": MOMENTUM,
    "betas": BETAS,
    "beta2": BELOW_ONE,
    "eps": AT_LEAST_ZERO,
    "damping": POSITIVE_NUMBER,
    "radius": POSITIVE,
    "fraction": OptionType("a number in (0, 1]", _is_real, "in (0, 1]", lambda value: 0 < value <= 1),
    "average_rate": replace(BELOW_ONE, accepts=_is_real),
    "shampoo_beta": _or_none(OptionType("a number in [0, 1]", _is_real, "in [0, 1]", lambda value: 0 <= value <= 1)),
    "p": REAL,
    # of a whole optimizer
    "matrix_scale": POSITIVE,
    "initial_step": POSITIVE,
    "lower_bound": _or_none(
        OptionType("one number", _is_number, "a number below infinity", lambda value: bool(value < math.inf))
    ),
    "stale_dual": _or_none(BOOL),
    "reduce_loss": BOOL,
    "product": TEXT,
    "scale": TEXT,
    "others": TEXT,
    "block_norm": TEXT,
    # methods
    "nesterov": BOOL,
    "constrained": BOOL,
    "ns_coefficients": OptionType(
        "numbers (a, b, c)",
        _sequence_of(_is_real),
        "finite numbers (a, b, c)",
        lambda value: all(abs(each) < math.inf for each in value),
    ),
    "ns_steps": WHOLE,
    "polar": _or_none(POLAR),
    "adjust_lr_fn": _or_none(TEXT),
    "norm": _or_none(TEXT),
    "composite": TEXT,
    "start": TEXT,
    "method": TEXT,
    "graft": _or_none(TEXT),
    "after": _or_none(TEXT),
    "inverse_root": TEXT,
    "first_step": _or_none(TEXT),
    "max_update_rms": _or_none(POSITIVE),
    "parity": _or_none(TEXT),
    "refresh": TEXT,
    "precondition_frequency": _at_least(1),
    "exact_refreshes": _at_least(0),
    "refresh_delay": _at_least(0),
    "max_preconditioner_dim": _at_least(1),
    "block_preconditioner": BOOL,
    "factor_dtype": _or_none(DTYPE),
    # of every optimizer
    "use_muon": BOOL,
    "num_heads": _or_none(ROWS),
    "split_sizes": _or_none(OptionType("a list of whole numbers, as in (64, 64, 64),", _sequence_of(_is_whole))),
    "batch_dims": _or_none(_at_least(0)),
    "transposed": BOOL,
    "split_columns": BOOL,
    "interleaved": _at_least(1),
    "weight_decay_method": TEXT,
    "cautious_wd": BOOL,
    "average": OptionType(
        "a number in (0, 1), 'schedule_free' or None",
        lambda value: value in (None, "schedule_free") if value is None or isinstance(value, str) else _is_real(value),
        "a number in (0, 1), 'schedule_free' or None",
        lambda value: value is None or isinstance(value, str) or 0 < value < 1,
    ),
    "schedule_free_beta": replace(BELOW_ONE, accepts=_is_real),
    "cautious_update": BOOL,
    "maximize": BOOL,
    "momentum_dtype": _or_none(
        replace(
            DTYPE,
            limits="a floating torch.dtype of 16 bits or more",
            fits=lambda dtype: dtype.is_floating_point and dtype.itemsize > 1,
        )
    ),
    "state_bits": _or_none(OptionType("8", _is_whole, "8", lambda value: value == 8)),
    "stochastic_rounding": BOOL,
    "keep_mantissa": BOOL,
    "constraint": _or_none(TEXT),
    "variance_reduction": _or_none(POSITIVE),
    "capturable": BOOL,
    "backend": TEXT,
    "max_workspace_bytes": _or_none(OptionType("a whole number > 0", _is_whole, "positive", lambda value: value > 0)),
    "fuse_update": BOOL,
    "share_work": BOOL,
    "foreach": _or_none(BOOL),
    "fused": _or_none(BOOL),
}
