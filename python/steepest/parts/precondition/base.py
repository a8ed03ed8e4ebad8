"""What every preconditioner answers.

For the norm ||X||_P = N(P X) the steepest direction at gradient G is  P^-1 dz_N(P^-T G)  and the dual norm is that of
P^-T G (arXiv:2510.10777, Theorem 2.3). A preconditioner therefore needs two maps, `into` = P^-T and `back` = P^-1, and
the statistics they come from.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..hyper import Hyper

State = dict[str, Tensor]


class Precondition(Protocol):
    """The verbs of a preconditioner. Its state is a dictionary of tensors under `keys`; all functions are pure.

    Of an elementwise one the state has the weight's shape and everything works on tensors of any shape; the
    other kind, `Kronecker`, takes (batch, m, n) and has verbs of its own besides.
    """

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the state tensors."""
        ...

    @property
    def counts_steps(self) -> bool:
        """Whether `into` and `back` need the step count t."""
        ...

    def init(self, g: Tensor) -> State:
        """State before the first gradient; g gives shape, device and layout."""
        ...

    def observe(self, state: State, g: Tensor, hyper: Hyper) -> State:
        """Statistics after the raw gradient g."""
        ...

    def into(self, state: State, x: Tensor, hyper: Hyper, step: Tensor | None) -> Tensor:
        """P^-T x: to the variables in which the norm is the base norm."""
        ...

    def back(self, state: State, d: Tensor, hyper: Hyper, step: Tensor | None) -> Tensor:
        """P^-1 d: back to the weight's own variables."""
        ...
