"""What is read of another optimizer's checkpoint, and looked at before anything is computed of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from steepest.optimizer.option_types import OPTION_TYPES, check_option

State = dict[str, Any]
Group = dict[str, Any]
#: A group with its values, and the states of its parameters.
Part = tuple[Group, list[State]]

OF_ADAMW = ("lr", "weight_decay", "betas", "eps")
OF_ALL = ("param_names", "initial_lr", "maximize")
#: What others call a value that is an option here; adamw_ in front of a name is no part of it.
_NAMES_HERE = {
    "base_lr": "lr",
    "wd": "weight_decay",
    "mu": "momentum",
    "momentum_beta": "momentum",
    "use_nesterov": "nesterov",
    "beta1": "beta2",
    "epsilon": "eps",
    "max_precond_dim": "max_preconditioner_dim",
}


def want(group: Group, keys: Sequence[str]) -> None:
    """ValueError unless a group has all of these values, ValueError or TypeError for one that is none of an option."""
    lacking = [key for key in keys if key not in group]
    if lacking:
        raise ValueError(
            f"a group lacks {', '.join(lacking)} and has {', '.join(key for key in group if key != 'params')}: it is "
            "of another optimizer, or of another version of it"
        )
    for key in keys:
        kind = OPTION_TYPES.get(_NAMES_HERE.get(key, key.removeprefix("adamw_")))
        if kind is not None:
            check_option(key, group[key], kind, "a group's ")


def switch(group: Group, key: str, default: bool) -> bool:
    """A value that is True or False, or not there; TypeError for anything else."""
    value = group.get(key)
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"a group's {key} should be True or False but is: {value!r}")
    return default if value is None else value


def take(state: State, key: str) -> Any:
    """An entry of a parameter's state; ValueError where it is not there."""
    if key not in state:
        raise ValueError(f"a parameter's state lacks {key!r} and has {', '.join(map(str, state)) or 'nothing'}")
    return state[key]


def tensor(state: State, key: str) -> Tensor:
    """A tensor of a parameter's state; TypeError for anything else."""
    value = take(state, key)
    if not isinstance(value, Tensor):
        raise TypeError(f"a parameter's state should have a tensor as {key!r} but has: {value!r}")
    return value


def whole(value: Any, what: str) -> int:
    """A count, as a number or a tensor of one element; TypeError for anything else."""
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if isinstance(number, bool) or not isinstance(number, int | float) or number != number // 1 or number < 0:
        raise TypeError(f"{what} should be a whole number >= 0 but is: {value!r}")
    return int(number)


def only(state: State, keys: Sequence[str]) -> State:
    """Some entries of a state, all of them tensors but "step", or {} of a parameter that has none yet."""
    return {key: take(state, key) if key == "step" else tensor(state, key) for key in keys} if state else {}


def renamed(state: State, **names: str) -> State:
    """A state some of whose keys have the names that are given here."""
    return {names.get(key, key): value for key, value in state.items()}


def names_of(group: Group, chosen: Sequence[int]) -> Group:
    """The names of these parameters of a group, where it has names."""
    return {"param_names": [group["param_names"][i] for i in chosen]} if "param_names" in group else {}


def adamw(group: Group, states: list[State]) -> Part:
    """A group of AdamW of these values and their states."""
    want(group, OF_ADAMW)
    values = {key: group[key] for key in (*OF_ALL, *OF_ADAMW) if key in group}
    return {**values, "use_muon": False}, [only(state, ("step", "exp_avg", "exp_avg_sq")) for state in states]
