"""`steepest convert`: checkpoints of other optimizers as those of `steepest.Muon` and `steepest.SOAP`.

    torch                 torch.optim.Muon, and torch.optim.AdamW for the rest: one file or two
    kellerjordan          Muon, MuonWithAuxAdam and their single-device forms (github.com/KellerJordan/Muon)
    moonlight             Muon of Moonlight's toy_train.py (github.com/MoonshotAI/Moonlight)
    dion                  Muon of dion, with its AdamW groups (github.com/microsoft/dion)
    emerging-optimizers   Muon of Emerging-Optimizers (github.com/NVIDIA-NeMo/Emerging-Optimizers), and its SOAP
                          (legacy_soap) as SOAP(parity="emerging-optimizers")
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

Checkpoints of Emerging-Optimizers' SOAP do not say with which arguments it was made. Those that change what its
averages are of (use_kl_shampoo, and correct_shampoo_beta_bias=False of a short run) are seen in the averages and
refused; the others stay the optimizer's: refresh="eigh" for use_eigh, weight_decay_method. Of correct_bias=False,
nesterov, max_update_rms and power_iter_steps there is no counterpart: the run goes on without them. Until factors have
full rank rounding has a say in its steps, there and here.

Layouts are those of the public code; keys of another version are a ValueError.

    state = convert("torch", muon.state_dict(), adamw.state_dict(), names=names)
    optimizer = steepest.Muon(model, ...)
    optimizer.load_state_dict(state)

With names, one for each parameter in the order of the checkpoints, state goes to its name; without them the order and
the groups of the optimizer must be the checkpoints', matrices before the rest where a source has both in one group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from steepest.optimizer.checkpoint_matching import AUTHOR, read_groups

from .muon import of_dion, of_emerging, of_keller_jordan, of_moonlight, of_torch
from .reading import Group, Part, State
from .soap import of_heavyball

__all__ = ["SOURCES", "convert"]

#: By the name of a source: what its groups and the states of their parameters become.
SOURCES: dict[str, Callable[[Group, list[State]], Iterator[Part]]] = {
    "torch": of_torch,
    "kellerjordan": of_keller_jordan,
    "moonlight": of_moonlight,
    "dion": of_dion,
    "emerging-optimizers": of_emerging,
    "heavyball": of_heavyball,
}


def convert(source: str, *checkpoints: Mapping[str, Any], names: Sequence[str] | None = None) -> dict[str, Any]:
    """A checkpoint that `load_state_dict` of `steepest.Muon` (or, of those of SOAP, `steepest.SOAP`) takes, of those of
    another.

    source: whose they are, a name of `SOURCES`.   checkpoints: their state_dicts, whose groups follow one another.
    names: of all parameters, in that order; those that are there already stay without it.
    ValueError for what the source does not write, and for what would not go on as it has begun, TypeError for values of
    other types; tensors are shared with the given ones where nothing is computed.
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
    soaps = ["parity" in values for values, _ in parts if values.get("use_muon")]
    if any(soaps) and not all(soaps):
        raise ValueError("some groups are Muon's and some are SOAP's: convert each optimizer's checkpoint by itself")
    return {**_numbered(parts), AUTHOR: "SOAP" if any(soaps) or source == "heavyball" else "Muon"}


def _numbered(parts: Sequence[Part]) -> dict[str, Any]:
    """The parts as a state_dict, which numbers parameters through all groups."""
    groups, state, first = [], {}, 0
    for values, states in parts:
        keys = list(range(first, first := first + len(states)))
        state.update({key: tensors for key, tensors in zip(keys, states, strict=True) if tensors})
        groups.append({**values, "params": keys})
    return {"state": state, "param_groups": groups}
