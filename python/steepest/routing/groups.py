"""Group dictionaries of torch.optim, made of routes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

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

    Raises ValueError when no parameter goes to the matrix method, and as `route` does.
    """
    places, named = read_places(params)
    routes = decide(places, named, overrides)
    if not any(r.rule == "matrix" for r in routes):
        raise ValueError(_no_matrix(routes, sum(map(len, places))))
    shared = {"matrix": _hyperparameters("matrix", matrix), "adamw": _hyperparameters("adamw", adamw)}
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for r in sorted(routes, key=lambda r: (r.rule == "adamw", _undecayed(r, shared["adamw"]))):
        decay = {"weight_decay": 0.0} if _undecayed(r, shared["adamw"]) else {}
        key = (r.rule, *decay, *sorted(r.values.items()))
        start = {"params": [], "use_muon": r.rule == "matrix", **({"param_reasons": []} if names else {})}
        filled = ADAMW_NUMBERS if r.rule == "adamw" and not names else {}
        group = groups.setdefault(key, {**start, **filled, **shared[r.rule], **decay, **r.values})
        group["params"].append((r.name, r.param) if named and names else r.param)
        if names:
            group["param_reasons"].append(r.reason)
    return list(groups.values())


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
