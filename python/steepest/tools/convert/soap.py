"""SOAP of Emerging-Optimizers and of HeavyBall, and what becomes of its averages, factors and bases here."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steepest.optimizer.option_types import AT_LEAST_ZERO, check_option

from .reading import OF_ALL, Group, Part, State, names_of, switch, take, tensor, want, whole

# ---- Emerging-Optimizers ---------------------------------------------------------------------------------------------


def of_emerging_soap(group: Group, states: list[State]) -> Part:
    """Averages of matrices lie in the eigenbases there, corrected for their bias as they are used; factors are so as
    they are kept.
    """
    keys = ("lr", "weight_decay", "betas", "shampoo_beta", "eps")
    want(group, keys)
    values = {key: group[key] for key in (*OF_ALL, *keys) if key in group}
    values |= {"betas": tuple(group["betas"]), "use_muon": True}
    values |= {"parity": "emerging-optimizers", "precondition_frequency": 1}
    converted = [_of_matrix(state, values) for state in states]
    longest = max((side for state in converted if state for side in state["momentum_buffer"].shape), default=0)
    return {**values, "max_preconditioner_dim": max(_NO_LIMIT, longest)}, converted


_NO_LIMIT = 10000  # the default here; every side has a factor there


def _of_matrix(state: State, group: Group) -> State:
    """Our state of a matrix; {} of one that has not been stepped."""
    t = whole(take(state, "step"), "a parameter's step") if state else 0
    if not t:
        return {}
    m, v, *factors = (tensor(state, key) for key in ("exp_avg", "exp_avg_sq", "L", "R"))
    bases = [tensor(state, key) for key in ("Q_L", "Q_R")]
    shapes = [(side, side) for side in m.shape]
    if m.ndim != 2 or v.shape != m.shape or any([tuple(t.shape) for t in pair] != shapes for pair in (factors, bases)):
        raise ValueError(
            f"a parameter's averages have the shapes {tuple(m.shape)} and {tuple(v.shape)}, and its factors "
            f"{', '.join(str(tuple(t.shape)) for t in factors)}: they are of no matrix"
        )
    _check_averages(v, factors, t, group)
    count = torch.tensor(float(t))
    sides = {"left": factors[0], "right": factors[1], "left_basis": bases[0], "right_basis": bases[1]}
    counts = {"step": count, "clock": torch.tensor(t), "learned": count.clone()}
    ours = {"momentum_buffer": bases[0] @ m @ bases[1].mT, "exp_avg_sq": v[None]}
    return {**ours, **{key: factor[None] for key, factor in sides.items()}, **counts}


def _check_averages(v: Tensor, factors: Sequence[Tensor], t: int, group: Group) -> None:
    """ValueError unless factors are averages of G G^T and G^T G: their traces are one average of |G|^2 then, and so is
    the sum of v, which no rotation changes, where it has the same decay rate.
    """
    beta2, shampoo_beta = group["betas"][1], group["shampoo_beta"]
    squares = [float(factor.double().trace()) for factor in factors]
    if beta2 == shampoo_beta:
        squares.append(float(v.double().sum()) / (1 - beta2**t))
    if max(squares) - min(squares) > _APART * max(squares):
        raise ValueError(
            "a matrix has factors whose traces and the sum of exp_avg_sq should be one average of |G|^2, but are "
            f"{', '.join(f'{square:.6g}' for square in squares)}: they are KL-Shampoo's (use_kl_shampoo=True, REKLS, "
            "StackedSoap), not corrected (correct_shampoo_beta_bias=False), or without a weight decay that is in the "
            "gradient ('l2'), and this rule is none of these: begin steepest.SOAP or steepest.KLSOAP anew"
        )


_APART = 1e-2  # what products in 16 bits leave of one average


# ---- HeavyBall -------------------------------------------------------------------------------------------------------

#: What a group says of a rule that is none of SOAP's.
_OTHERWISE: dict[str, Any] = dict.fromkeys(
    ("caution", "mars", "palm", "split", "precondition_1d", "precond_grad_accum"), False
) | {"storage_dtype": "float32", "ecc": None, "param_ecc": None, "init_factor": 0.0}


def of_heavyball(group: Group, states: list[State]) -> Iterator[Part]:
    """One group for all: matrices, and vectors, which AdamW takes; both begin a step late, as SOAP does here."""
    keys = ("lr", "base_lr", "weight_decay", "betas", "eps", "shampoo_beta", "max_precond_dim", "cautious_weight_decay")
    want(group, (*keys, "step_count", "warmup_steps", "heavyball"))
    for key, value in _OTHERWISE.items():
        if isinstance(group.get(key), Tensor) or group.get(key, value) not in (value, None):
            raise ValueError(f"a group has {key}={group[key]!r}: there is no such rule here")
    steps, warmup = (whole(group[key], f"a group's {key}") for key in ("step_count", "warmup_steps"))
    outside = group["heavyball"]
    counts = outside.get("inner_group", {}) if isinstance(outside, Mapping) else None
    if not isinstance(counts, Mapping):
        raise TypeError(f"'heavyball' should be a dictionary with a dictionary 'inner_group' but is: {outside!r}")
    if switch(dict(outside), "use_ema", False):
        raise ValueError("the checkpoint has averages of the weights (use_ema): there are none here")
    if steps < warmup:
        raise ValueError(f"its warm-up of {warmup} steps is not over after {steps}: load a later checkpoint")
    every, clock = _refreshes(counts, steps)
    shared = {key: group[key] for key in OF_ALL if key in group and key != "param_names"}
    shared |= {"lr": group["base_lr"], "weight_decay": group["weight_decay"], "betas": tuple(group["betas"])}
    shared |= {"eps": group["eps"], "cautious_wd": switch(group, "cautious_weight_decay", False)}
    of_soap = {"shampoo_beta": group["shampoo_beta"], "max_preconditioner_dim": group["max_precond_dim"]}
    of_soap |= {"precondition_frequency": every, "parity": "authors", "first_step": "skip"}
    states = [_of_chain(state) for state in states]
    for use_muon in (True, False):
        chosen = [i for i, state in enumerate(states) if bool(state and state["exp_avg"].ndim > 1) is use_muon]
        values = {**shared, **names_of(group, chosen), **(of_soap if use_muon else {}), "use_muon": use_muon}
        yield values, [_uncorrected(states[i], shared["betas"], steps, clock) for i in chosen]


def _refreshes(counts: Mapping[str, Any], steps: int) -> tuple[int, int]:
    """(steps from a refresh to the next, what our clock should show so that the next one is in the same step).

    HeavyBall refreshes when a sum of 1 / frequency passes a whole number, ours when the clock, before a step, is a
    multiple of the frequency.
    """
    total, number = counts.get("cumulative_prob", 0.0), counts.get("cumulative_prob_prob_step", 0)
    for value in (total, number):
        check_option("a count of refreshes", value, AT_LEAST_ZERO)
    total, number = float(total), float(number)
    if not steps:
        raise ValueError("no step has been taken, so there is nothing to convert: begin steepest.SOAP anew")
    every = round(number / total) if total else 0
    if not every or abs(total * every / number - 1) > 1e-9:
        raise ValueError(
            f"bases have been refreshed {total:.4g} times in {number:.4g} steps: a schedule of refreshes has no "
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
    m, v = tensor(plain, "exp_avg"), tensor(plain, "exp_avg_sq")
    shape = m.shape
    if not 2 <= len(shape) <= 3 or shape[0] != 1:
        raise ValueError(
            f"a parameter's averages have the shape {tuple(shape)}: of more than two dimensions, which are merged "
            "otherwise there, or of a bucket"
        )
    if len(shape) == 3 and 1 in shape[1:]:
        raise ValueError(
            f"a matrix of shape {tuple(shape[1:])} has no factor for a side of length 1 there, and one here"
        )
    for key in ("Q", "GG"):
        if not _of_sides(take(plain, key), shape[1:]) or v.shape != shape:
            raise ValueError(
                f"a parameter of shape {tuple(shape[1:])} has averages of other shapes, or no list of matrices, one a "
                f"side, as {key!r}"
            )
    return {**plain, "exp_avg": m[0], "exp_avg_sq": v[0]}


def _of_sides(value: Any, lengths: Sequence[int]) -> bool:
    """Whether it lists a square matrix of each of these lengths, or None in its place; of a vector anything does."""
    if len(lengths) < 2:
        return True
    if not isinstance(value, list | tuple) or len(value) != len(lengths):
        return False
    squares = zip(value, lengths, strict=True)
    return all(t is None or (isinstance(t, Tensor) and t.shape == (1, n, n)) for t, n in squares)


def _uncorrected(state: State, betas: tuple[float, float], steps: int, clock: int) -> State:
    """Our state of a parameter, of which there has been a gradient in all of so many steps."""
    if not state:
        return {}
    t = steps - 1  # the first only makes the bases
    m, v = (state[key] * (1 - beta**t) for key, beta in zip(("exp_avg", "exp_avg_sq"), betas, strict=True))
    count = torch.tensor(float(t))
    if m.ndim < 2:
        return {"step": count, "exp_avg": m, "exp_avg_sq": v}
    none = m.new_zeros(0)
    factors, bases = ([none if t is None else t for t in take(state, key)] for key in ("GG", "Q"))
    for side, basis in enumerate(bases):
        if basis.numel():
            m = basis[0] @ m if side == 0 else m @ basis[0].mT
    sides = {"left": factors[0], "right": factors[1], "left_basis": bases[0], "right_basis": bases[1]}
    counts = {"step": count, "clock": torch.tensor(clock), "learned": torch.tensor(float(steps))}
    return {"momentum_buffer": m, "exp_avg_sq": v[None], **sides, **counts}
