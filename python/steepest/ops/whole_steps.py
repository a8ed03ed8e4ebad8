"""Whole steps of many parameters on a CPU: each gradient is looked at, and taken while it is in the cache.

What `grad_stats` and then `update_moments` do to contiguous tensors whose program is whole, with their bits, in one
call of the library that is no op (csrc/multi_tensor/whole_steps.h). An op takes lists of tensors, which cost .4 us each
to hand over; here their addresses are written down once, and of a step only those of gradients and weights are new.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import backend as _backend
from .multi_tensor import NOT_SCALED, Groups, Scaling, Table, count_writes
from .program import Program

#: `Dtype` in csrc/common/dtype.h
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3, torch.int16: 4}

#: types of tensors without a class of their own
PLAIN = frozenset({Tensor, torch.nn.Parameter})


@dataclass(frozen=True)
class Step:
    """A parameter's step but for its gradient and weight, of which `numel` and the dtypes stay.

    Absent tensors are without elements. place: tells its random bits from another's.
    """

    program: Program
    numel: int
    grad_dtype: torch.dtype
    param_dtype: torch.dtype
    momentum: Tensor
    second: Tensor
    mantissa: Tensor
    step: Tensor
    group: int
    place: tuple[int, int, int]

    def numbers(self) -> list[int]:
        """`WholeStep` in csrc/multi_tensor/whole_steps.h."""
        dtypes = (self.grad_dtype, self.param_dtype, self.momentum.dtype, self.second.dtype)
        state = (self.momentum, self.second, self.mantissa, self.step)
        addresses = [t.data_ptr() if t.numel() else 0 for t in state]
        rest = [self.program.packed(), self.group, *self.place]
        return [self.numel, *[CODES[dtype] for dtype in dtypes], *addresses, *rest]


class WholeSteps:
    """Steps of parameters whose state stays where it is; the i-th has row i and line i of `table`."""

    def __init__(self, steps: Sequence[Step], table: Table) -> None:
        self._steps, self._table = steps, table
        self._numbers = array("q", [number for step in steps for number in step.numbers()])

    def take(
        self, grads: Sequence[Tensor], params: Sequence[Tensor], numbers: array[float], scaling: Scaling = NOT_SCALED
    ) -> None:
        """One step, as `grad_stats` and `update_moments` take it; the tensors are contiguous. numbers: `numbers_of`."""
        assert _backend.extension is not None
        memory = memory_of(self._table, scaling.found_inf, scaling.grad_scale)
        _backend.extension.whole_steps(self._numbers, addresses(grads), addresses(params), numbers, *memory)
        count_writes(params)


def addresses(tensors: Sequence[Tensor]) -> array[int]:
    """The addresses of their first elements."""
    return array("q", map(Tensor.data_ptr, tensors))


def memory_of(table: Table, *said: Tensor | None) -> list[int]:
    """The addresses of what a scaler says, 0 where it says nothing, and of a table: its rows, sums and counter."""
    return [0 if t is None else t.data_ptr() for t in (*said, table.rows, table.sums, table.skipped)]


def numbers_of(groups: Groups) -> array[float]:
    """The numbers of all groups, those that are tensors among them."""
    numbers = array("d", groups.values)
    for at, number in zip(groups.at, groups.tensors, strict=True):
        torch.frombuffer(numbers, dtype=torch.float64)[at] = number  # which asks no tensor for its value
    return numbers


def by_address(tensors: Sequence[Tensor]) -> bool:
    """Whether what is at these tensors' addresses are their numbers: no class of its own, no sign yet to be turned."""
    return PLAIN.issuperset(map(type, tensors)) and not any(map(Tensor.is_neg, tensors))


def gradients_by_address(params: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of these parameters, where a step may take them by their addresses now; none where one has no
    address, or a mode looks at every operation.
    """
    grads = [p.grad for p in params if p.grad is not None]
    return grads if by_address(grads) and not torch._C._len_torch_dispatch_stack() else []


def takes(values: Sequence[Tensor], steps: Sequence[Tensor] = (), mantissas: Sequence[Tensor] = ()) -> bool:
    """Whether a parameter of these tensors may be stepped by their addresses: its own, its gradient and its averages,
    of dtypes that are handed over, and its counters and mantissas, which are read as fp32 and int16.
    """
    tensors = (*values, *steps, *mantissas)
    laid_out = all(t.device.type == "cpu" and t.is_contiguous() for t in tensors)
    typed = all(t.dtype in CODES and t.dtype.is_floating_point for t in values)
    typed = typed and all(t.dtype is torch.float32 for t in steps) and all(t.dtype is torch.int16 for t in mantissas)
    return by_address(tensors) and laid_out and typed
