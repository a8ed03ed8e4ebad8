"""Muon and its AdamW: of torch, KellerJordan, Moonlight, dion and Emerging-Optimizers, and what they become here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .reading import OF_ADAMW, OF_ALL, Group, Part, State, adamw, names_of, only, renamed, switch, take, tensor, want
from .soap import of_emerging_soap

OF_MUON = ("lr", "weight_decay", "momentum", "nesterov", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")


def of_torch(group: Group, states: list[State]) -> Iterator[Part]:
    if "ns_coefficients" in group:
        yield muon(group, states, OF_MUON)
        return
    want(group, OF_ADAMW)
    if switch(group, "amsgrad", False) or not switch(group, "decoupled_weight_decay", True):
        raise ValueError("a group has amsgrad, or weight decay in the gradient: there is no such rule here")
    yield adamw(group, states)


def of_keller_jordan(group: Group, states: list[State]) -> Iterator[Part]:
    if "nesterov" in group:
        raise ValueError("a group has 'nesterov', which KellerJordan's Muon does not write: it is of another version")
    if switch(group, "use_muon", "momentum" in group):
        fixed = {"nesterov": True, "ns_steps": 5, "adjust_lr_fn": "original"}
        yield muon({**group, **fixed}, states, ("lr", "weight_decay", "momentum", *fixed))
    else:
        yield adamw(group, states)


def of_moonlight(group: Group, states: list[State]) -> Iterator[Part]:
    """One group for all; the state says which parameter is whose, and so do the two groups that are made of it."""
    want(group, ("lr", "wd", "momentum", "nesterov", "ns_steps", "adamw_betas", "adamw_eps"))
    shared = {key: group[key] for key in OF_ALL if key in group} | {"lr": group["lr"], "weight_decay": group["wd"]}
    for use_muon in (True, False):
        chosen = [i for i, state in enumerate(states) if _uses_muon(state) is use_muon]
        values = {**shared, **names_of(group, chosen)}
        kept = [{key: value for key, value in states[i].items() if key != "use_muon"} for i in chosen]
        if use_muon:
            values |= {key: group[key] for key in ("momentum", "nesterov", "ns_steps")}
            values["adjust_lr_fn"] = "match_rms_adamw"
            averages = [averaged(state, "momentum_buffer", values["momentum"]) for state in kept]
            yield muon(values, averages, OF_MUON, some=True)
        else:
            values |= {"betas": tuple(group["adamw_betas"]), "eps": group["adamw_eps"]}
            yield adamw(values, [renamed(state, moment1="exp_avg", moment2="exp_avg_sq") for state in kept])


def _uses_muon(state: State) -> bool:
    value = take(state, "use_muon")
    if not isinstance(value, bool):
        raise TypeError(f"a parameter's state should have True or False as 'use_muon' but has: {value!r}")
    return value


_RATIOS = {"spectral_norm": "spectral_unclamped", "rms_norm": "match_rms_adamw", None: "none"}


def of_dion(group: Group, states: list[State]) -> Iterator[Part]:
    """The algorithm of a group has become use_muon; "lion" has been refused by then."""
    want(group, () if "use_muon" in group else ("algorithm",))
    want(group, ("lr", "mu", "beta1", "beta2", "weight_decay", "step", "epsilon", "nesterov", "flatten", "adjust_lr"))
    if group["adjust_lr"] not in tuple(_RATIOS):
        raise ValueError(
            f"a group has adjust_lr={group['adjust_lr']!r}, which dion does not write: it writes "
            f"{', '.join(map(repr, _RATIOS))}"
        )
    shared = {key: group[key] for key in (*OF_ALL, "lr", "weight_decay") if key in group}
    if not group["use_muon"]:
        states = [{**state, "step": group["step"]} if state else state for state in states]
        values = {**shared, "betas": (group["beta1"], group["beta2"]), "eps": group["epsilon"]}
        yield adamw(values, [renamed(state, momentum="exp_avg", variance="exp_avg_sq") for state in states])
        return
    flattened = switch(group, "flatten", False)
    dimensions = {0 if flattened else tensor(state, "momentum").ndim - 2 for state in states if state} or {0}
    if len(dimensions) > 1 or max(dimensions) > 1:
        raise ValueError(
            f"a group has matrices with {' and '.join(map(str, sorted(dimensions)))} dimensions in front of them, and "
            "here a group has one number of them, 0 or 1: flatten=True, or a group for each"
        )
    ratio = {"adjust_lr_fn": _RATIOS[group["adjust_lr"]], "batch_dims": dimensions.pop()}
    values = {**shared, "momentum": group["mu"], "nesterov": group["nesterov"], **ratio}
    states = [averaged(renamed(state, momentum="momentum_buffer"), "momentum_buffer", group["mu"]) for state in states]
    yield muon(values, states, (*OF_MUON, "batch_dims"), some=True)


def of_emerging(group: Group, states: list[State]) -> Iterator[Part]:
    if "shampoo_beta" in group:
        yield of_emerging_soap(group, states)
        return
    want(group, ("lr", "weight_decay", "momentum_beta", "use_nesterov"))
    decoupled = switch(group, "use_decoupled_wd", switch(group, "use_decoupled_weight_decay", False))
    method = "independent" if switch(group, "use_independent_wd", False) else "decoupled" if decoupled else "l2"
    values = {**group, "momentum": group["momentum_beta"], "nesterov": group["use_nesterov"]}
    values["weight_decay_method"] = method if group["weight_decay"] else "decoupled"
    yield muon(values, states, ("lr", "weight_decay", "momentum", "nesterov", "weight_decay_method"))


def muon(group: Group, states: list[State], keys: Sequence[str], some: bool = False) -> Part:
    """A matrix group of these values and their states; some: of the keys are enough."""
    if not some:
        want(group, keys)
    values = {key: group[key] for key in (*OF_ALL, *keys) if key in group}
    return {**values, "use_muon": True}, [only(state, ("momentum_buffer",)) for state in states]


def averaged(state: State, key: str, momentum: float) -> State:
    """The state with a heavy ball as an average."""
    if not 0 <= momentum < 1:
        raise ValueError(f"a heavy ball with momentum {momentum} is no average")
    return {**state, key: tensor(state, key) * (1 - momentum)} if state else state
