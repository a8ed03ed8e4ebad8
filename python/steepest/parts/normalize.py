"""Normalization of the update by a running second moment of itself, as Adam normalizes gradients.

v <- beta2 v + (1 - beta2) mean(u o u);   û = u / (sqrt(v) + eps);   u <- û length / ||û||_F

over="rows": one v a row, the mean over its entries (NorMuon, arXiv:2510.05491, Algorithm 1). over="elements": one v an
entry (AdaMuon, arXiv:2507.11005, Algorithm 1). length is ||u||_F, or that of a given root mean square of the entries.
Both papers have .2; NorMuon's code keeps ||u||_F, which with the ratio "match_rms_adamw" and an exactly orthogonal u of
full rank is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..ops.normalize import FAMILY, Normalization, normalize_updates, normalized, route
from ..state_layout import Layout, StateSpec
from .hyper import Hyper
from .precondition import State
from .update_transform import UpdateTransform

__all__ = ["Normalize"]

_LAYOUTS: dict[str, Layout] = {"rows": "row", "elements": "elementwise"}


@dataclass(frozen=True)
class Normalize(UpdateTransform):
    """Rows or entries divided by a running root mean square of theirs, decay rate beta2; zero stays zero.

    rms: root mean square of the result's entries; None: the matrix keeps its length.

    |û| <= |u| / sqrt(v) <= 1 / sqrt(1 - beta2) for a row's root mean square or for an entry: v has seen u itself.
    """

    families: ClassVar[tuple[str, ...]] = (FAMILY,)

    over: Literal["rows", "elements"] = "rows"
    rms: float | None = None
    eps: float = 1e-8
    key: str = "update_exp_avg_sq"

    def __post_init__(self) -> None:
        if self.over not in _LAYOUTS:
            raise ValueError(f"updates can be normalized over 'rows' or 'elements', not over {self.over!r}")
        if self.rms is not None and not self.rms > 0:
            raise ValueError(f"rms is {self.rms}; it is positive, or None where a matrix keeps its length")

    @property
    def specs(self) -> tuple[StateSpec, ...]:
        return (StateSpec(self.key, _LAYOUTS[self.over], nonnegative=True, codes="squares"),)

    def apply(self, state: State, u: Tensor, m: Tensor, hyper: Hyper) -> tuple[Tensor, State]:
        v = state[self.key]
        if route([u], [v], [hyper.beta2]) == "torch":
            u, v = normalized(u, v, hyper.beta2, eps=self.eps, rms=self.rms)
            return u, {self.key: v}
        v = v.clone()
        divided = [torch.empty_like(v)] if self.over == "elements" else []
        (factors,) = normalize_updates([u], [v], [float(hyper.beta2)], divided=divided, eps=self.eps, rms=self.rms)
        return (divided[0] if divided else u) * factors.unsqueeze(-1), {self.key: v}

    def fused(
        self, updates: Sequence[Tensor], states: Sequence[State], hypers: Sequence[Hyper], divided: Sequence[Tensor]
    ) -> list[Normalization]:
        """What `apply_update` is told of these updates, so that it does what `apply` does; nothing where that is not
        compiled for them.

        divided: memory of the shapes of the updates for what entries become, where its dtype is that of the state.
        """
        seconds, rates = [state[self.key] for state in states], [hyper.beta2 for hyper in hypers]
        into = list(divided) if self.over == "elements" else [None] * len(updates)
        alike = all(t is None or t.dtype == v.dtype for t, v in zip(into, seconds, strict=True))
        if not alike or route(updates, seconds, rates) == "torch":
            return []
        each = zip(seconds, into, rates, strict=True)
        return [Normalization(v, room, float(rate), self.eps, self.rms) for v, room, rate in each]
