"""`steepest convert`: checkpoints of other optimizers as those of `steepest.Muon`.

    torch                 torch.optim.Muon, and torch.optim.AdamW for the rest: one file or two
    kellerjordan          Muon, MuonWithAuxAdam and their single-device forms (github.com/KellerJordan/Muon)
    moonlight             Muon of Moonlight's toy_train.py (github.com/MoonshotAI/Moonlight)
    dion                  Muon of dion, with its AdamW groups (github.com/microsoft/dion)
    emerging-optimizers   Muon of Emerging-Optimizers (github.com/NVIDIA-NeMo/Emerging-Optimizers)

A heavy ball (moonlight, dion), m <- mu m + g, is 1 / (1 - mu) times the average that is kept here, and becomes it. What
is not in those checkpoints stays the optimizer's own: for emerging-optimizers the ratio of shapes, for all of them the
polynomials (`polar=`). eps of dion and Moonlight is another one: absolute in the iteration, and beside an uncorrected
second moment in Moonlight's AdamW. Layouts are those of the public code; keys of another version are a ValueError.

    state = convert("torch", muon.state_dict(), adamw.state_dict(), names=names)
    optimizer = steepest.Muon(model, ...)
    optimizer.load_state_dict(state)

With names, one for each parameter in the order of the checkpoints, state goes to its name; without them the order and
the groups of the optimizer must be the checkpoints'.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from steepest.optimizer.checkpoint_matching import AUTHOR, read_groups

State = dict[str, Any]
Group = dict[str, Any]
#: A group with its values, and the states of its parameters.
Part = tuple[Group, list[State]]

_OF_MUON = ("lr", "weight_decay", "momentum", "nesterov", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")
_OF_ADAMW = ("lr", "weight_decay", "betas", "eps")
_OF_ALL = ("param_names", "initial_lr", "maximize")


def convert(source: str, *checkpoints: Mapping[str, Any], names: Sequence[str] | None = None) -> dict[str, Any]:
    """A checkpoint that `steepest.Muon.load_state_dict` takes, of those of another optimizer.

    source: whose they are, a name of `SOURCES`.   checkpoints: their state_dicts, whose groups follow one another.
    names: of all parameters, in that order; those that are there already stay without it.
    ValueError for what the source does not write; tensors are shared with the given ones where nothing is computed.
    """
    if source not in SOURCES:
        raise ValueError(f"source {source!r} is not known; use one of {', '.join(SOURCES)}")
    parts = [part for checkpoint in checkpoints for part in _parts(checkpoint, SOURCES[source])]
    parts = [part for part in parts if part[1]]
    count = sum(len(states) for _, states in parts)
    if names is not None and len(names) != count:
        raise ValueError(f"there are {len(names)} names for {count} parameters: give one for each, in their order")
    groups, state, first = [], {}, 0
    for values, states in parts:
        keys = list(range(first, first := first + len(states)))
        state.update({key: held for key, held in zip(keys, states, strict=True) if held})
        given = {} if names is None else {"param_names": [names[key] for key in keys]}
        groups.append({**values, **given, "params": keys})
    return {"state": state, "param_groups": groups, AUTHOR: "Muon"}


def _parts(checkpoint: Mapping[str, Any], translate: Callable[[Group, list[State]], Iterator[Part]]) -> Iterator[Part]:
    groups, state = read_groups(checkpoint)
    for group in groups:
        yield from translate(group, [dict(state.get(key, {})) for key in group["params"]])


def _torch(group: Group, states: list[State]) -> Iterator[Part]:
    if "ns_coefficients" in group:
        yield _muon(group, states, _OF_MUON)
        return
    _want(group, _OF_ADAMW)
    if group.get("amsgrad") or not group.get("decoupled_weight_decay", True):
        raise ValueError("a group has amsgrad, or weight decay in the gradient: there is no such rule here")
    yield _adamw(group, states)


def _keller_jordan(group: Group, states: list[State]) -> Iterator[Part]:
    if "nesterov" in group:
        raise ValueError("a group has 'nesterov', which KellerJordan's Muon does not write: it is of another version")
    if group.get("use_muon", "momentum" in group):
        fixed = {"nesterov": True, "ns_steps": 5, "adjust_lr_fn": "original"}
        yield _muon({**group, **fixed}, states, ("lr", "weight_decay", "momentum", *fixed))
    else:
        yield _adamw(group, states)


def _moonlight(group: Group, states: list[State]) -> Iterator[Part]:
    """One group for all; the state says which parameter is whose, and so do the two groups that are made of it."""
    _want(group, ("lr", "wd", "momentum", "nesterov", "ns_steps", "adamw_betas", "adamw_eps"))
    shared = {key: group[key] for key in _OF_ALL if key in group} | {"lr": group["lr"], "weight_decay": group["wd"]}
    for use_muon in (True, False):
        chosen = [i for i, state in enumerate(states) if bool(_take(state, "use_muon")) is use_muon]
        own = dict(shared)
        if "param_names" in group:
            own["param_names"] = [group["param_names"][i] for i in chosen]
        held = [{key: value for key, value in states[i].items() if key != "use_muon"} for i in chosen]
        if use_muon:
            own |= {key: group[key] for key in ("momentum", "nesterov", "ns_steps")}
            own["adjust_lr_fn"] = "match_rms_adamw"
            yield _muon(
                own, [_averaged(state, "momentum_buffer", own["momentum"]) for state in held], _OF_MUON, some=True
            )
        else:
            own |= {"betas": tuple(group["adamw_betas"]), "eps": group["adamw_eps"]}
            yield _adamw(own, [_renamed(state, moment1="exp_avg", moment2="exp_avg_sq") for state in held])


_RATIOS = {"spectral_norm": "spectral_unclamped", "rms_norm": "match_rms_adamw", None: "none"}


def _dion(group: Group, states: list[State]) -> Iterator[Part]:
    """The algorithm of a group has become use_muon; "lion" has been refused by then."""
    _want(group, ("lr", "mu", "beta1", "beta2", "weight_decay", "step", "epsilon", "nesterov", "flatten", "adjust_lr"))
    shared = {key: group[key] for key in (*_OF_ALL, "lr", "weight_decay") if key in group}
    if not group["use_muon"]:
        states = [{**state, "step": group["step"]} if state else state for state in states]
        own = {**shared, "betas": (group["beta1"], group["beta2"]), "eps": group["epsilon"]}
        yield _adamw(own, [_renamed(state, momentum="exp_avg", variance="exp_avg_sq") for state in states])
        return
    dimensions = {0 if group["flatten"] else state["momentum"].ndim - 2 for state in states if state} or {0}
    if len(dimensions) > 1 or max(dimensions) > 1:
        raise ValueError(
            f"a group has matrices with {' and '.join(map(str, sorted(dimensions)))} dimensions in front of them, and "
            "here a group has one number of them, 0 or 1: flatten=True, or a group for each"
        )
    ratio = {"adjust_lr_fn": _RATIOS[group["adjust_lr"]], "batch_dims": dimensions.pop()}
    own = {**shared, "momentum": group["mu"], "nesterov": group["nesterov"], **ratio}
    states = [
        _averaged(_renamed(state, momentum="momentum_buffer"), "momentum_buffer", group["mu"]) for state in states
    ]
    yield _muon(own, states, (*_OF_MUON, "batch_dims"), some=True)


def _emerging(group: Group, states: list[State]) -> Iterator[Part]:
    _want(group, ("lr", "weight_decay", "momentum_beta", "use_nesterov"))
    decoupled = group.get("use_decoupled_wd", group.get("use_decoupled_weight_decay"))
    if group["weight_decay"] and (not decoupled or group.get("use_independent_wd")):
        raise ValueError("a group's weight decay is coupled, or without the learning rate: there is no such rule here")
    own = {**group, "momentum": group["momentum_beta"], "nesterov": group["use_nesterov"]}
    yield _muon(own, states, ("lr", "weight_decay", "momentum", "nesterov"))


#: By the name of a source: what its groups and the states of their parameters become.
SOURCES: dict[str, Callable[[Group, list[State]], Iterator[Part]]] = {
    "torch": _torch,
    "kellerjordan": _keller_jordan,
    "moonlight": _moonlight,
    "dion": _dion,
    "emerging-optimizers": _emerging,
}


def _muon(group: Group, states: list[State], keys: Sequence[str], some: bool = False) -> Part:
    """A matrix group of these values and their states; some: of the keys are enough."""
    if not some:
        _want(group, keys)
    values = {key: group[key] for key in (*_OF_ALL, *keys) if key in group}
    return {**values, "use_muon": True}, [_only(state, ("momentum_buffer",)) for state in states]


def _adamw(group: Group, states: list[State]) -> Part:
    _want(group, _OF_ADAMW)
    values = {key: group[key] for key in (*_OF_ALL, *_OF_ADAMW) if key in group}
    return {**values, "use_muon": False}, [_only(state, ("step", "exp_avg", "exp_avg_sq")) for state in states]


def _want(group: Group, keys: Sequence[str]) -> None:
    lacking = [key for key in keys if key not in group]
    if lacking:
        raise ValueError(
            f"a group lacks {', '.join(lacking)} and has {', '.join(key for key in group if key != 'params')}: it is "
            "of another optimizer, or of another version of it"
        )


def _only(state: State, keys: Sequence[str]) -> State:
    """These tensors of a state, all of them, or {} of a parameter that has none yet."""
    return {key: _take(state, key) for key in keys} if state else {}


def _take(state: State, key: str) -> Any:
    if key not in state:
        raise ValueError(f"a parameter's state lacks {key!r} and has {', '.join(map(str, state)) or 'nothing'}")
    return state[key]


def _renamed(state: State, **names: str) -> State:
    return {names.get(key, key): value for key, value in state.items()}


def _averaged(state: State, key: str, momentum: float) -> State:
    """The state with a heavy ball as an average."""
    if not 0 <= momentum < 1:
        raise ValueError(f"a heavy ball with momentum {momentum} is no average")
    return {**state, key: _take(state, key) * (1 - momentum)} if state else state


# ---- the command ---------------------------------------------------------------------------------------------------


def add_options(p: argparse.ArgumentParser) -> None:
    """The options of the command."""
    p.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="what torch.save wrote: state_dicts of optimizers"
    )
    p.add_argument("--source", required=True, choices=list(SOURCES), help="whose they are")
    p.add_argument("--out", required=True, type=Path, metavar="FILE", help="for torch.load and Muon.load_state_dict")
    p.add_argument("--key", default="", metavar="A.B", help="where in the files the state_dict is (default: all of it)")
    p.add_argument(
        "--names", type=Path, metavar="FILE", help="a name a line for every parameter, in the order of the checkpoints"
    )


def run(options: argparse.Namespace) -> int:
    """Reads, translates and writes; ValueError for files that are not what they should be."""
    names = options.names.read_text().split() if options.names else None
    found = convert(options.source, *(_read(path, options.key) for path in options.files), names=names)
    torch.save(found, options.out)
    sizes = [f"{len(g['params'])} by {'Muon' if g['use_muon'] else 'AdamW'}" for g in found["param_groups"]]
    print(f"{options.out} written: {', '.join(sizes)}")
    return 0


def _read(path: Path, key: str) -> Mapping[str, Any]:
    found = torch.load(path, map_location="cpu", weights_only=True)
    for part in key.split(".") if key else ():
        if not isinstance(found, Mapping) or part not in found:
            raise ValueError(f"{path} has no {part!r}: pass --key with the place of the optimizer's state_dict")
        found = found[part]
    if not isinstance(found, Mapping):
        raise ValueError(f"{path} holds a {type(found).__name__}, no state_dict: pass --key with its place")
    return found
