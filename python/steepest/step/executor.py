"""What a plan asks of those who carry its steps out, and what they give it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..ops.multi_tensor import Scaling
from ..parts import Hyper
from .parameter import Matrices, Parameter

__all__ = ["Directed", "Executor"]


@dataclass(frozen=True)
class Directed:
    """The directions of a batch, ready to be stepped along.

    ds: one tensor (matrices, rows, cols) for all that shares a call.   lengths: for every item what its directions are
    yet to be multiplied by, (matrices,), or None.   norms: for every item the dual norms of its matrices, only where
    they were asked for: with U the step's update in the weight's variables, <M, U>, and in a "dual" step its root.
    """

    ds: list[Tensor]
    lengths: Sequence[Tensor | None]
    norms: Sequence[Tensor] | None = None


class Executor(Protocol):
    """Takes the steps of some of a plan's parameters; a batch is what shares its launches.

    The functions stand in the order in which `Plan.step` calls them.
    """

    backend: str
    #: batches that travel, there and back, while another's directions are taken
    prefetch: int

    @property
    def parameters(self) -> Sequence[Parameter]: ...

    def decide(
        self, hypers: Sequence[Hyper], scaling: dict[torch.device, Scaling], lacking: Tensor | None = None
    ) -> None:
        """Measures the gradients and says which parameters step; counts those that do not. No state is written.

        lacking: (parameters,) bool, whether a rank has no gradient of it, the same on all that have the parameter.
        """
        ...

    def observe(self) -> None:
        """State takes the gradients, as far as `send` does not do it on the way."""
        ...

    def batches(self) -> Sequence[Any]: ...

    def items(self, batch: Any) -> list[list[Matrices]]:
        """The matrices of each of a batch's inputs, in their order."""
        ...

    def send(self, batch: Any) -> list[Callable[[], Tensor]]:
        """Gives what waits for the direction's inputs, one tensor (matrices, rows, cols) for all that shares its call.

        Of matrices that ranks share the parts are on their way to the owners until then.
        """
        ...

    def directions(self, batch: Any, xs: list[Tensor]) -> list[Tensor]:
        """The directions of these inputs."""
        ...

    def directed(self, batch: Any, xs: list[Tensor], ds: list[Tensor], measure: bool) -> Directed:
        """The directions of these inputs with what is to be known of them."""
        ...

    def send_back(self, batch: Any, ds: Sequence[Tensor]) -> list[Callable[[], Sequence[Tensor]]]:
        """Gives what waits for the updates that these directions make; `send` the other way round."""
        ...

    def apply(self, batch: Any, sent: Sequence[Callable[[], Sequence[Tensor]]], norms: Sequence[Tensor | None]) -> None:
        """Moves the weights by what `send_back` has sent, times the norms where there are any."""
        ...

    def finish(self) -> None:
        """Factors that learn after the step take the gradients."""
        ...

    def sums_of(self, group: int) -> dict[str, Tensor]:
        """What the last step measured of a group: sums of squares, 0-d fp64; empty where it has no parameter here."""
        ...

    def notice_changes(self) -> None:
        """What a step does first, for a graph, which replays only what follows."""
        ...
