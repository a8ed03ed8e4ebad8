"""Normalization of the update by a running second moment of itself, as Adam normalizes gradients.

v <- beta2 v + (1 - beta2) mean(u o u);   û = u / (sqrt(v) + eps);   u <- û length / ||û||_F

over="rows": one v a row, the mean over its entries (NorMuon, arXiv:2510.05491, Algorithm 1). over="elements": one v an
entry (AdaMuon, arXiv:2507.11005, Algorithm 1). length is ||u||_F, or that of a given root mean square of the entries.
Both papers have .2; NorMuon's code keeps ||u||_F, which with the ratio "match_rms_adamw" and an exactly orthogonal u of
full rank is the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..ops.reductions import vector_norm
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

    over: Literal["rows", "elements"] = "rows"
    rms: float | None = None
    eps: float = 1e-8
    key: str = "update_exp_avg_sq"

    def __post_init__(self) -> None:
        if self.over not in _LAYOUTS:
            raise ValueError(f"updates can be normalized over 'rows' or 'elements', not over {self.over!r}")

    @property
    def specs(self) -> tuple[StateSpec, ...]:
        return (StateSpec(self.key, _LAYOUTS[self.over], nonnegative=True, codes="squares"),)

    def apply(self, state: State, u: Tensor, m: Tensor, hyper: Hyper) -> tuple[Tensor, State]:
        v = state[self.key]
        entries, wide = u.shape[-1] if self.over == "rows" else 1, torch.promote_types(u.dtype, v.dtype)
        size = vector_norm(u, -1, dtype=wide) if self.over == "rows" else u.to(wide).abs()
        fresh = hyper.beta2 * v + (1 - hyper.beta2) / entries * size.square()
        v = torch.where(fresh.isfinite(), fresh, v)
        scale = 1 / (v.sqrt() + self.eps)
        # Lengths of matrices from those of their rows or entries: u itself is read twice, and written once.
        before, after = (vector_norm(t.flatten(1), -1) for t in (size, size * scale))
        if self.rms is not None:
            before = torch.full_like(after, self.rms * (u.shape[-2] * u.shape[-1]) ** 0.5)
        ratio = before / after
        ratio = torch.where(ratio.isfinite(), ratio, 0)  # of nothing, and of what is too large to be squared
        scale = scale * ratio.view(-1, *(1,) * (scale.ndim - 1))
        return u * (scale.unsqueeze(-1) if self.over == "rows" else scale), {self.key: v}
