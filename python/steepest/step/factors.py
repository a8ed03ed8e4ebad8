"""What is learned from the gradients of matrices, and the refresh of Kronecker factors that are due, all together."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import chain

import torch
from torch import Tensor

from ..chunking import chunk_by_bytes
from ..ops import streams
from ..ops.rotated import Stacks
from ..parts import Hyper
from ..parts.precondition import PENDING, Gathered, Kronecker, Phase, refresh_bytes
from ..recipe import CLOCK, State
from .parameter import Matrices, Parameter

__all__ = ["Factors", "advance_clocks"]


class Factors:
    """The factors of these matrices. What state gives the calls that take many at once is gathered once for all those
    that come together: it stays where it is.
    """

    def __init__(self, matrices: Sequence[Matrices]) -> None:
        self._matrices = matrices
        self._known: dict[tuple[int, ...], Stacks] = {}

    def update(self, *, after: bool) -> None:
        """Factors that learn before the step, or after it, take the gradients, in place; what is due is refreshed."""
        for part, phase, some in self._due(operator.attrgetter("after" if after else "before")):
            self._store(some, part.update_factors_in_place, part.update_factors)
            if phase.commits:
                streams.join(each.state[PENDING] for each in some)
                for each in some:
                    each.keep(part.commit(each.state))
            if phase.refreshes:
                self._refresh(part, phase, some)

    def refresh(self) -> None:
        """The refresh of those that are due and have learned."""
        for part, phase, some in self._due(operator.attrgetter("refreshes")):
            self._refresh(part, phase, some)

    def _due(self, is_due: Callable[[Phase], bool]) -> Iterator[tuple[Kronecker, Phase, list[Matrices]]]:
        """Matrices whose phase says so, with those that come together with them."""
        due: dict[tuple[int, Phase], list[Matrices]] = {}
        for each in self._matrices:
            if is_due(each.phase):
                due.setdefault((each.parameter.group, each.phase), []).append(each)
        for (_, phase), some in due.items():
            part = some[0].recipe.kronecker
            assert part is not None
            yield part, phase, some

    def _refresh(self, part: Kronecker, phase: Phase, matrices: Sequence[Matrices]) -> None:
        if phase.at_once and phase.exact is None and self._refreshed_in_place(part, matrices):
            return
        max_bytes = matrices[0].parameter.options.max_workspace_bytes
        for run in chunk_by_bytes(matrices, lambda each: refresh_bytes(each.state), max_bytes):
            _refresh(part, phase, run)

    def observe(self, matrices: Sequence[Matrices]) -> None:
        """Statistics that every gradient of these adds to, such as SOAP's second moment in the present metric."""
        groups: dict[int, list[Matrices]] = {}
        for each in matrices:
            if each.phase.steps and each.recipe.measures_gradients:
                groups.setdefault(each.parameter.group, []).append(each)
        for of_group in groups.values():
            recipe = of_group[0].recipe
            part = None if recipe.transforms else recipe.kronecker
            self._store(of_group, None if part is None else part.observe_in_place, recipe.observe_matrices)

    def _store(
        self,
        matrices: Sequence[Matrices],
        together: Callable[[Stacks, list[Tensor], Hyper, list[Tensor]], bool] | None,
        alone: Callable[[State, Tensor, Hyper], State],
    ) -> None:
        """What `alone` gives of the gradients of one group goes into their states, in one call of `together` where that
        says that it did it.
        """
        options, hyper = matrices[0].parameter.options, matrices[0].parameter.step_values.hyper
        alike: dict[torch.dtype, list[Matrices]] = {}  # so that none goes another way for what is beside it
        for each in matrices:
            alike.setdefault(each.grad.dtype, []).append(each)
        runs = (chunk_by_bytes(of, lambda each: each.grad.nbytes, options.max_workspace_bytes) for of in alike.values())
        for some in chain.from_iterable(runs):
            grads = [each.by_matrices(each.grad) for each in some]  # which may be copies
            if together is None or not together(self._stacks(some), grads, hyper, [each.finite for each in some]):
                for each, g in zip(some, grads, strict=True):
                    each.keep(alone(each.state, g, hyper))

    def _refreshed_in_place(self, part: Kronecker, matrices: Sequence[Matrices]) -> bool:
        flags = [each.finite for each in matrices]
        return part.refresh_in_place(self._stacks(matrices), [each.state for each in matrices], flags)

    def _stacks(self, matrices: Sequence[Matrices]) -> Stacks:
        """What the state of these matrices, of one recipe, gives the calls."""
        key = tuple(map(id, matrices))
        if key not in self._known:
            part = matrices[0].recipe.kronecker
            assert part is not None
            self._known[key] = part.stacks([each.state for each in matrices], [each.shape for each in matrices])
        return self._known[key]


def advance_clocks(parameters: Sequence[Parameter]) -> None:
    """Counts this step in the clocks by which the host decides when to refresh."""
    for parameter in parameters:
        if parameter.recipe.kronecker is not None:
            parameter.state[CLOCK].add_(1)


def _refresh(part: Kronecker, phase: Phase, matrices: Sequence[Matrices]) -> None:
    states = [each.state for each in matrices]
    gathered = part.gather(states, exact=phase.exact)
    device = matrices[0].parameter.tensor.device
    with nullcontext() if phase.at_once else streams.beside(device, _touched(part, gathered, matrices)):
        refreshed = part.refresh(gathered, states)
        for each, fresh in zip(matrices, refreshed, strict=True):
            each.keep({key: t for key, t in fresh.items() if key in part.keys})
        streams.written([state[key] for state, fresh in zip(states, refreshed) for key in fresh if key in state])
    if phase.at_once:
        for each, fresh in zip(matrices, refreshed, strict=True):
            each.keep(part.commit({**each.state, **fresh}))


def _touched(part: Kronecker, gathered: Sequence[Gathered], matrices: Sequence[Matrices]) -> Iterator[Tensor]:
    """What a refresh reads and writes."""
    for some in gathered:
        yield from some.tensors
    for each in matrices:
        yield each.finite
        yield from (each.state[key] for key in part.keys)
