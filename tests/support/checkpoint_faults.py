"""What may be wrong with a checkpoint, and whether a load has changed anything."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from steepest.optimizer import MatrixOptimizer
from support.training import same_bits

Checkpoint = dict[str, Any]


def with_group(number: int, **values: Any) -> Callable[[Checkpoint], Any]:
    return lambda saved: saved["param_groups"][number].update(values)


def with_state(change: Callable[[str, Tensor], Any], chosen: Callable[[Tensor], bool]) -> Callable[[Checkpoint], Any]:
    """Changes the last tensor of the last parameter that will do, so that much is loaded by then."""

    def spoil(saved: Checkpoint) -> None:
        state, key = [(s, k) for s in saved["state"].values() for k, t in s.items() if t.ndim and chosen(t)][-1]
        state[key] = change(key, state[key])

    return spoil


def without_step(saved: Checkpoint) -> None:
    """Where a parameter has more than one tensor; an empty state is one that begins."""
    states = [state for state in saved["state"].values() if len(state) > 1]
    if states:
        del states[-1]["step" if "step" in states[-1] else next(iter(states[-1]))]
    else:
        saved["state"][0] = None


def of_floats(t: Tensor) -> bool:
    return t.is_floating_point() and t.numel() > 1


#: What is done to a good checkpoint of two groups: to the values of a group, to the state, to what holds them.
VALUES: dict[str, Callable[[Checkpoint], Any]] = {
    "lr below 0": with_group(0, lr=-1.0),
    "lr of AdamW below 0": with_group(1, lr=-1.0),
    "lr a string": with_group(0, lr="1e-4"),
    "lr None": with_group(1, lr=None),
    "betas": with_group(1, betas=(2, 5)),
    "eps of AdamW": with_group(1, eps=-1.0),
    "weight_decay": with_group(0, weight_decay=-0.1),
    "backend": with_group(0, backend="abacus"),
    "maximize": with_group(1, maximize="yes"),
    "use_muon": with_group(1, use_muon="false"),
    "adjust_lr_fn": with_group(0, adjust_lr_fn="spectral"),
    "num_heads": with_group(0, num_heads=5),
    "share_work": with_group(0, share_work="yes"),
    "lr beyond the dtype": with_group(1, lr=1e38),
}
STATE: dict[str, Callable[[Checkpoint], Any]] = {
    "step or another tensor missing": without_step,
    "NaN": with_state(lambda key, t: torch.full_like(t, torch.nan), of_floats),
    "inf": with_state(lambda key, t: torch.full_like(t, torch.inf), of_floats),
    "integers": with_state(lambda key, t: t.to(torch.int32), of_floats),
    "8 bits": with_state(lambda key, t: t.to(torch.float8_e5m2), of_floats),
    "another shape": with_state(lambda key, t: t[..., :1], lambda t: of_floats(t) and t.shape[-1] > 1),
    "no elements": with_state(lambda key, t: t[:0], of_floats),
    "a string for a tensor": with_state(lambda key, t: "tensor", of_floats),
    "None for a tensor": with_state(lambda key, t: None, of_floats),
    "a number for a tensor": with_state(lambda key, t: 0.5, of_floats),
    "None for a state": lambda saved: saved["state"].update({0: None}),
    "a list for a state": lambda saved: saved["state"].update({0: [1, 2]}),
    "a tensor for a state": lambda saved: saved["state"].update({0: torch.ones(2)}),
}


def each_missing(good: Checkpoint) -> dict[str, Callable[[Checkpoint], Any]]:
    """Every tensor of the state of the last parameter that has it, missing, by its key, but for one that is
    alone: a state that is empty has no key to name.
    """
    at = {key: number for number, state in good["state"].items() if len(state) > 1 for key in state}
    return {key: lambda saved, key=key, number=number: saved["state"][number].pop(key) for key, number in at.items()}


#: What no tensor of a state is; `step` and the clock are numbers of steps.
NO_TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "NaN": lambda t: torch.full_like(t, torch.nan, dtype=torch.float32),
    "meta": lambda t: t.to("meta"),
    "8 bits": lambda t: t.to(torch.float8_e5m2),
    "bool": lambda t: t.bool(),
    "complex": lambda t: t.to(torch.complex64),
    "another shape": lambda t: t.new_ones((*t.shape, 3)),
    "None": lambda t: None,
}
NO_COUNTS: dict[str, Callable[[Tensor], Any]] = {
    "a fraction": lambda t: 2.5,
    "half": lambda t: torch.tensor(0.5),
    "-1": lambda t: -1,
    "inf": lambda t: torch.tensor(torch.inf),
    "True": lambda t: True,
    "a string": lambda t: "3",
    "too many": lambda t: 10**30,
    "sparse": lambda t: torch.ones(1).to_sparse(),
}
#: Keys of what is >= 0 everywhere.
NOT_NEGATIVE = ("exp_avg_sq", "sq", "values", "learned", "pending", "mass", "radius", "step_size", "losses", "passes")


def each_odd(good: Checkpoint) -> dict[str, Callable[[Checkpoint], Any]]:
    """Every tensor of the state of the last parameter that has it, as what it cannot be."""
    at = {key: number for number, state in good["state"].items() for key in state}
    faults = {}
    for key, number in at.items():
        t = good["state"][number][key]
        if not t.numel():
            continue
        odd = dict(NO_TENSORS)
        if key in ("step", "clock"):
            odd |= NO_COUNTS
        elif t.is_floating_point() and key.endswith(NOT_NEGATIVE):
            odd["below 0"] = lambda t: -t.abs() - 1
        if "basis" in key:
            odd["no basis"] = lambda t: t * 10
        if "residual" in key or key.endswith("_next"):
            del odd["NaN"]  # which it may be: it is looked at before it is taken
        for name, change in odd.items():
            faults[f"{key} {name}"] = lambda saved, key=key, number=number, change=change: saved["state"][
                number
            ].update({key: change(saved["state"][number][key])})
    return faults


STRUCTURE: dict[str, Callable[[Checkpoint], Any]] = {
    "no state": lambda saved: saved.pop("state"),
    "no groups": lambda saved: saved.pop("param_groups"),
    "None for groups": lambda saved: saved.update(param_groups=None),
    "None for all states": lambda saved: saved.update(state=None),
    "a group less": lambda saved: saved["param_groups"].pop(),
    "a parameter less": lambda saved: saved["param_groups"][0]["params"].pop(),
    "no list of parameters": lambda saved: saved["param_groups"][1].pop("params"),
    "a group that is none": lambda saved: saved["param_groups"].__setitem__(0, None),
    "strings for numbers": lambda saved: saved.update(state={str(key): value for key, value in saved["state"].items()}),
    "a name too many": with_group(0, param_names=["a", "b"]),
    "names that are numbers": with_group(0, param_names=[0]),
    "names that are no list": with_group(0, param_names="a"),
    "a parameter listed twice": lambda saved: saved["param_groups"][1].update(params=[0]),
    "groups in another order": lambda saved: saved["param_groups"].reverse(),
}


def everything(optimizer: MatrixOptimizer) -> dict[str, Any]:
    """All that a load may change, as values that later changes do not reach."""
    groups = [
        {key: list(value) if key == "params" else copy.deepcopy(value) for key, value in group.items()}
        for group in optimizer.param_groups
    ]
    state = {p: {key: copy.deepcopy(value) for key, value in held.items()} for p, held in optimizer.state.items()}
    return {"groups": groups, "state": state, "defaults": dict(optimizer.defaults)}


def alike(a: Any, b: Any) -> bool:
    """Deep equality, bit for bit; parameters are themselves."""
    if isinstance(a, nn.Parameter):
        return a is b
    if isinstance(a, Tensor) and a.is_meta:
        return isinstance(b, Tensor) and b.is_meta and a.shape == b.shape
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and same_bits(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(alike, a, b))
    return type(a) is type(b) and bool(a == b)


def refusal(
    optimizer: MatrixOptimizer, good: Checkpoint, faults: dict[str, Callable[[Checkpoint], Any]]
) -> tuple[str, str]:
    """("", the first message) where every fault is refused as the checkpoint's with nothing changed, or (what is not,
    the message).
    """
    before, message = everything(optimizer), ""
    for name, spoil in faults.items():
        saved = copy.deepcopy(good)
        spoil(saved)
        try:
            optimizer.load_state_dict(saved)
            return f"{name} is taken", ""
        except (TypeError, ValueError) as error:
            text = f"{type(error).__name__}: {error}"
            message = message or text
            if "checkpoint" not in text:
                return f"{name} does not say that it is the checkpoint's", text
        if not alike(everything(optimizer), before):
            return f"{name} is half loaded", text
    return "", message
