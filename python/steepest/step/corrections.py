"""Gradients that a step goes by in place of those of the loss: with weight decay in them, corrected by those before.

correct     before anything is measured            remember    once it is known which parameters step
clip        once the sums of squares are known
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..parts import Hyper
from .parameter import Parameter, store_if

__all__ = ["Corrections"]


class Corrections:
    """What the recipes of these parameters do to gradients, of those that do; without any it is false."""

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self._parameters = {i: p for i, p in enumerate(parameters) if p.recipe.corrects_gradient}
        #: gradients with weight decay and without correction, which the next correction reads
        self._penalized: dict[int, Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self._parameters)

    def correct(self, grads: list[Tensor], hypers: Sequence[Hyper]) -> None:
        """Replaces gradients of the list, which is of all parameters, unscaled and of what is minimised."""
        for i, p in self._parameters.items():
            g = self._penalized[i] = p.recipe.penalized(grads[i], p.value(), hypers[p.group])
            grads[i] = p.recipe.corrected(p.state, g, hypers[p.group])

    def clip(self, grads: list[Tensor], squares: Sequence[Tensor]) -> None:
        """Replaces what `correct` gave; squares: 0-d fp64, of all of each parameter's gradient."""
        for i, p in self._parameters.items():
            grads[i] = p.recipe.clipped(grads[i], squares[i])

    def remember(self) -> None:
        """The state of those that step takes what the next correction reads."""
        for i, p in self._parameters.items():
            if p.step_values.phase.steps:
                store_if(p.step_values.finite, p.state, p.recipe.remembered_gradient(self._penalized[i]))
        self._penalized = {}
