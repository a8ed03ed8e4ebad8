"""Whole steps of Adam in eigenbases on a CPU (SOAP's between two refreshes), one call for many parameters.

What `grad_stats`, `decide_steps`, `update_moments`, `adam_in_bases`, `apply_update` and `update_factors` do one after
the other, with their bits, in one call of the library that is no op (csrc/eigh/steps.h). Addresses are written down
once, as `steepest.ops.whole_steps` has it, and of a step only those of gradients and weights are new.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import backend as _backend
from .multi_tensor import Groups, Table, count_writes
from .program import Program
from .whole_steps import CODES, numbers_of


@dataclass(frozen=True)
class StepInBases:
    """A parameter's step but for its gradient and weight, both of `shape`, (matrices, rows, columns), and contiguous.

    Absent tensors are without elements.   factors, bases: the left and the right one.   corrected: whether `second` is
    corrected by `step` for its start.   eps_inside: as of `steepest.parts.Diagonal`.   ratio: on the learning rate, for
    the shape.   most, most_square: the largest magnitude, and sum of squares, of a gradient that is a step.   place:
    tells its random bits from another's.
    """

    program: Program
    shape: tuple[int, int, int]
    param_dtype: torch.dtype
    momentum: Tensor
    second: Tensor
    mantissa: Tensor
    step: Tensor
    learned: Tensor
    factors: tuple[Tensor, Tensor]
    bases: tuple[Tensor, Tensor]
    corrected: bool
    eps_inside: bool
    ratio: float
    most: float
    most_square: float
    group: int
    place: tuple[int, int, int]

    def row(self) -> list[int]:
        """`StepInBases` in csrc/eigh/steps.h."""
        state = (self.momentum, self.second, self.mantissa, self.step, self.learned, *self.factors, *self.bases)
        addresses = [t.data_ptr() if t.numel() else 0 for t in state]
        dtypes = [CODES[self.param_dtype], CODES[self.momentum.dtype]]
        rest = [self.corrected, self.eps_inside, self.program.packed(), self.group, *self.place]
        return [*self.shape, *dtypes, *addresses, *rest]

    def numbers(self) -> list[float]:
        """`StepNumbers` there."""
        return [self.ratio, self.most_square, self.most]


class StepsInBases:
    """Steps of parameters whose state stays where it is; the i-th has row i of `table`, and lines after those of the
    ones before it.

    workspace: elements that updates may take at once, of more than one parameter.
    """

    def __init__(self, steps: Sequence[StepInBases], table: Table, workspace: int) -> None:
        self._steps, self._table, self._workspace = steps, table, workspace
        self._rows = array("q", [number for step in steps for number in step.row()])
        self._numbers = array("d", [number for step in steps for number in step.numbers()])

    def take(
        self,
        grads: Sequence[Tensor],
        params: Sequence[Tensor],
        groups: Groups,
        betas: Sequence[float],
        found_inf: Tensor | None = None,
    ) -> None:
        """One step.   betas: of the factors, one for every group.   found_inf: as of `Scaling`."""
        assert _backend.extension is not None
        of_grads, of_params = (array("q", map(Tensor.data_ptr, some)) for some in (grads, params))
        hypers, rates = numbers_of(groups), array("d", betas)
        table = (self._table.rows, self._table.sums, self._table.skipped)
        memory = [0 if found_inf is None else found_inf.data_ptr(), *map(Tensor.data_ptr, table)]
        step = (self._rows, self._numbers, of_grads, of_params, hypers, rates)
        _backend.extension.steps_in_bases(*step, *memory, self._workspace)
        count_writes(params)
