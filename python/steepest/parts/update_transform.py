"""What comes between the direction and the weights, and may remember: a transform of the update.

    u, state <- apply(state, u, m)        u = P^-1 d, as long as the direction says; m is what the momentum reads, or
                                          of a transform that `reads_gradient` the gradient

Grafting gives u another length, `Normalize` divides its rows by a running size of them, momentum of updates averages
them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..state_layout import StateSpec
from .hyper import Hyper
from .precondition import State

__all__ = ["UpdateTransform"]


@dataclass(frozen=True)
class UpdateTransform:
    """Base of the transforms: one that remembers nothing and changes nothing. All functions are pure.

    Tensors of a gradient, a momentum or an update are (batch, rows, columns); state is as its layout says (see
    `steepest.state_layout`), elementwise state being (batch, rows, columns) too.
    """

    #: whether `observe_matrices` is there; owners of sharded matrices are sent whole gradients for it
    measures_gradients: ClassVar[bool] = False
    #: whether `apply` is given the gradient in the place of what the momentum reads
    reads_gradient: ClassVar[bool] = False
    #: kernels that a GPU is asked for (`steepest.ops.selfcheck.FAMILIES`)
    families: ClassVar[tuple[str, ...]] = ()

    @property
    def specs(self) -> tuple[StateSpec, ...]:
        """The state it keeps, which begins at zero."""
        return ()

    @property
    def counts_steps(self) -> bool:
        """Whether it needs state["step"], the count t of this step."""
        return False

    def observe(self, state: State, g: Tensor, hyper: Hyper) -> State:
        """The elementwise state that takes the raw gradient, before the direction."""
        return {}

    def observe_matrices(self, state: State, g: Tensor, hyper: Hyper) -> State:
        """The state of matrices that takes their raw gradients (batch, rows, cols), before the direction."""
        return {}

    def scale(self, state: State, m: Tensor, hyper: Hyper) -> Tensor | None:
        """What `apply` multiplies updates by, (batch,), where it does no more than that and remembers nothing.

        The fused ops do it then as they read the direction. None, as here: `apply` is asked; a transform that has a
        method of its own gives numbers always.
        """
        return None

    def apply(self, state: State, u: Tensor, m: Tensor, hyper: Hyper) -> tuple[Tensor, State]:
        """(the update, the state that takes it)."""
        return u, {}
