"""Group dictionaries of torch.optim, made of routes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..matrices import LAYOUT_KEYS
from .overrides import RESERVED, Overrides
from .places import Routable, read_places
from .routes import Route, decide

#: The numbers of AdamW beside a matrix method, where nobody says others.
ADAMW_NUMBERS: Mapping[str, Any] = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}


def param_groups(
    params: Routable,
    *,
    overrides: Overrides | None = None,
    matrix: Mapping[str, Any] | None = None,
    adamw: Mapping[str, Any] | None = None,
    names: bool = True,
) -> list[dict[str, Any]]:
    """Groups for any optimizer of this package: the matrix groups (`use_muon=True`) first, then those of AdamW.

    Each group holds "params" ((name, tensor) pairs; tensors where no names were given), "use_muon", "param_reasons"
    (one per parameter), the values its parameters share, and the hyperparameters of `matrix` or of `adamw`, such as
    {"lr": 0.02}; a value of an override wins. Where `adamw` has a weight_decay, parameters with fewer than two
    dimensions form a group whose weight_decay is 0.

    names=False is for wrappers that take tensors alone, reorder them and fill their own options into every group, such
    as ZeroRedundancyOptimizer: "params" are tensors, there are no reasons, and the AdamW groups hold all numbers of
    AdamW, `ADAMW_NUMBERS` where `adamw` says nothing, so that an lr that is filled in reaches the matrices alone.

    Raises ValueError when no parameter of a model goes to the matrix method, and as `route` does. Tensors without names
    may all be vectors.
    """
    places, named = read_places(params)
    routes = decide(places, named, overrides)
    if named and not any(r.rule == "matrix" for r in routes):
        raise ValueError(_no_matrix(routes, sum(map(len, places))))
    shared = {"matrix": _hyperparameters("matrix", matrix), "adamw": _hyperparameters("adamw", adamw)}
    groups = _grouped(routes, named, shared)
    return groups if names else list(map(_bare, groups))


def says_how(group: Mapping[str, Any]) -> bool:
    """Whether a group says how its parameters are read as matrices, and so that they are."""
    return any(value is not None and value is not False for value in map(group.get, LAYOUT_KEYS))


def split_group(group: Mapping[str, Any], *, adamw: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """The groups that one becomes which does not say its rule: first its matrices, then what goes to AdamW.

    group: what frameworks hand over: "params" (a module, tensors or (name, tensor) pairs), perhaps "param_names" (one
        each), and values. Every part has all of the values, in their order; a parameter that needs no gradient stays.
        "adamw_lr", "adamw_betas", "adamw_eps" and "adamw_weight_decay" are the numbers of what goes to AdamW.
    adamw: as in `param_groups`, for values that the group does not have.
    """
    params, names = group["params"], group.get("param_names")
    if isinstance(params, Tensor):
        params = [params]
    if names is not None and not isinstance(params, nn.Module):
        params = list(params)
        names = names_of({"params": params, "param_names": names})
        params = list(zip(names or (), params, strict=True))
    places, named = read_places(params)
    of_adamw = {key: value for key, value in (adamw or {}).items() if key not in group}
    of_adamw |= {key: group[f"adamw_{key}"] for key in ADAMW_NUMBERS if f"adamw_{key}" in group}
    parts = _grouped(decide(places, named, None, keep_frozen=True), named, {"matrix": {}, "adamw": of_adamw})
    elsewhere = {"param_names", *(f"adamw_{key}" for key in ADAMW_NUMBERS)}
    return [{**{key: value for key, value in group.items() if key not in elsewhere}, **part} for part in parts]


def names_of(group: Mapping[str, Any]) -> list[str] | None:
    """The names of a group's parameters, None where it has none. TypeError or ValueError for what are no names of
    them.
    """
    names, count = group.get("param_names"), len(group["params"])
    if names is None:
        return None
    if not isinstance(names, list | tuple):
        raise TypeError(f"param_names should be a list of names, one for each parameter, but is: {names!r}")
    for i, name in enumerate(names):
        if not isinstance(name, str):
            raise TypeError(f"param_names should be names, and number {i} is: {name!r}")
    if len(names) != count:
        raise ValueError(f"param_names has {len(names)} names for the {count} parameters of its group")
    return list(names)


def _grouped(routes: Sequence[Route], named: bool, shared: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One group for each rule and set of values, matrices first."""
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for r in sorted(routes, key=lambda r: (r.rule == "adamw", _undecayed(r, shared["adamw"]))):
        decay = {"weight_decay": 0.0} if _undecayed(r, shared["adamw"]) else {}
        key = (r.rule, *decay, *sorted(r.values.items()))
        start = {"params": [], "use_muon": r.rule == "matrix", "param_reasons": []}
        group = groups.setdefault(key, {**start, **shared[r.rule], **decay, **r.values})
        group["params"].append((r.name, r.param) if named else r.param)
        group["param_reasons"].append(r.reason)
    return list(groups.values())


def _bare(group: dict[str, Any]) -> dict[str, Any]:
    """A group without names and reasons, with all numbers of AdamW."""
    tensors = [p[1] if isinstance(p, tuple) else p for p in group["params"]]
    values = {key: value for key, value in group.items() if key != "param_reasons"}
    return {**({} if group["use_muon"] else ADAMW_NUMBERS), **values, "params": tensors}


def _hyperparameters(name: str, values: Mapping[str, Any] | None) -> dict[str, Any]:
    if values is not None and not isinstance(values, Mapping):
        raise TypeError(f'{name} must be a mapping of hyperparameters such as {{"lr": 0.02}} but is: {values!r}')
    filled = [key for key in RESERVED if key in (values or {})]
    if filled:
        raise ValueError(f"{name} cannot set {filled[0]!r}: routing fills it in")
    return dict(values or {})


def _undecayed(r: Route, adamw: Mapping[str, Any]) -> bool:
    return r.rule == "adamw" and r.param.ndim < 2 and "weight_decay" in adamw


def _no_matrix(routes: Sequence[Route], total: int) -> str:
    """What was found instead of matrices, and the way out."""
    if not routes:
        return (
            f"no trainable parameter among {total}: all are frozen (requires_grad=False, as in a state_dict) or "
            "excluded. Unfreeze some, or pass model.named_parameters()"
        )
    counts = Counter(r.reason for r in routes).most_common()
    reasons = "; ".join(f"{count} x {reason}" for reason, count in counts[:6]) + ("; ..." if len(counts) > 6 else "")
    candidate = next((r.name for r in routes if r.param.ndim >= 2), None)
    override = "" if candidate is None else f', or send one to the matrix method: overrides={{{candidate!r}: "matrix"}}'
    return f"none of {len(routes)} parameters goes to the matrix method ({reasons}). Use torch.optim.AdamW{override}"
