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

from ..ops.normalize import FAMILY, normalize_updates, normalized, route
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

    def factors(
        self,
        updates: Sequence[Tensor],
        states: Sequence[State],
        hypers: Sequence[Hyper],
        divided: Sequence[Tensor],
        taken: Sequence[Tensor],
        scratch: Tensor,
    ) -> tuple[Sequence[Tensor], list[Tensor]]:
        """(updates, what rows of each or the whole matrices are yet to be multiplied by), by one call for all of them;
        nothing where that is not compiled for them.

        Equals `apply`, but that states take updates in place, each where its 0-d bool of `taken` says so. divided:
        memory of the shapes of the updates, scratch: as `steepest.ops.normalize` has it.
        """
        seconds, rates = [state[self.key] for state in states], [hyper.beta2 for hyper in hypers]
        into = list(divided) if self.over == "elements" else []
        alike = all(t.dtype == v.dtype for t, v in zip(into, seconds, strict=False))
        if not alike or route(updates, seconds, rates) == "torch":
            return [], []
        numbers = [float(rate) for rate in rates]
        factors = normalize_updates(
            updates, seconds, numbers, eps=self.eps, rms=self.rms, divided=into, taken=taken, scratch=scratch
        )
        return into or updates, factors
