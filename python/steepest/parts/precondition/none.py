"""The preconditioner of methods that have none: P is the identity."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..hyper import Hyper
from .base import State


@dataclass(frozen=True)
class Identity:
    """into(x) = x, back(d) = d, no state."""

    keys: tuple[str, ...] = ()
    counts_steps: bool = False

    def init(self, g: Tensor) -> State:
        return {}

    def observe(self, state: State, g: Tensor, hyper: Hyper) -> State:
        return {}

    def into(self, state: State, x: Tensor, hyper: Hyper, step: Tensor | None) -> Tensor:
        return x

    def back(self, state: State, d: Tensor, hyper: Hyper, step: Tensor | None) -> Tensor:
        return d
