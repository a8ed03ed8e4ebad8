"""Steps that the library takes whole, on a CPU, by the addresses of what they read and write: no list of tensors.

    begin     whether the step that comes is such a one
    take      gradients looked at, state and weights moved
    finish    what is yet to be done of it by torch operations

What stays is all that `Fused` has: bits, tables, and that a parameter steps or does not by its own gradient.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from ..ops.multi_tensor import NOT_SCALED, Groups, Scaling
from ..ops.whole_steps import gradients_by_address, numbers_of, takes
from ..parts import Hyper
from .buckets import FusedBatch
from .fused import Fused, groups_of
from .parameter import Parameter

__all__ = ["ByAddress", "has_addresses"]


def has_addresses(p: Parameter) -> bool:
    """Whether what the elementwise work on a parameter reads and writes is here, has addresses, and dtypes that are
    handed over with them.
    """
    if p.ranks is not None or p.is_coded or p.recipe.stores_weights or p.recipe.corrects_gradient:
        return False
    state = {key: t for key, t in p.state.items() if isinstance(t, Tensor)}
    known = (("step",), p.recipe.rounding.keys)
    counted, rounding = ([state.pop(key) for key in keys if key in state] for keys in known)
    return takes([p.source, p.grad, *state.values()], counted, rounding)


class ByAddress(Fused):
    """`Fused` for parameters that do not wait for one another, whose steps are one call of `take`.

    Gradients without an address, and modes that look at every operation, get the ops of `Fused`.
    """

    #: those of the step that is being taken by addresses
    _grads: Sequence[Tensor] = ()
    _hypers: Sequence[Hyper] = ()
    _scaling: Scaling = NOT_SCALED

    @cached_property
    def _weights(self) -> list[Tensor]:
        return [p.source for p in self.parameters]

    def groups(self, hypers: Sequence[Hyper]) -> Groups:
        """The numbers of all groups, whichever of them these parameters are in."""
        return groups_of(hypers, self._group_of, self.device)

    def begin(self, grads: Sequence[Tensor], hypers: Sequence[Hyper], scaling: Scaling = NOT_SCALED) -> bool:
        """Whether the step with these gradients, which have addresses, is one by addresses; if so it is next."""
        self._grads, self._hypers, self._scaling = grads, hypers, scaling
        return bool(grads)

    def take(self, numbers: array[float]) -> None:
        """The step that has begun; numbers: those of `groups`, in the layout of `numbers_of`."""
        raise NotImplementedError

    @property
    def has_rest(self) -> bool:
        """Whether `finish` is to compute something of the step that was taken."""
        return False

    def decide(
        self, hypers: Sequence[Hyper], scaling: dict[torch.device, Scaling], lacking: Tensor | None = None
    ) -> None:
        if not self.begin(gradients_by_address(self._weights), hypers, scaling[self.device]):
            super().decide(hypers, scaling, lacking)

    def observe(self) -> None:
        if not self._grads:
            super().observe()

    def batches(self) -> list[FusedBatch]:
        return self._present[:1] if self._grads else super().batches()

    def send(self, batch: FusedBatch) -> list[Callable[[], Tensor]]:
        if not self._grads:
            return super().send(batch)
        self.take(numbers_of(self.groups(self._hypers)))
        return []

    def finish(self) -> None:
        if not self._grads:
            super().finish()
        self._grads = ()
