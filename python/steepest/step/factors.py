"""What is learned from the gradients of matrices, and the refresh of Kronecker factors that are due, all together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

from torch import Tensor

from ..chunking import chunk_by_bytes
from ..ops import streams
from ..parts.precondition import PENDING, Gathered, Kronecker, Phase, refresh_bytes
from ..recipe import CLOCK, Recipe
from .parameter import Matrices, Parameter

__all__ = ["advance_clocks", "observe_matrices", "update_factors"]


def update_factors(matrices: Sequence[Matrices]) -> None:
    """Factors take the gradients of these matrices, in place, and what is due is refreshed."""
    due: dict[tuple[int, Recipe, Phase], list[Matrices]] = {}
    for each in matrices:
        due.setdefault((each.parameter.group, each.recipe, each.phase), []).append(each)
    for (_, recipe, phase), some in due.items():
        part = recipe.kronecker
        assert part is not None
        for each in some:
            each.keep(part.update_factors(each.state, each.by_matrices(each.grad), each.parameter.step_values.hyper))
        if phase.commits:
            streams.join(each.state[PENDING] for each in some)
            for each in some:
                each.keep(part.commit(each.state))
        if phase.refreshes:
            max_bytes = some[0].parameter.options.max_workspace_bytes
            for run in chunk_by_bytes(some, lambda each: refresh_bytes(each.state), max_bytes):
                _refresh(part, phase, run)


def observe_matrices(matrices: Sequence[Matrices]) -> None:
    """Statistics that every gradient adds to, such as SOAP's second moment in the present metric."""
    for each in matrices:
        if each.recipe.measures_gradients:
            g, hyper = each.by_matrices(each.grad), each.parameter.step_values.hyper
            each.keep(each.recipe.observe_matrices(each.state, g, hyper))


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
