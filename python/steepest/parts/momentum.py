"""What is remembered of the gradients.

    ema         m <- beta m + (1 - beta) g        heavy_ball   m <- beta m + g
    error_feedback   m <- m + g, and what a step has been taken by is damped after it (`steepest.parts.Submatrix`)
    nesterov    read  (1 - beta) g + beta m  (ema)  or  g + beta m  (heavy_ball)   instead of  m
    interpolated   read  (1 - c) g + c m,  c = beta2 / beta: with the average as it was, (1 - beta2) g + beta2 m
    bias_correction   read  m / (1 - beta^t)
    start="first"     m is the first gradient before the rule begins, where start="zero" has m = 0

beta multiplies the old value in every method here. Directions of a norm ball do not see the scale of what they are
given, so ema and heavy_ball differ only where the step is scaled by the dual norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .hyper import Number, bias_correction


@dataclass(frozen=True)
class Momentum:
    """How gradients are averaged; `key` names the buffer in the state, `dtype` its type (None: the gradient's, or with
    `wide` fp32 where that is narrower).

    `observe` and `read` take tensors of any one shape. Equals `torch.optim.Muon`'s rule for kind="ema" with
    nesterov=True, and the first moment of Adam (arXiv:1412.6980, Alg. 1) for kind="ema" with bias_correction=True;
    `torch.optim.SGD`'s buffer with dampening = momentum = beta for kind="ema" with start="first".

    start="first" is said here and done by the recipe, which knows whether a gradient is the first: by beta = 0 for it.
    It goes for the second moments of the recipe's preconditioner too, so that no average needs a correction.
    """

    kind: Literal["ema", "heavy_ball", "error_feedback"] = "ema"
    nesterov: bool = False
    bias_correction: bool = False
    key: str = "momentum_buffer"
    dtype: torch.dtype | None = None
    start: Literal["zero", "first"] = "zero"
    interpolated: bool = False
    wide: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("ema", "heavy_ball", "error_feedback"):
            raise ValueError(f"momentum kind {self.kind!r} is not known; use 'ema', 'heavy_ball' or 'error_feedback'")
        if self.dtype not in (None, torch.float64, torch.float32, torch.bfloat16, torch.float16):
            wide = "" if getattr(self.dtype, "itemsize", 2) > 1 else " of 16 bits or more"
            raise ValueError(f"momentum_dtype should be a floating torch.dtype{wide} or None but is: {self.dtype!r}")
        if self.nesterov and self.kind == "error_feedback":
            raise ValueError("Nesterov momentum with error feedback is not defined here; choose one of the two")
        if self.nesterov and self.bias_correction:
            raise ValueError("Nesterov momentum with bias correction is not defined here; choose one of the two")
        if self.bias_correction and self.kind != "ema":
            raise ValueError("bias correction belongs to the average ('ema'); a heavy ball has nothing to correct")
        if self.interpolated and (self.kind != "ema" or self.nesterov or self.bias_correction):
            raise ValueError("an interpolated reading is of the plain average ('ema'): choose one kind of reading")
        if self.start not in ("zero", "first"):
            raise ValueError(f"momentum start {self.start!r} is not known; use 'zero' or 'first'")
        if self.start == "first" and (self.bias_correction or self.kind != "ema"):
            raise ValueError(
                "start='first' is for the average ('ema') and leaves no bias to correct; choose one of them"
            )

    @property
    def counts_steps(self) -> bool:
        """Whether it needs to know how many gradients there were."""
        return self.bias_correction or self.start == "first"

    def dtype_for(self, dtype: torch.dtype) -> torch.dtype:
        """The buffer's dtype, of gradients of this dtype."""
        return self.dtype or (torch.promote_types(dtype, torch.float32) if self.wide else dtype)

    def init(self, g: Tensor) -> Tensor:
        return torch.zeros_like(g, dtype=self.dtype_for(g.dtype), memory_format=torch.preserve_format)

    def observe(self, m: Tensor, g: Tensor, beta: Number) -> Tensor:
        """The buffer after gradient g, in fp32 or fp64 (the caller stores it in the buffer's own dtype)."""
        wide = _wide(m, g)
        m, g = m.to(wide), g.to(wide)
        if self.kind == "heavy_ball":
            return m * beta + g
        if self.kind == "error_feedback":
            return m + g
        return torch.lerp(m, g, _weight(1 - beta, wide))

    def read(self, m: Tensor, g: Tensor, beta: Number, step: Tensor | None, beta2: Number = 0.0) -> Tensor:
        """What goes into the direction, from the updated buffer m, in fp32 or fp64; step is t, counted from 1."""
        wide = _wide(m, g)
        if self.interpolated:
            return torch.lerp(g.to(wide), m.to(wide), _weight(beta2 / beta, wide))
        if self.nesterov:
            if self.kind == "heavy_ball":
                return g.to(wide) + m.to(wide) * beta
            return torch.lerp(g.to(wide), m.to(wide), _weight(beta, wide))
        if self.bias_correction:
            return m.to(wide) / bias_correction(beta, step).to(wide)
        return m.to(wide)


def _wide(m: Tensor, g: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(m.dtype, g.dtype), torch.float32)


def _weight(weight: Number, dtype: torch.dtype) -> Number:
    """`torch.lerp` wants a tensor weight in the tensors' own dtype."""
    return weight.to(dtype) if isinstance(weight, Tensor) else weight
