"""The elementwise preconditioner  ||X||_D = N(D o X),  D = v^p, v a running second moment of the gradient.

    v <- beta2 v + (1 - beta2) g o g   (average="ema")      v <- v + g o g   (average="sum")
    D^2 = (v^(2p) + eps) / c           (eps_inside=True)     D^2 = v^(2p) / c + eps   (eps_inside=False)
    c = (1 - beta2^t)^(2p) with bias correction, 1 without

    into(x) = x / D,   back(d) = d / D,   with 1/0 = 0 (the pseudo-inverse) where D = 0.

Powers in use (arXiv:2510.10777, Table 1): p = 1/4 Adam, AdaGrad and MuAdam; p = 1/2 Adam-SANIA and MuAdam-SANIA;
p = 1/6 MADGRAD. With the Frobenius direction scaled by its dual norm the update is m / D^2: p = 1/4 with
eps_inside=False is Adam's  m / (sqrt(v / c) + eps). With p = 1/2, eps = 0 and any norm the iterates are equivariant
under elementwise rescaling of the weights, because D then scales exactly as the gradient does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...ops.power import power
from ..hyper import Hyper, bias_correction
from .base import State


@dataclass(frozen=True)
class Diagonal:
    """D = v^power from the second moment v, kept in fp32 (fp64 for fp64 gradients) under `key`."""

    power: float = 0.25
    average: Literal["ema", "sum"] = "ema"
    bias_correction: bool = True
    eps_inside: bool = True
    key: str = "exp_avg_sq"

    def __post_init__(self) -> None:
        if not 0.0 < self.power <= 0.5:
            raise ValueError(f"preconditioner power should be in (0, 1/2] but is: {self.power}")
        if self.average not in ("ema", "sum"):
            raise ValueError(f"second moment {self.average!r} is not known; use 'ema' or 'sum'")
        if self.bias_correction and self.average == "sum":
            raise ValueError("bias correction belongs to the average ('ema'); set bias_correction=False for 'sum'")

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    @property
    def counts_steps(self) -> bool:
        return self.bias_correction

    def init(self, g: Tensor) -> State:
        return {
            self.key: torch.zeros_like(
                g, dtype=torch.promote_types(g.dtype, torch.float32), memory_format=torch.preserve_format
            )
        }

    def observe(self, state: State, g: Tensor, hyper: Hyper) -> State:
        v = state[self.key]
        g = g.to(v.dtype)
        if self.average == "sum":
            return {self.key: torch.addcmul(v, g, g)}
        if isinstance(hyper.beta2, Tensor):
            return {self.key: torch.lerp(v, g * g, (1 - hyper.beta2).to(v.dtype))}
        return {self.key: (v * hyper.beta2).addcmul_(g, g, value=1 - hyper.beta2)}

    def into(self, state: State, x: Tensor, hyper: Hyper, step: Tensor | None) -> Tensor:
        return self.inverse(state[self.key], hyper, step).mul_(x)

    def back(self, state: State, d: Tensor, hyper: Hyper, step: Tensor | None) -> Tensor:
        return self.inverse(state[self.key], hyper, step).mul_(d)

    def inverse(self, v: Tensor, hyper: Hyper, step: Tensor | None) -> Tensor:
        """1 / D, elementwise, a new tensor in v's dtype; 0 where D = 0."""
        squared = power(v, 2 * self.power)
        if self.eps_inside:
            squared.add_(hyper.eps)
        if self.bias_correction:
            squared.div_((bias_correction(hyper.beta2, step) ** (2 * self.power)).to(v.dtype))
        if not self.eps_inside:
            squared.add_(hyper.eps)
        inverse = squared.rsqrt_()
        if isinstance(hyper.eps, float) and hyper.eps >= torch.finfo(v.dtype).tiny:
            return inverse  # D > 0 everywhere; a smaller eps may be 0 in v's dtype
        return inverse.masked_fill_(torch.isinf(inverse), 0.0)
