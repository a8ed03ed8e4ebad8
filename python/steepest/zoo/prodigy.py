"""Prodigy's step size: it escalates until the distance to the start stops growing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from ..ops.multi_tensor import Scaling
from ..optimizer import Params
from ..optimizer.checkpoint_state import Kept
from ..optimizer.group_options import Group, refuse_option, refuse_schedule_free
from ..optimizer.option_types import check_option
from ..parts import Direction, Number, Sign
from ..parts.product_norm import ProductNorm, escalated
from ..recipe import Recipe, State, largest
from ..sharding.local import is_sharded, local_tensor
from ..step.coupling import Coupling as StepCoupling
from ..step.coupling import inner_products
from ..step.executor import Directed, Executor
from ..step.parameter import Matrices, Parameter
from ..step.plan import Plan
from .momo import Layers, Truncated
from .product import Coupling, ProductNormOptimizer, given_values
from .shared import Polar, polar_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

# State of every parameter: where it began, and what rounding to 16 bits has dropped. Of the first one: the step size.
START, DROPPED, STEP_SIZE = "start", "dropped", "step_size"

#: Matrices, where a step leads them in fp32, and whether it is taken.
Led = tuple[Matrices, Tensor, Tensor]


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
    Other arguments as in `ProductNormDescent`, `Coupling`. Keeps W_0, as large as the parameters and in fp32 where they
    are narrower, and all directions of a step at once. Steps of the first eta are lost in weights of 16 bits whose
    mantissa is not kept: there W is the weight and what its last roundings have dropped, at most one unit in the last
    place of it, in fp32 too. This is not all of Prodigy, whose averages weight gradients by eta.
    """

    carried: ClassVar[tuple[str, ...]] = ("norm", "initial_step")
    _led: list[Led]
    common_state: ClassVar[tuple[str, ...]] = (STEP_SIZE,)
    argument_lines: ClassVar[dict[str, str]] = {
        "initial_step": "the first step size, far below any good one",
    }

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
        momentum = check_option("momentum", momentum)
        options = given_values(lr, weight_decay, (momentum, 0.0), 0.0, adjust_lr_fn, polar)
        super().__init__(params, options, extra, product=ProductNorm("max"), scale="lmo", others="sign")

    def direction(self, group: Group) -> Direction:
        return polar_of(group) if self.norm == "spectral" else Sign()

    def couples(self) -> bool:
        return True

    def _stale(self, recipe: Recipe) -> bool:
        return False

    def _factors(self, layers: Sequence[Layers]) -> list[Number]:
        parameters = [p for each in layers for p in each.parameters]
        gains = inner_products([(p, *self._gain(p)) for p in parameters])
        gain = torch.zeros((), dtype=torch.float64, device=self._device)
        for p, of_parameter in zip(parameters, gains, strict=True):
            gain = gain + torch.where(p.step_values.finite & of_parameter.isfinite(), of_parameter, 0)
        eta = self._shared_state()[STEP_SIZE]
        eta.copy_(escalated(eta, gain, self.product.dual_norm(*self._dual_norms(layers))))
        return [eta for _ in layers]

    def _gain(self, p: Parameter) -> tuple[Tensor, Tensor]:
        """(M, W_0 - W)."""
        w = self._iterate(p)
        return p.recipe.momentum_of(p.state, p.step_values.grad, p.step_values.hyper), p.state[START].to(w.dtype) - w

    def _fresh_shared_state(self) -> State:
        size = torch.full((), self.initial_step, dtype=torch.float64, device=self._device)
        return {**super()._fresh_shared_state(), STEP_SIZE: size}

    def _new_state(self, p: Tensor, group: Group) -> State:
        state, rounding, fresh = self.state_here(p), self.recipe_of(group).rounding, super()._new_state(p, group)
        if START not in state:
            fresh[START] = self.state_like(p, rounding.value(local_tensor(p.detach()), state).clone())
        if self._is_lossy(p, group) and DROPPED not in state:
            fresh[DROPPED] = torch.zeros_like(p, dtype=torch.float32)
        return fresh

    def kept_state(self, p: Tensor, group: Group) -> dict[str, Kept]:
        return {
            **super().kept_state(p, group),
            START: Kept(p.shape, missing="refuse"),
            DROPPED: Kept(p.shape, missing="begin" if self._is_lossy(p, group) else "leave"),
            STEP_SIZE: Kept((), "> 0", missing="refuse"),
        }

    def _is_lossy(self, p: Tensor, group: Group) -> bool:
        """Whether the weight's dtype drops bits that nobody keeps."""
        mode = self.recipe_of(group).rounding.mode
        return p.dtype == torch.float16 or (p.dtype == torch.bfloat16 and mode != "mantissa")

    def check_values_of_others(self, group: Group) -> None:
        super().check_values_of_others(group)
        refuse_option(group, "variance_reduction", "ProdigyMuon's step size is of gradients as they are")
        refuse_option(group, "constraint", "ProdigyMuon measures how far steps lead from the start")
        refuse_schedule_free(group, "ProdigyMuon measures how far the weights themselves are from their start")

    def check_parameters(self, group: Group) -> None:
        super().check_parameters(group)
        lossy = [p for p in group["params"] if is_sharded(p) and self._is_lossy(p, group)]
        if lossy:
            raise ValueError(
                f"ProdigyMuon keeps what rounding drops of weights in {lossy[0].dtype}, and not of sharded ones: use "
                "keep_mantissa=True with bfloat16, or weights in float32"
            )

    # ---- weights of 16 bits -----------------------------------------------------------------------------------------

    def _iterate(self, p: Parameter) -> Tensor:
        """W, with what rounding has dropped."""
        value = p.value()
        dropped = p.state.get(DROPPED)
        return value if dropped is None else value + dropped

    def coupling(self, plan: Plan, loss: Number | None) -> StepCoupling | None:
        return _Escalated(self, plan, loss, self._led)

    def take_step(self, scaling: Scaling, loss: Number | None) -> None:
        self._led = []
        super().take_step(scaling, loss)
        for item, value, finite in self._led:
            dropped, w = item.piece.view(item.parameter.state[DROPPED]), item.weight.float()
            info = torch.finfo(item.weight.dtype)
            unit = info.eps * w.abs().clamp(min=info.tiny)
            dropped.copy_(torch.where(finite, (value - w + dropped).clamp(-unit, unit), dropped))
        del self._led


class _Escalated(Truncated):
    """Notes where a step leads before it is rounded, of weights from which rounding drops something."""

    def __init__(self, optimizer: ProdigyMuon, plan: Plan, loss: Number | None, led: list[Led]) -> None:
        super().__init__(optimizer, plan, loss)
        self._led = led

    def allowed(self, parameters: Sequence[Parameter], scaling: dict[torch.device, Scaling]) -> Sequence[Tensor]:
        """Whether the weight is finite too: the step size is of how far all weights have gone."""
        finite = [largest(p.value()).isfinite() for p in parameters]
        bounded = super().allowed(parameters, scaling)
        return finite if bounded is None else [a & b for a, b in zip(finite, bounded, strict=True)]

    def moving(self, executor: Executor, batch: Any, directed: Directed) -> None:
        super().moving(executor, batch, directed)
        for items, ds in zip(executor.items(batch), directed.ds, strict=True):
            if not any(DROPPED in item.parameter.state for item in items):
                continue
            for item, d in zip(items, ds.split([item.input_shape[0] for item in items]), strict=True):
                if DROPPED in item.parameter.state:
                    w, hyper = item.weight.float(), item.parameter.step_values.hyper
                    value = item.recipe.moved(w, d.reshape(w.shape).float(), hyper, item.ratio)
                    self._led.append((item, value.float(), item.finite))
