"""Schattor: steepest descent in a Schatten norm of every block."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from ..optimizer import Params
from ..optimizer.group_options import Group, number
from ..optimizer.option_types import check_option
from ..parts import Direction, Frobenius, Hyper, Momentum, Number
from ..parts.direction import Schatten
from ..parts.product_norm import ProductNorm
from .product import Coupling, ProductNormOptimizer
from .shared import Polar, polar_of, workspace_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Schattor(ProductNormOptimizer):
    """Momentum, along the steepest direction of a Schatten p-norm; between SGD (p = 2) and Muon (p = inf).

        M <- momentum M + (1 - momentum) G;   M = U S V^T,  q = p / (p - 1)
        W_b <- (1 - lr weight_decay) W_b - lr w_b ratio(rows, cols) U (S / ||S||_q)^(q-1) V^T

        block_norm  scale    w_b                           the oracle, every block b of its own
        max         lmo      1                             a ball of radius lr
        l2          dual     ||M_b||_q                     the regularized step, lr times the dual norm long
        max         dual     sum of ||M_c||_q              regularized in the largest block's norm: all move equally far
        l2          lmo      ||M_b||_q / that of all       a ball of radius lr for all blocks together

    The paper's two oracles are the first two rows. The last two balance blocks against one another; which of them is
    the paper's rule for several blocks, and whether its momentum begins so, could not be confirmed.

    A parameter that is not a matrix is a block in the Euclidean norm, which all Schatten norms of a column are. With
    one block or the first two rows, p=2 is normalized SGD ("lmo") and SGD ("dual") with momentum, p=inf is
    `Muon(nesterov=False, adjust_lr_fn="none")` ("lmo").

    p: 1 to inf, of a group.
    method: how directions for other p than 2 and inf are made, see `steepest.linalg.schatten.schatten`. "auto" takes a
        decomposition in fp64 but for p = 1 (the power method, within .998) and powers such as 4/3, so that a direction
        is off by its rounding alone. On a GPU that is waited for, and no CUDA graph holds it: "matmul" takes products,
        about 1.9 times the work of Muon's, where (S / ||S||_q)^(q-1) is a polynomial that is off by at most .0019,
        .0154, .026, .039 and .054 of the largest for p = 3/2, 3, 4, 6 and 8, beside the rounding.
    stale_dual: False, so that the norms ||M_c||_q of the last two rows are of this step, for which all directions are
        held at once, as large as the matrices; True: they are of the step before.
    start: "zero" begins with M = 0, "first" with the first gradient, as `torch.optim.SGD` does.
    polar: of p=inf, as in `steepest.MuAdam`.   adjust_lr_fn: as in `steepest.Muon`, None is "none".
    lower_bound: makes it Momo's.

    Source: arXiv:2606.15702.
    """

    stale_dual = False
    argument_lines: ClassVar[dict[str, str]] = {
        "p": "of the Schatten norm, 1 to inf",
        "block_norm": 'norm over the layers: "max" or "l2"',
        "start": '"zero": the average begins with 0; "first": with the first gradient',
        "method": "how the direction is computed; see `steepest.linalg.schatten.schatten`",
    }

    def __init__(
        self,
        params: Params,
        lr: Number = 1e-2,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        p: float = 4.0,
        adjust_lr_fn: str | None = None,
        *,
        block_norm: Literal["max", "l2"] = "max",
        scale: Literal["lmo", "dual"] = "lmo",
        start: Literal["zero", "first"] = "zero",
        method: str = "auto",
        polar: Polar = "auto",
        **extra: Unpack[Coupling],
    ) -> None:
        if check_option("block_norm", block_norm) not in ("max", "l2"):
            raise ValueError(f"block_norm {block_norm!r} is not known; use 'max' or 'l2'")
        options = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "p": p,
            "adjust_lr_fn": adjust_lr_fn,
            "start": start,
            "method": method,
            "polar": polar,
        }
        super().__init__(params, options, extra, product=ProductNorm(block_norm), scale=scale, others="euclidean")

    def direction(self, group: Group) -> Direction:
        p, spectral = group["p"], polar_of(group)  # which is looked at whatever p is
        if p == 2:
            return Frobenius()
        if p == math.inf:
            return spectral
        return Schatten(p, group["method"], max_workspace_bytes=workspace_of(group))

    def momentum(self, group: Group) -> Momentum:
        return Momentum(start=group["start"], dtype=group["momentum_dtype"])

    def hyper(self, group: Group) -> Hyper:
        return Hyper(*map(number, (group["lr"], group["weight_decay"], group["momentum"])))
