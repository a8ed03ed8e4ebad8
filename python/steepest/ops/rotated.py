"""Steps in eigenbases of Kronecker factors on a CPU, each as one call for many stacks of fp32 matrices (batch, m, n).

    rotate    (L^T x R) / D;   back L (x / D) R^T;   and second moments v beta + (1 - beta) (L^T x R)^2
    learn     factors <- factors + w (g g^T - factors), w = (1 - beta) / (1 - beta^t), and likewise of g^T g
    track     a step of orthogonal iteration of every basis, taken where it helps, and second moments sorted with it

A side without a factor has tensors without elements. `rotate` writes nothing else; `learn` and `track` write where the
flag of a stack is true. In all of them a matrix has the same bits in any call and on any number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from . import backend as _backend
from .fakes import register_fake
from .matmul import IN_ORDER, by_itself, matmul

Way = Literal["into", "back", "observe"]
_WAYS = ("into", "back", "observe")  # `Way` in csrc/eigh/rotate.h


def supports(*tensors: Tensor) -> bool:
    """Whether the calls are for these tensors, which are fp32 and contiguous; what is traced goes by torch's ops."""
    if _backend.extension is None or not by_itself(tensors[0]) or _backend.requested("auto") not in ("auto", "cpu"):
        return False
    for t in tensors:
        if t.dtype is not torch.float32 or not t.is_contiguous() or not t.is_cpu:
            return False
    return _backend.extension.cpu_products(False)


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

    c: sqrt(1 - beta^step), or 1 where the step has no elements; D is 1 where second has none. Products of sides beyond
    256 are torch's, one matrix after another.
    """

    def called(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        out = torch.empty_like(x)
        rotate_all([x], [left, right], [second], [step], way, [out], beta=beta, eps=eps, inside=inside)
        return out

    if max(x.shape[-2:]) <= IN_ORDER or not (left.numel() or right.numel()):
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
    bases: Sequence[Tensor],
    seconds: Sequence[Tensor],
    steps: Sequence[Tensor],
    way: Way,
    outs: Sequence[Tensor],
    flags: Sequence[Tensor] = (),
    *,
    beta: float,
    eps: float,
    inside: bool,
) -> None:
    """`rotate` of several stacks without sides beyond 256, into outs; bases: the left one and the right one of each.

    flags: 0-d bool, whether a stack's out is written; without them all are. Outs of "observe" may be seconds.
    """
    torch.ops.steepest.rotate(xs, bases, seconds, steps, _WAYS.index(way), beta, eps, inside, flags, outs)


def learn(
    grads: Sequence[Tensor], factors: Sequence[Tensor], counts: Sequence[Tensor], flags: Sequence[Tensor], beta: float
) -> None:
    """Factors take gradients, in place; factors: the left one and the right one of each gradient.

    counts: 0-d, t before the gradient, which is counted up.   flags: 0-d bool.
    """
    torch.ops.steepest.learn_factors(grads, factors, counts, flags, beta)


def track(
    factors: Sequence[Tensor],
    bases: Sequence[Tensor],
    statuses: Sequence[Tensor],
    seconds: Sequence[Tensor],
    flags: Sequence[Tensor],
    shapes: Sequence[tuple[int, int, int]],
    limits: tuple[float, float, float],
    accepted: int,
) -> list[tuple[int, int, int]]:
    """One step of `steepest.ops.eigh.iterate` of every basis, in place, where limits say it helps; which did not.

    Two factors, bases and statuses, (batch,) int32, for each of the shapes (batch, m, n); seconds: of that shape, or
    without elements. limits: (near, progress, settled): a step is taken where the whitening error was at most `near`
    and fell by the factor `progress`, to `settled` or to what rounding makes. The status is then `accepted`.

    Returns:
        (stack, side, matrix) of every matrix that stays as it was although its flag is true.
    """
    left = torch.empty(sum(2 * batch for batch, _, _ in shapes), dtype=torch.int32)
    numbers = [n for shape in shapes for n in shape]
    torch.ops.steepest.track_bases(factors, bases, statuses, seconds, flags, numbers, list(limits), accepted, left)
    flagged = left.tolist()
    if not any(flagged):
        return []
    places = [(i, side, k) for i, (batch, _, _) in enumerate(shapes) for side in (0, 1) for k in range(batch)]
    return [place for place, flag in zip(places, flagged, strict=True) if flag]


if _backend.extension is not None:

    @register_fake("rotate")
    def _(*arguments: object) -> None:
        """Mutates outs; no metadata changes."""

    @register_fake("learn_factors")
    def _(*arguments: object) -> None:
        """Mutates factors and counts; no metadata changes."""

    @register_fake("track_bases")
    def _(*arguments: object) -> None:
        """Mutates bases, statuses, seconds and left; no metadata changes."""
