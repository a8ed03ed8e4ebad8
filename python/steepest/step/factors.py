"""What is learned from the gradients of matrices, and the refresh of Kronecker factors that are due, all together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

from torch import Tensor

from ..chunking import chunk_by_bytes
from ..ops import streams
from ..parts import Hyper
from ..parts.precondition import PENDING, Gathered, Kronecker, Phase, refresh_bytes
from ..recipe import CLOCK, State
from .parameter import Matrices, Parameter

__all__ = ["advance_clocks", "observe_matrices", "update_factors"]


def update_factors(matrices: Sequence[Matrices]) -> None:
    """Factors take the gradients of these matrices, in place, and what is due is refreshed."""
    due: dict[tuple[int, Phase], list[Matrices]] = {}
    for each in matrices:
        due.setdefault((each.parameter.group, each.phase), []).append(each)
    for (_, phase), some in due.items():
        part = some[0].recipe.kronecker
        assert part is not None
        _store(some, part.learn_in_place, part.update_factors)
        if phase.commits:
            streams.join(each.state[PENDING] for each in some)
            for each in some:
                each.keep(part.commit(each.state))
        if phase.refreshes and phase.at_once and phase.exact is None and _refreshed_in_place(part, some):
            continue
        if phase.refreshes:
            max_bytes = some[0].parameter.options.max_workspace_bytes
            for run in chunk_by_bytes(some, lambda each: refresh_bytes(each.state), max_bytes):
                _refresh(part, phase, run)


def _store(
    matrices: Sequence[Matrices],
    together: Callable[[list[State], list[Tensor], Hyper, list[Tensor]], bool],
    alone: Callable[[State, Tensor, Hyper], State],
) -> None:
    """What `alone` gives of the gradients of one group goes into their states, in one call of `together` where that
    says that it did it.
    """
    options, hyper = matrices[0].parameter.options, matrices[0].parameter.step_values.hyper
    for some in chunk_by_bytes(matrices, lambda each: each.grad.nbytes, options.max_workspace_bytes):
        grads = [each.by_matrices(each.grad) for each in some]  # which may be copies
        if not together([each.state for each in some], grads, hyper, [each.finite for each in some]):
            for each, g in zip(some, grads, strict=True):
                each.keep(alone(each.state, g, hyper))


def _refreshed_in_place(part: Kronecker, matrices: Sequence[Matrices]) -> bool:
    states, flags = [each.state for each in matrices], [each.finite for each in matrices]
    return part.refresh_in_place(states, [each.shape for each in matrices], flags)


def observe_matrices(matrices: Sequence[Matrices]) -> None:
    """Statistics that every gradient adds to, such as SOAP's second moment in the present metric."""
    groups: dict[int, list[Matrices]] = {}
    for each in matrices:
        if each.recipe.measures_gradients:
            groups.setdefault(each.parameter.group, []).append(each)
    for of_group in groups.values():
        recipe = of_group[0].recipe
        part = None if recipe.transforms else recipe.kronecker
        _store(of_group, _never if part is None else part.observe_in_place, recipe.observe_matrices)


def _never(*arguments: object) -> bool:
    return False


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
