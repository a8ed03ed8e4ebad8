"""Prodigy's step size: it escalates until the distance to the start stops growing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from ..optimizer import Params
from ..optimizer.group_options import Group
from ..optimizer.option_types import BELOW_ONE, check_option
from ..parts import Direction, Number, Sign
from ..parts.product_norm import ProductNorm, escalated
from ..recipe import Recipe, State
from ..state_layout import Layout
from .momo import Layers, dot
from .product import Coupling, ProductNormOptimizer, own_values
from .shared import Polar, polar_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

# State of every parameter: where it began. Of the first one: the step size.
START, STEP_SIZE = "start", "step_size"


class ProdigyMuon(ProductNormOptimizer):
    """Spectral and sign descent whose step size is found: Prodigy without averages, in the norm of the largest layer.

        eta <- max(eta, <M, W_0 - W> / d),  d = sum over layers of the dual norm of M_l
        W_l <- (1 - lr weight_decay) W_l - lr eta dz_l(M_l)

    dz is polar(M) for matrices (norm="spectral") and sign(M) for all else; with norm="sign" for matrices too, which is
    the rule of arXiv:2409.20325: Prodigy (arXiv:2306.06101) with all averages switched off, eta being updated before
    it is used, as in Prodigy's code. With exact gradients of a convex loss and momentum=0, eta never exceeds the larger
    of initial_step and the distance from W_0 to a minimizer, in the norm of the largest layer.

    initial_step: the first eta > 0, far too small.   lr: a factor on eta, for schedules.
    momentum: with 0 M is the gradient and the rule the paper's; more is a variant of it.
    Other arguments as in `ProductNormDescent`, `Coupling`. Keeps W_0, as large as the parameters, and all directions
    of a step at once. This is not all of Prodigy, whose averages weight gradients by eta.
    """

    _carried: tuple[str, ...] = ("norm", "initial_step")
    _kept: ClassVar[dict[str, Layout | None]] = {START: "elementwise", STEP_SIZE: "scalar"}
    _shared: tuple[str, ...] = (STEP_SIZE,)

    def __init__(
        self,
        params: Params,
        lr: Number = 1.0,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        initial_step: float = 1e-6,
        norm: Literal["spectral", "sign"] = "spectral",
        adjust_lr_fn: str | None = None,
        *,
        polar: Polar = "auto",
        **extra: Unpack[Coupling],
    ) -> None:
        if check_option("norm", norm) not in ("spectral", "sign"):
            raise ValueError(f"norm {norm!r} is not known; use 'spectral' or 'sign'")
        self.norm, self.initial_step = norm, check_option("initial_step", initial_step)
        momentum = check_option("momentum", momentum, BELOW_ONE)
        own = own_values(lr, weight_decay, (momentum, 0.0), 0.0, adjust_lr_fn, polar)
        super().__init__(params, own, extra, product=ProductNorm("max"), scale="lmo", others="sign")

    def direction(self, group: Group) -> Direction:
        return polar_of(group) if self.norm == "spectral" else Sign()

    def _couples(self) -> bool:
        return True

    def _stale(self, recipe: Recipe) -> bool:
        return False

    def _factors(self, layers: Sequence[Layers]) -> list[Number]:
        gain = torch.zeros((), dtype=torch.float64, device=self._device)
        for p in (p for each in layers for p in each.parameters):
            w, m = p.value(), p.recipe.momentum_of(p.state, p.taken.grad, p.taken.hyper)
            start = self.state[p.tensor][START].to(w.dtype)
            gain = gain + torch.where(p.taken.finite, dot(m, start - w), 0)
        eta = self._shared_state()[STEP_SIZE]
        eta.copy_(escalated(eta, gain, self.product.dual_norm(*self._dual_norms(layers))))
        return [eta for _ in layers]

    def _fresh_shared_state(self) -> State:
        size = torch.full((), self.initial_step, dtype=torch.float64, device=self._device)
        return {**super()._fresh_shared_state(), STEP_SIZE: size}

    def _own_state(self, p: Tensor, group: Group) -> State:
        start = {} if START in self.state[p] else {START: p.detach().clone()}
        return {**super()._own_state(p, group), **start}
