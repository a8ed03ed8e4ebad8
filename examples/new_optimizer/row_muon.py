"""RowMuon, a small NorMuon: all that a new optimizer takes beside its test, with a part of its own.

It lies here for CONTRIBUTING.md, and tests put it where it says: python/steepest/zoo/row_muon.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from steepest.optimizer import MatrixOptimizer, Params
from steepest.optimizer.group_options import Group, number
from steepest.optimizer.option_types import BELOW_ONE, OptionType
from steepest.parts import Hyper, Identity, Momentum, Number, UpdateTransform
from steepest.recipe import Recipe, State
from steepest.state_layout import StateSpec
from steepest.zoo.shared import Extras, Polar, defaults_of, polar_of, recipe_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class RowScales(UpdateTransform):
    """Rows over a running root mean square of theirs, v <- b v + (1 - b) mean_j u_ij^2, at the length of the update."""

    @property
    def specs(self) -> tuple[StateSpec, ...]:
        return (StateSpec("row_scales", "row", nonnegative=True),)

    def apply(self, state: State, u: Tensor, m: Tensor, hyper: Hyper) -> tuple[Tensor, State]:
        v = state["row_scales"]
        v = hyper.beta2 * v + (1 - hyper.beta2) * u.square().mean(-1).to(v.dtype)
        rows = u / v.sqrt().clamp_min(1e-20).unsqueeze(-1).to(u.dtype)
        ratio = (u.norm(dim=(-2, -1)) / rows.norm(dim=(-2, -1))).nan_to_num()
        return rows * ratio[:, None, None], {"row_scales": v}


class RowMuon(MatrixOptimizer):
    """Muon whose update is divided, row by row, by a running size of its rows.

        m <- momentum m + (1 - momentum) g;   o = polar(m);   v_i <- row_beta v_i + (1 - row_beta) mean_j o_ij^2
        W <- (1 - lr weight_decay) W - lr ratio(rows, cols) s o_i / sqrt(v_i),   s for ||o||_F in all

    Arguments as in `Muon`; row_beta: in [0, 1), the decay rate of v. Source: after arXiv:2510.05491.
    """

    option_types: ClassVar[dict[str, OptionType]] = {"row_beta": BELOW_ONE}
    argument_lines: ClassVar[dict[str, str]] = {"row_beta": "decay rate of the sizes of rows"}

    def __init__(
        self,
        params: Params,
        lr: Number = 1e-2,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        adjust_lr_fn: str | None = None,
        *,
        row_beta: float = 0.95,
        polar: Polar = "auto",
        **extra: Unpack[Extras],
    ) -> None:
        options = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "adjust_lr_fn": adjust_lr_fn,
            "row_beta": row_beta,
            "polar": polar,
        }
        super().__init__(params, *defaults_of("RowMuon", options, extra))

    def recipe(self, group: Group) -> Recipe:
        return recipe_of(
            group,
            momentum=Momentum(dtype=group["momentum_dtype"]),
            precondition=Identity(),
            direction=polar_of(group),
            transforms=(RowScales(),),
        )

    def hyper(self, group: Group) -> Hyper:
        return Hyper(*map(number, (group["lr"], group["weight_decay"], group["momentum"], group["row_beta"])))
