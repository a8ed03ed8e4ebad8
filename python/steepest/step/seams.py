"""The places where a step lets others in: what a distributed step adds without a step of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from .parameter import Matrices

__all__ = ["Reduce", "Transport"]

#: Takes (parameters, 3) fp64 rows of finite (0 or 1), sum of squares and largest magnitude of each gradient, of one
#: executor and in its order, and reduces them over ranks in place (min, sum, max) before anything is written.
Reduce = Callable[[Tensor], None]


class Transport(Protocol):
    """Carries the inputs of directions to where these are taken, and the directions back.

    Both work on what shares a step's launches: one tensor (matrices, rows, cols) for every list of items.
    """

    def inputs(self, items: Sequence[Sequence[Matrices]], xs: list[Tensor]) -> list[Tensor]:
        """What is to be worked on here, of the inputs made here."""
        ...

    def directions(self, items: Sequence[Sequence[Matrices]], ds: list[Tensor]) -> list[Tensor]:
        """The directions of the inputs made here, of those that were worked on here."""
        ...
