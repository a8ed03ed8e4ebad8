"""Averages of the iterates, which are evaluated in the place of the last one.

    Ema            a <- rate a + (1 - rate) W;  s <- rate s + 1 - rate              evaluated: a / s
    ScheduleFree   z <- z + (W' - W);  s <- s + lr^2;  c = lr^2 / s
                   x <- (1 - c) x + c z;  W <- (1 - beta) z + beta x                evaluated: x

W' is where the step of the method leads from W, weight decay and all. The first is the average of Polyak and Ruppert
with forgetting, corrected for its beginning as in SPlus (arXiv:2506.07254): s is the sum of the weights of its terms.
The second is Algorithm 1 of arXiv:2405.15682, whose y is W: gradients are taken there, between the iterate z and its
average x, and so is the decay. With one lr c is 1 / t; the iterates of a warm-up count by lr^2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..state_layout import StateSpec
from .hyper import Hyper
from .precondition import State

__all__ = ["Average", "Ema", "ScheduleFree"]


@dataclass(frozen=True)
class Average:
    """Base of the averages; all functions are pure, and tensors of the weight's shape are in fp32 (fp64 for fp64).

    key: of the average.   mass_key: of the sum of its terms' weights, 0-d.
    """

    key: str = "average"
    mass_key: str = "average_mass"

    #: whether a step moves the weight on from where the average has put it
    moves: ClassVar[bool] = False

    @property
    def specs(self) -> tuple[StateSpec, ...]:
        """The state it keeps, which begins at zero; its elements are in the weight's dtype, but at least fp32."""
        return (StateSpec(self.key, "elementwise"), StateSpec(self.mass_key, "scalar", torch.float64, nonnegative=True))

    def observe(self, state: State, before: Tensor, after: Tensor, hyper: Hyper) -> tuple[Tensor, State]:
        """(the weight, the state) after a step that led it from `before` to `after`."""
        raise NotImplementedError

    def evaluated(self, state: State, value: Tensor) -> Tensor:
        """The average; the weight itself, `value`, where it has no term yet."""
        raise NotImplementedError


@dataclass(frozen=True)
class Ema(Average):
    """An exponential moving average; rate in (0, 1) multiplies the old one."""

    rate: float = 0.999

    def observe(self, state: State, before: Tensor, after: Tensor, hyper: Hyper) -> tuple[Tensor, State]:
        average, mass = state[self.key], state[self.mass_key]
        weight = torch.full_like(mass, 1 - self.rate)
        fresh = torch.lerp(average, after.to(average.dtype), weight.to(average.dtype))
        return after, {self.key: fresh, self.mass_key: torch.lerp(mass, torch.ones_like(mass), weight)}

    def evaluated(self, state: State, value: Tensor) -> Tensor:
        average, mass = state[self.key], state[self.mass_key]
        return torch.where(mass > 0, average / mass.to(average.dtype), value.to(average.dtype))


@dataclass(frozen=True)
class ScheduleFree(Average):
    """The weight between the iterate and its average; beta in [0, 1): with 0 it is the iterate, as without this."""

    beta: float = 0.9
    iterate_key: str = "iterate"

    moves: ClassVar[bool] = True

    @property
    def specs(self) -> tuple[StateSpec, ...]:
        mass = StateSpec(self.mass_key, "scalar", torch.float64, nonnegative=True)
        return (StateSpec(self.key, "elementwise"), mass, StateSpec(self.iterate_key, "elementwise"))

    def observe(self, state: State, before: Tensor, after: Tensor, hyper: Hyper) -> tuple[Tensor, State]:
        wide = torch.promote_types(state[self.key].dtype, after.dtype)
        x, z, mass = state[self.key].to(wide), state[self.iterate_key].to(wide), state[self.mass_key]
        begun, square = mass > 0, torch.zeros_like(mass) + hyper.lr * hyper.lr
        total = mass + square
        z = torch.where(begun, z, before) + (after - before)
        share = torch.where(begun, square / total, 1).to(z.dtype)
        x = torch.where(begun, torch.lerp(x, z, share), z)
        return torch.lerp(z, x, self.beta), {self.key: x, self.iterate_key: z, self.mass_key: total}

    def evaluated(self, state: State, value: Tensor) -> Tensor:
        return torch.where(state[self.mass_key] > 0, state[self.key], value.to(state[self.key].dtype))
