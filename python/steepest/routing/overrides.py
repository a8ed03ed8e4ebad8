"""The user's word on routing: {fnmatch pattern on the name, or module type: what}; the first match decides."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias, cast

from torch import nn

from ..matrices import LAYOUT_KEYS
from .places import Place

Rule: TypeAlias = Literal["matrix", "adamw", "exclude"]
Overrides: TypeAlias = Mapping[str | type[nn.Module], str | Mapping[str, Any]]

_RULES = ("matrix", "adamw", "exclude")
RESERVED = ("params", "use_muon", "param_names", "param_reasons")


@dataclass(frozen=True)
class Override:
    """One entry: what matches it, the rule, and the group values it sets."""

    key: str | type[nn.Module]
    rule: Rule
    values: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return repr(self.key) if isinstance(self.key, str) else self.key.__name__

    def selects(self, place: Place) -> bool:
        """Whether this entry decides the place; "matrix" passes over what can be no matrix."""
        return self.matches(place) and (self.rule != "matrix" or place.param.ndim >= 2)

    def matches(self, place: Place) -> bool:
        if isinstance(self.key, str):
            return fnmatchcase(place.name, self.key)
        return isinstance(place.module, self.key)


def find(overrides: Iterable[Override], places: Iterable[Place]) -> Override | None:
    """The first entry that takes one of the places of a parameter."""
    places = list(places)
    return next((o for o in overrides if any(o.selects(place) for place in places)), None)


def read_overrides(overrides: Overrides | None, places: Sequence[Place]) -> list[Override]:
    """The checked entries. Raises for a bad entry, and for one that takes no parameter: a silent typo misroutes."""
    if overrides is not None and not isinstance(overrides, Mapping):
        raise TypeError(f'overrides must be a mapping such as {{"lm_head.*": "adamw"}} but is: {overrides!r}')
    entries = [_entry(key, what) for key, what in (overrides or {}).items()]
    for entry in entries:
        if not any(entry.selects(place) for place in places):
            raise ValueError(_unmatched(entry, places))
    return entries


def _entry(key: object, what: object) -> Override:
    if not isinstance(key, str) and not (isinstance(key, type) and issubclass(key, nn.Module)):
        raise TypeError(f"override key must be a pattern on parameter names or a module type but is: {key!r}")
    values = dict(what) if isinstance(what, Mapping) else {"rule": what}
    rule = values.pop("rule", "matrix")
    if rule not in _RULES:
        raise ValueError(f"override {key!r} must be one of {_RULES} or a dict of group values but is: {rule!r}")
    for name in values:
        _check_value_name(key, name)
    frozen = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    try:
        hash(tuple(frozen.values()))
    except TypeError as error:
        raise TypeError(
            f"override {key!r} must hold plain values (numbers, strings, tuples) but is: {what!r}"
        ) from error
    return Override(key, cast(Rule, rule), frozen)


def _check_value_name(key: object, name: str) -> None:
    if name in RESERVED:
        raise ValueError(f"override {key!r} cannot set {name!r}: routing fills it in")
    close = get_close_matches(name, LAYOUT_KEYS, n=1, cutoff=0.75)
    if name not in LAYOUT_KEYS and close:
        raise ValueError(f"override {key!r} has an unknown value {name!r}: did you mean {close[0]!r}?")


def _unmatched(entry: Override, places: Sequence[Place]) -> str:
    if any(entry.matches(place) for place in places):
        return f"override {entry.label} matches only parameters with fewer than two dimensions, which are no matrices"
    if not isinstance(entry.key, str):
        types = sorted({type(place.module).__name__ for place in places if place.module is not None})
        hint = f"module types here: {', '.join(types)}" if types else "module types need the model, not only names"
        return f"override {entry.label} matches no parameter: {hint}"
    names = [place.name for place in places]
    close = get_close_matches(entry.key, names, n=3, cutoff=0.3) or names[:3]
    return f"override {entry.label} matches no parameter; close names: {', '.join(close)}"
