"""Whole steps of Adam in eigenbases on a CPU (SOAP's), one call for many parameters.

What `grad_stats`, `decide_steps`, `update_moments`, `adam_in_bases`, `apply_update`, `update_factors` and `track_bases`
do one after the other, with their bits, in one call of the library that is no op (csrc/eigh/steps.h). Addresses are
written down once, as `steepest.ops.whole_steps` has it, and of a step only those of gradients and weights are new.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import backend as _backend
from .multi_tensor import Table, count_writes
from .program import Program
from .whole_steps import CODES, addresses, memory_of


@dataclass(frozen=True)
class StepInBases:
    """A parameter's step but for its gradient and weight, both of `shape`, (matrices, rows, columns), and contiguous.

    Absent tensors are without elements.   factors, bases, statuses: the left and the right one.   corrected: whether
    `second` is corrected by `step` for its start.   eps_inside: as of `steepest.parts.Diagonal`.   ratio: on the
    learning rate, for the shape.   most, most_square: the largest magnitude, and sum of squares, of a gradient that is
    a step.   place: tells its random bits from another's.
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
    statuses: tuple[Tensor, Tensor]
    corrected: bool
    eps_inside: bool
    ratio: float
    most: float
    most_square: float
    group: int
    place: tuple[int, int, int]

    def row(self) -> list[int]:
        """`StepInBases` in csrc/eigh/steps.h."""
        metric = (*self.factors, *self.bases, *self.statuses)
        state = (self.momentum, self.second, self.mantissa, self.step, self.learned, *metric)
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

    workspace: elements that updates may take at once, of more than one parameter.   limits, accepted, tries: of a
    refresh, as of `rotated.track`.
    """

    def __init__(
        self,
        steps: Sequence[StepInBases],
        table: Table,
        workspace: int,
        limits: Sequence[float],
        accepted: int,
        tries: int,
    ) -> None:
        self._steps, self._table, self._workspace = steps, table, workspace
        self._limits, self._accepted, self._tries = array("d", limits), accepted, tries
        #: (step, side, matrix) of every basis, and whether it stays as it was although it was due
        self._places = [(i, side, k) for i, step in enumerate(steps) for side in (0, 1) for k in range(step.shape[0])]
        self._left = array("i", [0] * len(self._places))
        self._rows = array("q", [number for step in steps for number in step.row()])
        self._numbers = array("d", [number for step in steps for number in step.numbers()])

    def take(
        self,
        grads: Sequence[Tensor],
        params: Sequence[Tensor],
        numbers: array[float],
        betas: Sequence[float],
        found_inf: Tensor | None = None,
        due: Sequence[bool] = (),
    ) -> list[tuple[int, int, int]]:
        """One step.   numbers: `numbers_of` all groups.   betas: of the factors, one for every group.
        found_inf: as of `Scaling`.   due: of every step, whether its bases are refreshed after it; none are without.

        Returns:
            (step, side, matrix) of every basis that is due and stays as it was although the step was taken.
        """
        assert _backend.extension is not None
        memory = [*memory_of(self._table, found_inf), self._workspace]
        step = (self._rows, self._numbers, addresses(grads), addresses(params), numbers, array("d", betas))
        limits = (self._limits, self._accepted, self._tries)
        _backend.extension.steps_in_bases(*step, memory, array("b", due), self._left, *limits)
        count_writes(params)
        if not due or not any(self._left):
            return []
        return [place for place, left in zip(self._places, self._left, strict=True) if left]
