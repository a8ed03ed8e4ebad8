"""`steepest convert`: checkpoints of other optimizers as those of `steepest.Muon` and `steepest.SOAP`.

    torch                 torch.optim.Muon, and torch.optim.AdamW for the rest: one file or two
    kellerjordan          Muon, MuonWithAuxAdam and their single-device forms (github.com/KellerJordan/Muon)
    moonlight             Muon of Moonlight's toy_train.py (github.com/MoonshotAI/Moonlight)
    dion                  Muon of dion, with its AdamW groups (github.com/microsoft/dion)
    emerging-optimizers   Muon of Emerging-Optimizers (github.com/NVIDIA-NeMo/Emerging-Optimizers)
    heavyball             SOAP of HeavyBall 3, as SOAP(parity="authors") (github.com/HomebrewML/HeavyBall)

A heavy ball (moonlight, dion), m <- mu m + g, is 1 / (1 - mu) times the average that is kept here, and becomes it. What
is not in those checkpoints stays the optimizer's own: for emerging-optimizers the ratio of shapes, for all of them the
polynomials (`polar=`). eps of dion and Moonlight is another one: absolute in the iteration, and beside an uncorrected
second moment in Moonlight's AdamW.

HeavyBall's averages are corrected for their bias as they are kept, and those of matrices lie in the eigenbases: they
become plain ones, that of the gradient in the weight's variables. Refreshes fall on the same steps where 1 / frequency
is a binary fraction, else a step before or after at times: HeavyBall adds it up in floating point. It decays before an
update, not after it (lr weight_decay of an update), takes the larger of sqrt(v) and eps, and iterates a factor with
64 n machine epsilons of its largest eigenvalue added; its clipping is not in the checkpoint.

Emerging-Optimizers' SOAP is refused: checkpoints say neither how its averages are to be corrected nor whether factors
are KL-Shampoo's. A new run has its rule by SOAP(parity="emerging-optimizers").

Layouts are those of the public code; keys of another version are a ValueError.

    state = convert("torch", muon.state_dict(), adamw.state_dict(), names=names)
    optimizer = steepest.Muon(model, ...)
    optimizer.load_state_dict(state)

With names, one for each parameter in the order of the checkpoints, state goes to its name; without them the order and
the groups of the optimizer must be the checkpoints', matrices before the rest where a source has both in one group.
"""

from __future__ import annotations

import argparse
import re
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
    """A checkpoint that `load_state_dict` of `steepest.Muon` (heavyball: `steepest.SOAP`) takes, of those of another.

    source: whose they are, a name of `SOURCES`.   checkpoints: their state_dicts, whose groups follow one another.
    names: of all parameters, in that order; those that are there already stay without it.
    ValueError for what the source does not write, and for what would not go on as it has begun; tensors are shared with
    the given ones where nothing is computed.
    """
    if source not in SOURCES:
        raise ValueError(f"source {source!r} is not known; use one of {', '.join(SOURCES)}")
    read = [(checkpoint, *read_groups(checkpoint)) for checkpoint in checkpoints]
    count = sum(len(group["params"]) for _, groups, _ in read for group in groups)
    if names is not None and len(names) != count:
        raise ValueError(f"there are {len(names)} names for {count} parameters: give one for each, in their order")
    coming = iter(names or ())
    parts: list[Part] = []
    for checkpoint, groups, state in read:
        beside = {key: value for key, value in checkpoint.items() if key not in ("state", "param_groups")}
        for group in groups:
            if names is not None:
                group["param_names"] = [next(coming) for _ in group["params"]]
            states = [dict(state.get(key, {})) for key in group["params"]]
            parts += [part for part in SOURCES[source]({**beside, **group}, states) if part[1]]
    return {**_numbered(parts), AUTHOR: "SOAP" if source == "heavyball" else "Muon"}


def _numbered(parts: Sequence[Part]) -> dict[str, Any]:
    """The parts as a state_dict, which numbers parameters through all groups."""
    groups, state, first = [], {}, 0
    for values, states in parts:
        keys = list(range(first, first := first + len(states)))
        state.update({key: tensors for key, tensors in zip(keys, states, strict=True) if tensors})
        groups.append({**values, "params": keys})
    return {"state": state, "param_groups": groups}


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
        values = {**shared, **_names_of(group, chosen)}
        kept = [{key: value for key, value in states[i].items() if key != "use_muon"} for i in chosen]
        if use_muon:
            values |= {key: group[key] for key in ("momentum", "nesterov", "ns_steps")}
            values["adjust_lr_fn"] = "match_rms_adamw"
            averaged = [_averaged(state, "momentum_buffer", values["momentum"]) for state in kept]
            yield _muon(values, averaged, _OF_MUON, some=True)
        else:
            values |= {"betas": tuple(group["adamw_betas"]), "eps": group["adamw_eps"]}
            yield _adamw(values, [_renamed(state, moment1="exp_avg", moment2="exp_avg_sq") for state in kept])


def _names_of(group: Group, chosen: Sequence[int]) -> Group:
    """The names of these parameters of a group, where it has names."""
    return {"param_names": [group["param_names"][i] for i in chosen]} if "param_names" in group else {}


_RATIOS = {"spectral_norm": "spectral_unclamped", "rms_norm": "match_rms_adamw", None: "none"}


def _dion(group: Group, states: list[State]) -> Iterator[Part]:
    """The algorithm of a group has become use_muon; "lion" has been refused by then."""
    _want(group, ("lr", "mu", "beta1", "beta2", "weight_decay", "step", "epsilon", "nesterov", "flatten", "adjust_lr"))
    shared = {key: group[key] for key in (*_OF_ALL, "lr", "weight_decay") if key in group}
    if not group["use_muon"]:
        states = [{**state, "step": group["step"]} if state else state for state in states]
        values = {**shared, "betas": (group["beta1"], group["beta2"]), "eps": group["epsilon"]}
        yield _adamw(values, [_renamed(state, momentum="exp_avg", variance="exp_avg_sq") for state in states])
        return
    dimensions = {0 if group["flatten"] else state["momentum"].ndim - 2 for state in states if state} or {0}
    if len(dimensions) > 1 or max(dimensions) > 1:
        raise ValueError(
            f"a group has matrices with {' and '.join(map(str, sorted(dimensions)))} dimensions in front of them, and "
            "here a group has one number of them, 0 or 1: flatten=True, or a group for each"
        )
    ratio = {"adjust_lr_fn": _RATIOS[group["adjust_lr"]], "batch_dims": dimensions.pop()}
    values = {**shared, "momentum": group["mu"], "nesterov": group["nesterov"], **ratio}
    states = [
        _averaged(_renamed(state, momentum="momentum_buffer"), "momentum_buffer", group["mu"]) for state in states
    ]
    yield _muon(values, states, (*_OF_MUON, "batch_dims"), some=True)


def _emerging(group: Group, states: list[State]) -> Iterator[Part]:
    if "shampoo_beta" in group or any("Q_L" in state for state in states):
        raise ValueError(
            "it is Emerging-Optimizers' SOAP, whose checkpoint does not say how to read it (bias corrections, whether "
            "factors are KL-Shampoo's): begin steepest.SOAP anew, with parity='emerging-optimizers' for the same rule"
        )
    _want(group, ("lr", "weight_decay", "momentum_beta", "use_nesterov"))
    decoupled = group.get("use_decoupled_wd", group.get("use_decoupled_weight_decay"))
    method = "independent" if group.get("use_independent_wd") else "decoupled" if decoupled else "l2"
    values = {**group, "momentum": group["momentum_beta"], "nesterov": group["use_nesterov"]}
    values["weight_decay_method"] = method if group["weight_decay"] else "decoupled"
    yield _muon(values, states, ("lr", "weight_decay", "momentum", "nesterov", "weight_decay_method"))


# ---- HeavyBall's SOAP ------------------------------------------------------------------------------------------------

#: What a group says of a rule that is none of SOAP's.
_OTHERWISE: dict[str, Any] = dict.fromkeys(
    ("caution", "mars", "palm", "split", "precondition_1d", "precond_grad_accum"), False
) | {"storage_dtype": "float32", "ecc": None, "param_ecc": None, "init_factor": 0.0}


def _heavyball(group: Group, states: list[State]) -> Iterator[Part]:
    """One group for all: matrices, and vectors, which AdamW takes; both begin a step late, as SOAP does here."""
    keys = ("lr", "base_lr", "weight_decay", "betas", "eps", "shampoo_beta", "max_precond_dim", "cautious_weight_decay")
    _want(group, (*keys, "step_count", "warmup_steps", "heavyball"))
    for key, value in _OTHERWISE.items():
        if group.get(key, value) not in (value, None):
            raise ValueError(f"a group has {key}={group[key]!r}: there is no such rule here")
    steps, outside = int(group["step_count"]), group["heavyball"]
    if outside.get("use_ema"):
        raise ValueError("the checkpoint has averages of the weights (use_ema): there are none here")
    if steps < group["warmup_steps"]:
        raise ValueError(
            f"its warm-up of {group['warmup_steps']} steps is not over after {steps}: load a later checkpoint"
        )
    every, clock = _refreshes(outside.get("inner_group", {}), steps)
    shared = {key: group[key] for key in _OF_ALL if key in group and key != "param_names"}
    shared |= {"lr": group["base_lr"], "weight_decay": group["weight_decay"], "betas": tuple(group["betas"])}
    shared |= {"eps": group["eps"], "cautious_wd": bool(group["cautious_weight_decay"])}
    of_soap = {"shampoo_beta": group["shampoo_beta"], "max_preconditioner_dim": group["max_precond_dim"]}
    of_soap |= {"precondition_frequency": every, "parity": "authors", "first_step": "skip"}
    states = [_of_chain(state) for state in states]
    for use_muon in (True, False):
        chosen = [i for i, state in enumerate(states) if bool(state and state["exp_avg"].ndim > 1) is use_muon]
        values = {**shared, **_names_of(group, chosen), **(of_soap if use_muon else {}), "use_muon": use_muon}
        yield values, [_uncorrected(states[i], shared["betas"], steps, clock) for i in chosen]


def _refreshes(counts: Mapping[str, Any], steps: int) -> tuple[int, int]:
    """(steps from a refresh to the next, what our clock should show so that the next one is in the same step).

    HeavyBall refreshes when a sum of 1 / frequency passes a whole number, ours when the clock, before a step, is a
    multiple of the frequency.
    """
    total, number = counts.get("cumulative_prob", 0), counts.get("cumulative_prob_prob_step", 0)
    if not steps:
        raise ValueError("no step has been taken, so there is nothing to convert: begin steepest.SOAP anew")
    every = round(number / total) if total else 0
    if not every or abs(total * every / number - 1) > 1e-9:
        raise ValueError(
            f"bases have been refreshed {total:.4g} times in {number} steps: a schedule of refreshes has no "
            "counterpart here, with a whole number for precondition_frequency"
        )
    until, later = 1, total + 1 / every
    while int(later) == int(total):
        until, later = until + 1, later + 1 / every
    return every, every * (2 + steps // every) + 1 - min(until, every)


def _of_chain(state: State) -> State:
    """HeavyBall's state of a parameter by plain names and without the axis of its bucket; {} of one that has none."""
    if not state:
        return {}
    views = list(state.values())
    if len(views) != 1 or not isinstance(views[0], Mapping):
        raise ValueError("a parameter's state is in pieces (split), or of another version of HeavyBall")
    plain: State = {}
    for key, value in views[0].items():
        name = re.fullmatch(r"scale_by_soap_(exp_avg|exp_avg_sq|Q|GG)_\d+", str(key))
        if name is not None:
            plain[name[1]] = value
        elif key not in ("step", "is_initialized"):
            raise ValueError(f"a parameter's state has {key!r}, which SOAP of HeavyBall 3 does not write")
    for key in ("exp_avg", "exp_avg_sq", "Q", "GG"):
        _take(plain, key)
    shape = plain["exp_avg"].shape
    if shape[0] != 1 or not 2 <= len(shape) <= 3:
        raise ValueError(
            f"a parameter's averages have the shape {tuple(shape)}: of more than two dimensions, which are merged "
            "otherwise there, or of a bucket"
        )
    return {**plain, "exp_avg": plain["exp_avg"][0], "exp_avg_sq": plain["exp_avg_sq"][0]}


def _uncorrected(state: State, betas: tuple[float, float], steps: int, clock: int) -> State:
    """Our state of a parameter, of which there has been a gradient in all of so many steps."""
    if not state:
        return {}
    t = steps - 1  # the first only makes the bases
    m, v = (state[key] * (1 - beta**t) for key, beta in zip(("exp_avg", "exp_avg_sq"), betas, strict=True))
    count = torch.tensor(float(t))
    if m.ndim < 2:
        return {"step": count, "exp_avg": m, "exp_avg_sq": v}
    if 1 in m.shape:
        raise ValueError(f"a matrix of shape {tuple(m.shape)} has no factor for a side of length 1 there, and one here")
    none = m.new_zeros(0)
    factors, bases = ([none if t is None else t for t in _take(state, key)] for key in ("GG", "Q"))
    for side, basis in enumerate(bases):
        if basis.numel():
            m = basis[0] @ m if side == 0 else m @ basis[0].mT
    sides = {"left": factors[0], "right": factors[1], "left_basis": bases[0], "right_basis": bases[1]}
    counts = {"step": count, "clock": torch.tensor(clock), "learned": torch.tensor(float(steps))}
    return {"momentum_buffer": m, "exp_avg_sq": v[None], **sides, **counts}


#: By the name of a source: what its groups and the states of their parameters become.
SOURCES: dict[str, Callable[[Group, list[State]], Iterator[Part]]] = {
    "torch": _torch,
    "kellerjordan": _keller_jordan,
    "moonlight": _moonlight,
    "dion": _dion,
    "emerging-optimizers": _emerging,
    "heavyball": _heavyball,
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
    p.add_argument("--out", required=True, type=Path, metavar="FILE", help="for torch.load and load_state_dict")
    p.add_argument("--key", default="", metavar="A.B", help="where in the files the state_dict is (default: all of it)")
    p.add_argument(
        "--names", type=Path, metavar="FILE", help="a name a line for every parameter, in the order of the checkpoints"
    )


def run(options: argparse.Namespace) -> int:
    """Reads, translates and writes; ValueError for files that are not what they should be."""
    names = options.names.read_text().split() if options.names else None
    converted = convert(options.source, *(_read(path, options.key) for path in options.files), names=names)
    torch.save(converted, options.out)
    rules = [converted[AUTHOR] if group["use_muon"] else "AdamW" for group in converted["param_groups"]]
    sizes = [f"{len(group['params'])} by {rule}" for group, rule in zip(converted["param_groups"], rules, strict=True)]
    print(f"{options.out} written: {', '.join(sizes)}")
    return 0


def _read(path: Path, key: str) -> Mapping[str, Any]:
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder, as torch.distributed.checkpoint writes them: have it made one file by "
            f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path} FILE"
        )
    if not path.exists():
        raise ValueError(f"there is no file {path}")
    value = torch.load(path, map_location="cpu", weights_only=True)
    for part in key.split(".") if key else ():
        if not isinstance(value, Mapping) or part not in value:
            raise ValueError(f"{path} has no {part!r}: pass --key with the place of the optimizer's state_dict")
        value = value[part]
    if not isinstance(value, Mapping):
        raise ValueError(f"{path} holds a {type(value).__name__}, no state_dict: pass --key with its place")
    return value
