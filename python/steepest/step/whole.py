"""Steps that are elementwise as a whole (AdamW's), on a CPU: parameter by parameter, each by its own gradient.

    take    for every parameter: whether its gradient is finite, then moments and weight

Beside the two passes of `Fused` the second look at a gradient is into the cache.
"""

from __future__ import annotations

from array import array
from functools import cached_property

from ..ops.program import Program
from ..ops.whole_steps import Step, WholeSteps
from .buckets import FusedItem
from .by_address import ByAddress, has_addresses
from .parameter import Parameter

__all__ = ["Whole", "steps_whole"]


def steps_whole(p: Parameter, program: Program, backend: str) -> bool:
    """Whether `Whole` takes a parameter, whose step no other's gradient has a say in."""
    return backend == "cpu" and program.whole and has_addresses(p)


class Whole(ByAddress):
    """`ByAddress` for parameters that `steps_whole` takes."""

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

    def take(self, numbers: array[float]) -> None:
        self._steps_by_address.take(self._grads, self._weights, numbers, self._scaling)
