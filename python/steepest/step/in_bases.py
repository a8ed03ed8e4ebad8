"""Steps of Adam in the eigenbases of Kronecker factors (SOAP's), on a CPU: one call for all parameters.

    take      gradients looked at, moments, the update in the bases and back, weights, what factors learn, and a refresh
              of the bases that are due
    finish    exact bases where that got no hold of them, and refreshes of other kinds, by what `Fused` calls

Steps that do more than step and learn are those of `Fused`.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from ..linalg.basis import ACCEPTED, LIMITS, TRIES
from ..ops import rotated
from ..ops.matmul import turns_in_order
from ..ops.multi_tensor import NOT_SCALED, Scaling
from ..ops.steps_in_bases import StepInBases, StepsInBases
from ..ops.whole_steps import by_address, takes
from ..parts import Diagonal, Hyper
from ..parts.precondition import BASES, FACTORS, LEARNED, STATUS, Phase, Rotated
from ..recipe import CLOCK
from .buckets import FusedItem
from .by_address import ByAddress
from .factors import advance_clocks
from .parameter import Parameter, StepValues

__all__ = ["InBases", "steps_in_bases"]


def steps_in_bases(p: Parameter, backend: str) -> bool:
    """Whether `InBases` takes a parameter: one stack of short matrices, in fp32, which asks for nothing else."""
    recipe, part = p.recipe, p.recipe.precondition
    alone = p.ranks is None and not p.is_coded and not recipe.stores_weights and not recipe.accepts_by_state
    if backend != "cpu" or not alone or recipe.corrects_gradient or p.options.maximize or not isinstance(part, Rotated):
        return False
    if not isinstance(part.inner, Diagonal) or not part.steps_at_once or not recipe.leaves_directions:
        return False
    if part.delay or len(p.pieces) != 1:
        return False
    piece, rounding = p.pieces[0], [p.state[key] for key in recipe.rounding.keys]
    if piece.narrow or not p.source.numel() or not turns_in_order(piece.rows, piece.cols):
        return False
    of_metric = [p.state[key] for key in part.keys if key not in STATUS]
    statuses = [p.state[key] for key in STATUS if key in p.state]
    if not by_address(statuses) or not all(t.is_contiguous() and t.dtype is torch.int32 for t in statuses):
        return False
    in_fp32 = all(t.dtype is torch.float32 for t in (p.grad, *of_metric))
    counted = [p.state["step"]] if "step" in p.state else []
    return in_fp32 and takes([p.source, p.grad, p.momentum, *of_metric], counted, rounding)


class InBases(ByAddress):
    """`ByAddress` for parameters that `steps_in_bases` takes."""

    _betas: Sequence[float] = ()
    _phases: Sequence[Phase] = ()
    #: which bases the call refreshes, and those that it left: (step, side, matrix)
    _due: Sequence[bool] = ()
    _left: Sequence[tuple[int, int, int]] = ()

    @cached_property
    def _steps_by_address(self) -> StepsInBases:
        floats = self._max_bytes // 8  # of an update, and as much around it
        steps = [self._step_of(item) for item in self._items]
        return StepsInBases(steps, self.table, floats, LIMITS, ACCEPTED, TRIES)

    def _step_of(self, item: FusedItem) -> StepInBases:
        p, matrices = item.parameter, item.matrices
        assert matrices is not None
        part, state = p.recipe.precondition, matrices.state
        assert isinstance(part, Rotated)
        assert isinstance(part.inner, Diagonal)
        most, most_square = p.recipe.limits(p.grad_dtype)
        return StepInBases(
            program=item.program,
            shape=matrices.shape,
            param_dtype=p.tensor.dtype,
            momentum=p.momentum,
            second=state[part.inner.key],
            mantissa=item.remainder,
            step=p.state.get("step", self._absent),
            learned=state[LEARNED],
            factors=(state[FACTORS[0]], state[FACTORS[1]]),
            bases=(state[BASES[0]], state[BASES[1]]),
            statuses=(state.get(STATUS[0], self._absent), state.get(STATUS[1], self._absent)),
            corrected=part.inner.bias_correction,
            eps_inside=part.inner.eps_inside,
            ratio=matrices.ratio,
            most=most,
            most_square=most_square,
            group=p.group,
            place=item.place,
        )

    @cached_property
    def _clocks(self) -> list[Tensor]:
        return [p.state[CLOCK] for p in self.parameters]

    def begin(self, grads: Sequence[Tensor], hypers: Sequence[Hyper], scaling: Scaling = NOT_SCALED) -> bool:
        plain = bool(grads) and scaling.grad_scale is None and rotated.wanted(grads[0])
        if not (plain and self._knows_rates(hypers) and self._knows_phases()):
            grads, self._betas = (), ()
        return super().begin(grads, hypers, scaling)

    def _knows_rates(self, hypers: Sequence[Hyper]) -> bool:
        """Reads the rates of factors' averages, of all groups; whether the call is for them."""
        if hypers is self._hypers and self._betas:
            return True
        rates = {group: part.factor_rate_of_whole_steps(hypers[group]) for group, part in self._part_of_group.items()}
        betas = {group: rate for group, rate in rates.items() if rate is not None}
        self._betas = [betas.get(group, 0.0) for group in range(len(hypers))] if len(betas) == len(rates) else ()
        return bool(self._betas)

    def _knows_phases(self) -> bool:
        """Reads the clocks; whether what they say is done is a step and what may come after it."""
        at = [(p.group, clock) for p, clock in zip(self.parameters, map(int, self._clocks), strict=True)]
        known = {each: self._part_of_group[each[0]].phase(each[1]) for each in dict.fromkeys(at)}
        due = {each for each, phase in known.items() if phase.refreshes and self._tracks(each[0], phase)}
        self._due = [each in due for each in at] if due else ()
        known |= {each: known[each]._replace(refreshes=False) for each in due}
        self._phases = [known[each] for each in at]
        return all(map(_only_steps, known.values()))

    def _tracks(self, group: int, phase: Phase) -> bool:
        """Whether the call takes a refresh."""
        return phase.exact is None and self._part_of_group[group].tracks_in_place(self.device)

    @cached_property
    def _part_of_group(self) -> dict[int, Rotated]:
        parts = {p.group: p.recipe.precondition for p in self.parameters}
        return {group: part for group, part in parts.items() if isinstance(part, Rotated)}

    def take(self, numbers: array[float]) -> None:
        step = (self._grads, self._weights, numbers, self._betas, self._scaling.found_inf)
        self._left = self._steps_by_address.take(*step, self._due)

    @property
    def has_rest(self) -> bool:
        return bool(self._left) or any(phase.refreshes for phase in self._phases)

    def finish(self) -> None:
        if self._grads:
            if self.has_rest:
                self._finish_refreshes()
            advance_clocks(self.parameters)
        super().finish()

    def _finish_refreshes(self) -> None:
        for i, side, matrix in self._left:
            item = self._items[i]
            assert item.matrices is not None
            self._part_of_group[item.parameter.group].solve_in_place(item.matrices.state, side, matrix)
        if any(phase.refreshes for phase in self._phases):
            flags = (self._column("finite") != 0).unbind()
            for p, g, flag, phase in zip(self.parameters, self._grads, flags, self._phases, strict=True):
                p.step = StepValues(g, flag, phase, self._hypers[p.group])
            self._factors.refresh()
            for p in self.parameters:
                p.step = None


def _only_steps(phase: Phase) -> bool:
    """Whether a step steps, then learns, and refreshes at most what is taken at once."""
    plain = phase.steps and phase.after and not phase.before and not phase.commits
    return plain and (phase.at_once or not phase.refreshes)
