"""Steps in eigenbases of Kronecker factors on a CPU, each as one call for many stacks of fp32 matrices (batch, m, n).

    rotate           (L^T x R) / D;   back L (x / D) R^T;   and second moments v beta + (1 - beta) (L^T x R)^2
    adam             second moments of g as above, and with these L ((L^T x R) / D^2) R^T
    update_factors   factors <- factors + w (g g^T - factors), w = (1 - beta) / (1 - beta^t), and likewise of g^T g
    update_coupled   factors and values that are measured in the metric of each other, `csrc/eigh/coupled.h`
    track            steps of orthogonal iteration of every basis, where they help, and second moments sorted with it

A side without a factor has tensors without elements. `rotate` writes nothing else; the others write to state where the
flag of a stack is true. In all of them a matrix has the same bits in any call and on any number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from . import backend as _backend
from .fakes import register_fake
from .matmul import by_itself, matmul, turns_in_order

Way = Literal["into", "back", "observe"]
_WAYS = ("into", "back", "observe")  # `Way` in csrc/eigh/rotate.h


def supports(*tensors: Tensor) -> bool:
    """Whether the calls are for these tensors, which are fp32 and contiguous; what is traced goes by torch's ops."""
    return wanted(tensors[0]) and _is_supported(tensors)


def wanted(one: Tensor) -> bool:
    """Whether the calls are there and nothing says at present that torch's ops are to do it."""
    return by_itself(one) and _backend.takes_cpu_products()


def _is_supported(tensors: Sequence[Tensor]) -> bool:
    """Whether the calls take tensors of this type and layout."""
    return all(t.dtype is torch.float32 and t.is_contiguous() and t.is_cpu for t in tensors)


@dataclass(frozen=True, eq=False)
class Stacks:
    """The state of stacks of matrices as the calls take it; how it lies is looked at once.

    shapes: (batch, m, n) of each.   counts: of the gradients in the factors; 0-d.   Of each the left and the right one
    of factors, bases, statuses, (batch,) int32, and values, (batch, n). Of each one of seconds and steps; one without
    elements of a step that nobody counts. A list that is empty is not there.
    """

    shapes: Sequence[tuple[int, int, int]]
    factors: Sequence[Tensor]
    counts: Sequence[Tensor]
    bases: Sequence[Tensor] = ()
    statuses: Sequence[Tensor] = ()
    seconds: Sequence[Tensor] = ()
    steps: Sequence[Tensor] = ()
    values: Sequence[Tensor] = ()

    def supports_update(self, grads: Sequence[Tensor]) -> bool:
        """Whether `update_factors` is for these gradients."""
        return wanted(grads[0]) and self._has_supported_factors and _is_supported(grads)

    def supports_coupled_update(self, grads: Sequence[Tensor]) -> bool:
        """Whether `update_coupled` is for these gradients."""
        return self.supports_update(grads) and self._has_supported_bases

    def supports_track(self) -> bool:
        """Whether `track` is for them."""
        return wanted(self.factors[0]) and self._has_supported_factors and self._has_supported_bases

    def supports_rotation(self, xs: Sequence[Tensor]) -> bool:
        """Whether `rotate_all` is for these."""
        return wanted(xs[0]) and self._short and self._has_supported_bases and _is_supported(xs)

    @cached_property
    def numbers(self) -> list[int]:
        """The shapes one after another."""
        return [n for shape in self.shapes for n in shape]

    @cached_property
    def _short(self) -> bool:
        return all(turns_in_order(m, n) for _, m, n in self.shapes)

    @cached_property
    def _has_supported_factors(self) -> bool:
        return _is_supported(self.factors)

    @cached_property
    def _has_supported_bases(self) -> bool:
        return _is_supported([*self.bases, *self.seconds, *self.values])


def rotate(
    x: Tensor,
    left: Tensor,
    right: Tensor,
    second: Tensor,
    step: Tensor,
    way: Way,
    *,
    beta: float = 0.0,
    eps: float = 0.0,
    inside: bool = False,
) -> Tensor:
    """A new tensor of x's shape; D^2 = sqrt(second) / c + eps, or (sqrt(second) + eps) / c inside, and 1/0 = 0.

    c: sqrt(1 - beta^step), or 1 where the step has no elements; D is 1 where second has none. Products of sides
    that `turns_in_order` leaves out are torch's, one matrix after another.
    """

    def called(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        out = torch.empty_like(x)
        numbers = (_WAYS.index(way), beta, eps, inside)
        torch.ops.steepest.rotate([x], [left, right], [second], [step], *numbers, [], [out])
        return out

    if turns_in_order(*x.shape[-2:]) or not (left.numel() or right.numel()):
        return called(x, left, right)
    none = left.new_empty(0)
    if way == "back":
        x = called(x, none, none) if second.numel() else x
        x = matmul(left, x) if left.numel() else x
        return matmul(x, right.mT) if right.numel() else x
    x = matmul(left.mT, x) if left.numel() else x
    x = matmul(x, right) if right.numel() else x
    return called(x, none, none) if second.numel() else x


def rotate_all(
    xs: Sequence[Tensor],
    stacks: Stacks,
    way: Way,
    outs: Sequence[Tensor],
    flags: Sequence[Tensor] = (),
    *,
    beta: float = 0.0,
    eps: float = 0.0,
    inside: bool = False,
) -> None:
    """`rotate` of several stacks, all of them `turns_in_order`, into outs.

    flags: 0-d bool, whether a stack's out is written; without them all are. Outs of "observe" may be seconds.
    """
    lists = (xs, stacks.bases, stacks.seconds, stacks.steps)
    torch.ops.steepest.rotate(*lists, _WAYS.index(way), beta, eps, inside, flags, outs)


def adam(
    grads: Sequence[Tensor],
    xs: Sequence[Tensor],
    stacks: Stacks,
    outs: Sequence[Tensor],
    flags: Sequence[Tensor],
    *,
    beta: float,
    eps: float,
    inside: bool,
) -> None:
    """What "observe" gives of the gradients, then "into" and "back" of the xs, into outs; bits as by `rotate_all`.

    flags: 0-d bool, whether second moments are written. Outs all are.
    """
    lists = (grads, xs, stacks.bases, stacks.seconds, stacks.steps)
    torch.ops.steepest.adam_in_bases(*lists, beta, eps, inside, flags, outs)


def update_factors(grads: Sequence[Tensor], stacks: Stacks, flags: Sequence[Tensor], beta: float) -> None:
    """Factors take gradients, in place, which are counted.   flags: 0-d bool."""
    torch.ops.steepest.update_factors(grads, stacks.factors, stacks.counts, flags, beta)


def update_coupled(
    grads: Sequence[Tensor], stacks: Stacks, flags: Sequence[Tensor], beta: float, limited: bool
) -> None:
    """Factors and values take gradients, in place, which are counted; the first makes factors in no metric.

    flags: 0-d bool.   limited: as of `steepest.parts.Sides`.
    """
    lists = (grads, stacks.bases, stacks.factors, stacks.values, stacks.counts)
    torch.ops.steepest.update_coupled_factors(*lists, flags, beta, limited)


def track(
    stacks: Stacks, flags: Sequence[Tensor], limits: tuple[float, float, float], accepted: int, steps: int
) -> list[tuple[int, int, int]]:
    """A step of `steepest.ops.eigh.iterate` of every basis, in place, where limits say it helps; which stay.

    limits: (near, progress, settled): a step is taken where the whitening error was at most `near` and fell by the
    factor `progress`, to `settled` or to what rounding makes. The status is then `accepted`. Where one step is not
    enough for that there are more, at most so many.

    Returns:
        (stack, side, matrix) of every matrix that stays as it was although its flag is true.
    """
    left = torch.empty(2 * sum(stacks.numbers[::3]), dtype=torch.int32)
    values = stacks.values or [left[:0].float()] * len(stacks.bases)
    lists = (stacks.factors, stacks.bases, stacks.statuses, stacks.seconds, values)
    torch.ops.steepest.track_bases(*lists, flags, stacks.numbers, limits, accepted, steps, left)
    flagged = left.tolist()
    if not any(flagged):
        return []
    places = [(i, side, k) for i, (batch, _, _) in enumerate(stacks.shapes) for side in (0, 1) for k in range(batch)]
    return [place for place, flag in zip(places, flagged, strict=True) if flag]


if _backend.extension is not None:

    @register_fake("rotate")
    def _(*arguments: object) -> None:
        """Mutates outs; no metadata changes."""

    @register_fake("adam_in_bases")
    def _(*arguments: object) -> None:
        """Mutates seconds and outs; no metadata changes."""

    @register_fake("update_factors")
    def _(*arguments: object) -> None:
        """Mutates factors and counts; no metadata changes."""

    @register_fake("update_coupled_factors")
    def _(*arguments: object) -> None:
        """Mutates factors, values and counts; no metadata changes."""

    @register_fake("track_bases")
    def _(*arguments: object) -> None:
        """Mutates bases, statuses, seconds, values and left; no metadata changes."""
