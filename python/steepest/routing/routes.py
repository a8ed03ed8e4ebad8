"""Routes of parameters, made of places: overrides first, then the rules, then a matrix."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from .fused import fused_layout
from .overrides import Override, Overrides, find, read_overrides
from .places import Place, Routable, read_places
from .rules import layout, read_pieces, reading, send_to_adamw

# A 2-D tensor with a side this long, this many times the other, is more often a vocabulary than a hidden layer:
# GPT-2 50257 x 768 (65x), Llama 3 8B 128256 x 4096 (31x); hidden layers mostly stay at 4x.
_VOCABULARY_SIDE, _VOCABULARY_RATIO = 8192, 8


@dataclass(frozen=True, eq=False)
class Route:
    """The rule that one parameter goes to, and why.

    values: group values (split_sizes, num_heads, batch_dims, an override's).   fused: those that would take a fused
    projection apart which is one matrix here; see `fused_layouts`.
    """

    name: str
    param: Tensor
    rule: Literal["matrix", "adamw"]
    reason: str
    values: Mapping[str, Any] = field(default_factory=dict)
    fused: Mapping[str, Any] = field(default_factory=dict)


def route(params: Routable, *, overrides: Overrides | None = None) -> list[Route]:
    """One `Route` per trainable parameter, in order of first appearance; tied parameters appear once.

    params: a module (types, names and shapes decide), names with tensors such as `named_parameters()` or a mapping
        (names and shapes decide), or tensors alone (shapes decide, and overrides need names): "param_0", ..., of two
        dimensions or more to the matrix method, else AdamW. Three dimensions are a batch of matrices, four or more are
        flattened to (shape[0], rest), unless a rule about shapes claims them. Tensors alone that need no gradient are
        kept: who passes them has chosen them.
    overrides: {pattern or module type: what}. A pattern is an fnmatch pattern on the full name; what is "matrix",
        "adamw", "exclude", or group values such as {"num_heads": 12} or {"rule": "adamw", "lr": 1e-4}. The first entry
        that matches decides; "matrix" passes over parameters with fewer than two dimensions.
    Warns once when matrices that no override chose have the shape of an embedding or head.
    Raises TypeError or ValueError for what cannot be routed, and for an override that matches nothing.
    """
    places, named = read_places(params)
    return decide(places, named, overrides)


def route_by_shape(params: Iterable[Tensor]) -> list[Route]:
    """`route` by the name that it had for tensors alone, with a DeprecationWarning; version 1 drops it."""
    message = "steepest.routing.route_by_shape is route now, which takes tensors alone too: call steepest.routing.route"
    warnings.warn(message, DeprecationWarning, stacklevel=2)
    return route(params)


def fused_layouts(params: Routable) -> dict[str, dict[str, Any]]:
    """{name: group values} of fused projections that are known (`architectures`), as overrides that take them apart:

        param_groups(model, overrides={**fused_layouts(model), "lm_head.*": "adamw"})

    q, k and v become split_sizes, those of grouped queries too, and interleaved where they lie head by head. Where the
    model does not say its heads there is no entry.
    """
    return {r.name: dict(r.fused) for r in route(params) if r.fused}


def decide(
    parameters: Sequence[Sequence[Place]], named: bool, overrides: Overrides | None, *, keep_frozen: bool = False
) -> list[Route]:
    """Routes of the parameters that `read_places` found. keep_frozen: those with names that need no gradient, too."""
    if overrides and not named:
        raise ValueError("overrides need names: pass the model or model.named_parameters() instead of tensors alone")
    entries = read_overrides(overrides, [place for places in parameters for place in places])
    routes, unchosen = [], []
    for places in parameters:
        override = find(entries, places)
        frozen = named and not keep_frozen and not places[0].param.requires_grad
        if frozen or (override is not None and override.rule == "exclude"):
            continue
        routes.append(_by_rules(places) if override is None else _by_override(places, override))
        if override is None:
            unchosen.append(routes[-1])
    warn_if_embedding_like(unchosen, named=named)
    return routes


def warn_if_embedding_like(routes: Iterable[Route], *, named: bool) -> None:
    """One UserWarning that names the 2-D matrices with a side >= 8192 and >= 8 times the other, and the way out."""
    suspects = [f"{r.name} {tuple(r.param.shape)}" for r in routes if r.rule == "matrix" and _embedding_like(r)]
    if suspects:
        way_out = 'overrides={"NAME": "adamw"}' if named else "the model or model.named_parameters(), not tensors alone"
        warnings.warn(
            f"looks like an embedding or a head, but goes to the matrix method: {', '.join(suspects)}. "
            f"Embeddings and heads belong to AdamW: pass {way_out}",
            UserWarning,
            stacklevel=4,
        )


def _embedding_like(r: Route) -> bool:
    if r.param.ndim != 2:
        return False
    sides = [sorted((piece.rows, piece.cols)) for piece in read_pieces(r.param, r.values)]
    return any(long >= max(_VOCABULARY_SIDE, _VOCABULARY_RATIO * short) for short, long in sides)


def _by_rules(places: Sequence[Place]) -> Route:
    first = places[0]
    for place in places:
        if (reason := send_to_adamw(place)) is not None:
            return Route(first.name, first.param, "adamw", _with_ties(reason, place, places))
    values = layout(first)
    fused = fused_layout(first, sum(piece.length for piece in read_pieces(first.param, values)))
    reason = _with_ties(first.kind + reading(first.param, values), first, places)
    hint = "; fused, not split: " + ", ".join(f"{key}={value}" for key, value in fused.items()) if fused else ""
    return Route(first.name, first.param, "matrix", reason + hint, values, fused)


def _by_override(places: Sequence[Place], override: Override) -> Route:
    first, reason = places[0], f"override {override.label}"
    if override.rule != "matrix":
        return Route(first.name, first.param, "adamw", reason, override.values)
    values = {key: value for key, value in {**layout(first), **override.values}.items() if value is not None}
    try:
        text = reading(first.param, values)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{reason} on parameter {first.name!r}: {error}") from error
    return Route(first.name, first.param, "matrix", reason + text, values)


def _with_ties(reason: str, place: Place, places: Sequence[Place]) -> str:
    """A reason found at the first name mentions the other; one found elsewhere says that it comes from there."""
    if place is not places[0]:
        return f"tied with {place.name} ({reason})"
    return f"{reason}, tied with {places[1].name}" if len(places) > 1 else reason
