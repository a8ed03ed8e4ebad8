"""Steps that are elementwise as a whole (AdamW's), on a CPU: parameter by parameter, each by its own gradient.

    take    for every parameter: whether its gradient is finite, then moments and weight

Beside the two passes of `Fused` the second look at a gradient is into the cache, and no list of tensors is handed over.
What stays: bits, tables, and that a parameter steps or does not by its own gradient.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from ..ops.multi_tensor import NOT_SCALED, Groups, Scaling
from ..ops.program import Program
from ..ops.whole_steps import Step, WholeSteps, gradients_by_address, numbers_of, takes
from ..parts import Hyper
from .buckets import FusedBatch, FusedItem
from .fused import Fused, groups_of
from .parameter import Parameter

__all__ = ["Whole", "steps_whole"]


def steps_whole(p: Parameter, program: Program, backend: str) -> bool:
    """Whether `Whole` takes a parameter, whose step no other's gradient has a say in."""
    if backend != "cpu" or not program.whole or p.ranks is not None or p.is_coded:
        return False
    if p.recipe.stores_weights or p.recipe.corrects_gradient:
        return False
    state = [t for t in p.state.values() if isinstance(t, Tensor)]
    return takes([p.source, p.grad, *state])


class Whole(Fused):
    """`Fused` for parameters that `steps_whole` takes, which do not wait for one another.

    Gradients without an address, and modes that look at every operation, get the ops of `Fused`.
    """

    _hypers: Sequence[Hyper] = ()
    _scaling: Scaling = NOT_SCALED
    #: of the step that is being taken by addresses
    _grads: Sequence[Tensor] = ()

    @cached_property
    def _steps_by_address(self) -> WholeSteps:
        return WholeSteps([self._step_of(item) for item in self._items], self.table)

    def _step_of(self, item: FusedItem) -> Step:
        p = item.parameter
        return Step(
            program=item.program,
            numel=p.tensor.numel(),
            grad_dtype=p.grad_dtype,
            param_dtype=p.tensor.dtype,
            momentum=p.momentum,
            second=item.second,
            mantissa=item.remainder,
            step=p.state.get("step", self._absent),
            group=p.group,
            place=item.place,
        )

    @cached_property
    def _weights(self) -> list[Tensor]:
        return [p.source for p in self.parameters]

    def decide(
        self, hypers: Sequence[Hyper], scaling: dict[torch.device, Scaling], lacking: Tensor | None = None
    ) -> None:
        self._grads = gradients_by_address(self._weights)
        if not self._grads:
            return super().decide(hypers, scaling, lacking)
        self._hypers, self._scaling = hypers, scaling[self.device]
        return None

    def groups(self, hypers: Sequence[Hyper]) -> Groups:
        """The numbers of all groups, as `take` has them."""
        return groups_of(hypers, self._group_of, self.device)

    def take(self, grads: Sequence[Tensor], weights: Sequence[Tensor], numbers: array[float]) -> None:
        """All of a step without a scaler, by the addresses of these gradients and weights."""
        self._steps_by_address.take(grads, weights, numbers)

    def send(self, batch: FusedBatch) -> list[Callable[[], Tensor]]:
        if not self._grads:
            return super().send(batch)
        numbers = numbers_of(self.groups(self._hypers))
        self._steps_by_address.take(self._grads, self._weights, numbers, self._scaling)
        self._grads = ()
        return []
