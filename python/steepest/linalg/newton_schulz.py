"""Runs a chain of products on a batch of matrices, and the iteration as it is printed."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from ..ops.chain_numbers import chain_numbers
from ..ops.matmul import by_itself, placed
from ..ops.polar_chain import Update, polar_chain, supports
from ..ops.symm_gemm import Workspace
from .chain import Gram, chain
from .coefficients import Schedule, Table
from .runner import Runner


def newton_schulz(
    xs: Sequence[Tensor],
    schedule: Schedule,
    restarts: Collection[int],
    workspace: Workspace,
    *,
    eps: float,
    slacks: Sequence[Tensor],
    updates: Sequence[Update] = (),
) -> list[Tensor]:
    """Run ``schedule`` on every x: (batch, m, n) in its dtype, entries of order 1 at most; a zero matrix gives zero.

    ``restarts`` are the steps (from 1) before which a new Gram product is taken.  The norm is never taken below
    ``eps``.  Every x is overwritten; the results are xs or other memory, buffers of the workspace where there is one x.
    A tall matrix is handled as X^T X and X Q, without a transpose in memory.  ``slacks``, (batch,) each, are filled
    with ||X||_F over the norm taken.

    ``updates``, one for each x or none: the last product goes into the weights, W <- beta W + eta polar(X), and no
    direction is written; no results then.
    """
    products = chain(schedule, tuple(sorted(restarts)))
    numbers = (products.constants, products.powers, schedule.slacks)
    tight = schedule.norm == "tight"
    results = list(xs)
    at_once = [i for i, x in enumerate(xs) if supports(x, products.constants, updates[i] if updates else None)]
    if at_once:
        stacks = [xs[i] for i in at_once]
        ys = [torch.empty_like(x) for x in stacks]
        into = [updates[i] for i in at_once] if updates else ()
        filled = [slacks[i] for i in at_once]
        polar_chain(stacks, ys, filled, products.packed, *numbers, tight=tight, eps=eps, updates=into)
        for i, y in zip(at_once, ys if products.result == "y" else stacks, strict=True):
            results[i] = y
    for i, x in enumerate(xs):
        if i in at_once:
            continue
        run = Runner(x, workspace if len(xs) == 1 else Workspace())
        run(Gram("gram", "x"))
        run.numbers = chain_numbers(run["gram"], *numbers, tight=tight, eps=eps, slack=slacks[i])
        for node in products.nodes[:-1] if updates else products.nodes:
            run(node)
        if updates:
            run.update(products.nodes[-1], updates[i])
        results[i] = run[products.result]
    return [] if updates else results


def newton_schulz_plain(x: Tensor, table: Table, *, eps: float) -> Tensor:
    """The standard form as it is printed, quintic, step for step the arithmetic of torch.optim.Muon.

    x: (batch, m, n), overwritten.  X / max(||X||_F, eps), then full products; on a CPU one matrix after another, whose
    bits do not depend on the batch then.
    """
    if len(x) > 1 and by_itself(x):
        return torch.cat([newton_schulz_plain(placed(one), table, eps=eps) for one in x.split(1)])
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_min(min(eps, torch.finfo(x.dtype).max))
    x.div_(torch.where(norm == 0, torch.ones_like(norm), norm))
    wide = x.mT if x.shape[-2] > x.shape[-1] else x
    for a, b, c in table:
        gram = torch.bmm(wide, wide.mT)
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.mT if x.shape[-2] > x.shape[-1] else wide
