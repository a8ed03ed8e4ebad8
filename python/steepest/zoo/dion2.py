"""Dion2: Muon of a submatrix, the rows or columns of the momentum that have the largest 1-norm."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ..optimizer import MatrixOptimizer, Params
from ..optimizer.group_options import Group, number
from ..optimizer.option_types import HEAVY_BALL, OptionType
from ..parts import Hyper, Identity, Momentum, Number, Submatrix
from ..recipe import Recipe
from .shared import Extras, Polar, defaults_of, normalization, polar_of, recipe_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Dion2(MatrixOptimizer):
    """Muon that orthogonalizes a fraction of the rows or columns in every step, and keeps the others for later ones.

        m <- m + g;   K: the ceil(fraction n) rows (columns) of m with the largest 1-norm;   m_K <- momentum m_K after
        W <- (1 - lr weight_decay) W;   W_K <- W_K - lr ratio(rows, cols) polar(m_K)

    params, lr, weight_decay: as in `Muon`.
    momentum: what the stepped rows keep, in [0, 1]; the others keep all, so that about 1 / (fraction (1 - momentum))
        steps are remembered: 80 by default, where a Muon of this momentum remembers 20.
    fraction: of the shorter side, rows of a square matrix, in (0, 1]; at least one row, rounded up.
    beta2, after: after="rows" divides the rows of the update by a running root mean square of theirs, as `NorMuon` does
        and with its state, and steps rows of every matrix: Dion3, which its authors also call NorDion2.
    adjust_lr_fn: as in `Muon`, of the whole matrix; None is "spectral_unclamped", the authors'.
    polar: a preset of `steepest.polar` or a coefficient table.

    The state is Muon's. A quarter of the rows of Llama 7B takes a 26th of the products' work, and of sharded matrices
    only chosen rows travel, besides a sum of norms (docs/scale.md). Rows are chosen of whole matrices, so that shards
    change no step; the authors' code chooses along the sharded dimension where there is one. With fraction=1 it is
    `Muon` without nesterov.

    Source: arXiv:2512.16928 and the authors' code, microsoft/dion (dion2.py, nordion2.py).
    """

    option_types: ClassVar[dict[str, OptionType]] = {"momentum": HEAVY_BALL}
    argument_lines: ClassVar[dict[str, str]] = {
        "fraction": "of the rows or columns that a step takes, in (0, 1]",
    }

    def __init__(
        self,
        params: Params,
        lr: Number = 1e-2,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        fraction: float = 0.25,
        adjust_lr_fn: str | None = None,
        *,
        beta2: float = 0.95,
        after: str | None = None,
        polar: Polar = "auto",
        **extra: Unpack[Extras],
    ) -> None:
        options = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "fraction": fraction,
            "adjust_lr_fn": adjust_lr_fn,
            "beta2": beta2,
            "after": after,
            "polar": polar,
        }
        super().__init__(params, *defaults_of("Dion2", options, extra))

    def recipe(self, group: Group) -> Recipe:
        if group["after"] not in (None, "rows"):
            raise ValueError(f"after {group['after']!r} is not known; use 'rows' (as NorMuon) or None")
        return recipe_of(
            group,
            ratio="spectral_unclamped",
            momentum=Momentum("error_feedback", dtype=group["momentum_dtype"]),
            precondition=Identity(),
            direction=polar_of(group),
            submatrix=Submatrix(group["fraction"], "shorter" if group["after"] is None else "rows"),
            transforms=normalization(group),
        )

    def hyper(self, group: Group) -> Hyper:
        return Hyper(*map(number, (group["lr"], group["weight_decay"], group["momentum"], group["beta2"])))
