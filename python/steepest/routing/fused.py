"""Fused projections: q, k and v, k and v, or gate and up, in one weight, and the layouts that take them apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .architectures import (
    ALTERNATING,
    FUSED,
    HEAD_COUNTS,
    HEAD_SIZES,
    INTERLEAVED,
    KEY_VALUE_COUNTS,
    LATENT_KEYS,
    NOPE_SIZES,
    OTHER_ORDER,
    VALUE_SIZES,
)
from .known import class_names
from .places import Place

__all__ = ["fused_layout"]


def fused_layout(place: Place, rows: int) -> dict[str, Any]:
    """Group values that read a fused weight of so many rows (outputs) as its parts; {} where nothing is known.

    q, k and v are splits, of grouped queries too; `interleaved` where they lie head by head, as keys and values of
    latent attention do, or key head by key head. The heads are the attention module's own words.
    """
    known = (*FUSED, *INTERLEAVED, *LATENT_KEYS)
    name = next((name for name in place.path[-2:] if name in known), None)
    if name is None or place.parent is None:
        return {}
    if place.module is not None and not ALTERNATING.isdisjoint(class_names(place.module)):
        return {}
    if len(FUSED.get(name, ())) == 2:
        return {"split_sizes": (rows // 2,) * 2} if rows % 2 == 0 else {}
    heads = _count(place.parent, HEAD_COUNTS)
    if name in LATENT_KEYS:
        key, value = _count(place.parent, NOPE_SIZES), _count(place.parent, VALUE_SIZES)
        if not heads or not key or not value or rows != heads * (key + value):
            return {}
        return {"split_sizes": (heads * key, heads * value), "interleaved": heads}
    groups = _count(place.parent, KEY_VALUE_COUNTS) or heads
    if not heads or not groups or rows % (heads + 2 * groups):
        return {}
    size = rows // (heads + 2 * groups)
    if _count(place.parent, HEAD_SIZES) not in (None, size):  # Falcon's config counts key heads that it does not have
        return {}
    repeats = name in INTERLEAVED or getattr(place.parent, "head_first", False) is True
    other = (OTHER_ORDER[each] for each in class_names(place.parent) if each in OTHER_ORDER)
    blocks = next(other, groups if repeats else 1)  # of values and keys, which are alike
    splits = {"split_sizes": (heads * size, groups * size, groups * size)}
    return {**splits, "interleaved": blocks} if blocks > 1 else splits


def _count(module: nn.Module, names: tuple[str, ...]) -> int | None:
    """The first of these that the module or its config has; what a config says comes first where it is there."""
    for holder in (getattr(module, "config", None), module):
        for name in names:
            value = holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None
