"""The values of a parameter group: what a step reads from them, and words of other optimizers for them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from typing import Any, Literal

import torch
from torch import Tensor

from ..parts import (
    Average,
    Blockwise,
    Cautious,
    Decay,
    Ema,
    Hyper,
    Number,
    Rounding,
    ScheduleFree,
    Sphere,
    VarianceReduction,
)
from .option_types import check_option, is_on_host

Group = dict[str, Any]

# Group values that change from step to step and that no recipe depends on.
CHANGING = frozenset({"params", "lr", "weight_decay", "momentum", "beta2", "betas", "initial_lr", "max_lr", "min_lr"})
# Numbers that a step reads anew, and whether they are on the device, which it asks first.
NUMBERS = ("lr", "weight_decay", "momentum", "beta2", "betas", "eps", "damping", "loss_scale", "capturable")
# Those that say how far weights move.
LENGTHS = ("lr", "weight_decay")
_ABSENT = object()
# Those that `capturable` keeps on the device, where a captured step reads them.
ON_DEVICE = LENGTHS


def number(value: Number) -> Number:
    """A float, or a 1-element tensor of any shape as one of no dimensions, in fp32 at least: 1 - lr weight_decay is
    lost in 16 bits.
    """
    if not isinstance(value, Tensor) or (not value.ndim and value.dtype in (torch.float32, torch.float64)):
        return value
    return value.reshape(()).to(torch.promote_types(value.dtype, torch.float32))


def adam_hyper(group: Group) -> Hyper:
    """The numbers of a group with Adam's keys: lr, betas, eps, weight_decay."""
    keys = (group["lr"], group["weight_decay"], *group["betas"], group["eps"])
    return Hyper(*map(number, keys))


def finish(group: Group) -> dict[str, Any]:
    """The parts of a recipe that end every step, the same for matrices and for AdamW."""
    return {
        "decay": decay_of(group),
        "rounding": Rounding(_rounding(group)),
        "average": average_of(group),
        "variance_reduction": VarianceReduction(group["variance_reduction"])
        if group.get("variance_reduction")
        else None,
        "transforms": (Cautious(),) if group.get("cautious_update") else (),
        "constraint": constraint_of(group),
        "storage": storage_of(group),
    }


def decay_of(group: Group, **others: bool) -> Decay:
    """The weight decay that a group says; others: `after` and `scaled`, which are a method's."""
    return Decay(cautious=group["cautious_wd"], method=group.get("weight_decay_method", "decoupled"), **others)


def average_of(group: Group) -> Average | None:
    """The average of the iterates that a group says, by `average` or SPlus's word for it."""
    average, rate = group.get("average"), group.get("average_rate")
    if average == "schedule_free":
        return ScheduleFree(beta=group["schedule_free_beta"])
    rate = average or rate
    return Ema(rate=rate) if rate else None


def refuse_schedule_free(group: Group, why: str) -> None:
    """ValueError where a group says average="schedule_free" and cannot have it."""
    if group.get("average") == "schedule_free":
        raise ValueError(f"average='schedule_free' steps from a point between two iterates, and {why}: use a number")


def constraint_of(group: Group) -> Sphere | None:
    """The sphere that a group's matrices stay on. ValueError where weight decay would pull them away, or an average has
    the steps begin elsewhere.
    """
    norm = group.get("constraint")
    if norm is None or not group.get("use_muon", True):
        return None
    decay = group["weight_decay"]
    if not isinstance(decay, Tensor) and decay:
        raise ValueError(f"constraint={norm!r} keeps a norm that weight_decay={decay} would shrink: use weight_decay=0")
    refuse_schedule_free(group, "such points are not on the sphere of a constraint")
    return Sphere(norm)


def storage_of(group: Group) -> Blockwise | None:
    """How a group's averages are stored between steps. ValueError where two options say it."""
    if group.get("state_bits") is None:
        return None
    if group.get("momentum_dtype") is not None:
        raise ValueError(
            f"state_bits={group['state_bits']} and momentum_dtype={group['momentum_dtype']} are two answers to one "
            "question: choose one of them"
        )
    return Blockwise()


def refuse_option(group: Group, name: str, why: str) -> None:
    """ValueError where a group says something, not None, for an option that it cannot have."""
    if group.get(name) is not None:
        raise ValueError(f"{name}={group[name]!r} is not taken here: {why}")


def refuse_cautious_update(group: Group, why: str) -> None:
    """ValueError where a group says cautious_update=True and cannot have it."""
    if group.get("cautious_update"):
        raise ValueError(f"cautious_update=True is not taken here: {why}; leave it out")


def refuse_decay_methods(group: Group, why: str, *methods: str) -> None:
    """ValueError where a group's weight decay is by one of these methods."""
    if group.get("weight_decay_method") in methods:
        refuse_option(group, "weight_decay_method", f"{why}; use 'decoupled'")


def _rounding(group: Group) -> Literal["nearest", "stochastic", "mantissa"]:
    if group["stochastic_rounding"] and group["keep_mantissa"]:
        raise ValueError("stochastic_rounding and keep_mantissa are two answers to one question: choose one of them")
    return "stochastic" if group["stochastic_rounding"] else "mantissa" if group["keep_mantissa"] else "nearest"


def number_on(value: Number, device: torch.device) -> Tensor:
    """A 0-d tensor on the device: the given one where it is there, else an fp64 copy."""
    if isinstance(value, Tensor) and value.device == device:
        return value.reshape(()) if value.ndim else value
    if isinstance(value, Tensor):
        return value.detach().reshape(()).to(device, torch.float64)
    return torch.full((), value, dtype=torch.float64, device=device)


def frozen(group: Group, keys: Iterable[str]) -> Group:
    """A copy of these values that later changes of the group, of its lists too, do not reach."""
    return {key: _frozen(group[key]) for key in keys if key in group}


def is_as_it_was(before: Group, group: Group) -> bool:
    """Whether a group has the very objects of an earlier `frozen`, which a list never is: what is asked first, as it
    takes a microsecond.
    """
    return all(map(operator.is_, before.values(), map(group.get, before, repeat(_ABSENT))))


def _frozen(value: Any) -> Any:
    return _mapped(_frozen, value) if isinstance(value, (list, tuple)) else value


def _mapped(function: Callable[[Any], Any], values: Any) -> tuple[Any, ...]:
    """What a function gives for each of these: the tuple itself where that is what is in it."""
    mapped = tuple(map(function, values))
    return values if type(values) is tuple and all(map(operator.is_, mapped, values)) else mapped


def numbers_of(group: Group, known: Iterable[Any] = repeat(_ABSENT)) -> tuple[Any, ...]:
    """The values of `NUMBERS`, as `as_it_is` gives them; None where there is none. known: as they were earlier."""
    now = zip(known, map(group.get, NUMBERS), strict=False)
    return tuple([old if old is value else as_it_is(value) for old, value in now])


def numbers_are(known: Iterable[Any], group: Group) -> bool:
    """Whether a group has the very objects of an earlier `numbers_of`, which no list is and no tensor on the host."""
    return all(map(operator.is_, known, map(group.get, NUMBERS)))


def has_smaller_lr(known: Sequence[Any], group: Group) -> bool:
    """Whether a group has these numbers of `numbers_of` but for a learning rate that is smaller, and taken if that was:
    what most schedulers do most of the time.
    """
    before, lr = known[0], group.get(NUMBERS[0])
    if type(before) is not float or type(lr) is not float or not 0 < lr <= before:
        return False
    return all(map(operator.is_, known[1:], map(group.get, NUMBERS[1:])))


def as_it_is(value: Any) -> Any:
    """A value that is another one once it has changed: a tensor on the host beside the number of its changes, which is
    not counted of those made in inference mode. Others stand for themselves.
    """
    if isinstance(value, list | tuple):
        return _mapped(as_it_is, value)
    if isinstance(value, Tensor) and is_on_host(value) and not value.is_inference():
        return (value, value._version)
    return value


def changed(before: Group, now: Group) -> str | None:
    """The first key whose value is another one, or None; tensors count by identity."""
    return next((key for key in {**before, **now} if not same(before.get(key), now.get(key))), None)


def same(a: Any, b: Any) -> bool:
    """Whether two frozen values are equal; tensors are where they are one."""
    if a is b:
        return True
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, bool | Tensor) or isinstance(b, bool | Tensor):
        return False  # of the singletons True and False too, which are equal to 1 and 0
    if type(a) is not type(b) and not (isinstance(a, int | float) and isinstance(b, int | float)):
        return False  # as 1, 1 + 0j and an array of a 1, which are equal too
    try:
        return bool(a == b)
    except ValueError:  # of arrays
        return False


def parameter_name(group: Group, i: int) -> str:
    names = group.get("param_names")
    return f"parameter {names[i]!r}" if names else f"parameter {i}"


def read_switches(group: Group) -> None:
    """Turns torch's foreach and fused into the values that say the same here, unless the group has these too.

    foreach=False: one matrix after another, as max_workspace_bytes=1, unless fused=True, which torch takes for it.
    fused=False: torch operations, as backend="torch".   None and True of either: as it is without.
    """
    said = {key: check_option(key, group.pop(key)) for key in ("foreach", "fused") if key in group}
    if said.get("foreach") is False and said.get("fused") is not True:
        group.setdefault("max_workspace_bytes", 1)
    if said.get("fused") is False:
        group.setdefault("backend", "torch")


def name_the_rule(group: Group, of: str = "") -> bool:
    """Turns algorithm="muon"/"adamw" into use_muon; whether the group named its rule at all. of: as `check_option`.

    timm's use_fallback=True says that the group is AdamW's.
    """
    if group.get("use_fallback") is True:
        group.setdefault("use_muon", False)
    if "algorithm" in group:
        algorithm = group.pop("algorithm")
        if algorithm not in ("muon", "adamw"):
            raise ValueError(f"{of}group algorithm {algorithm!r} is not known; use 'muon' or 'adamw'")
        group["use_muon"] = algorithm == "muon"
    if "use_muon" not in group:
        return False
    check_option("use_muon", group["use_muon"], of=of)
    return True
