"""Runs a chain of products on a batch of matrices, and the iteration as it is printed."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from ..ops.chain_numbers import chain_numbers
from ..ops.polar_chain import Update, polar_chain, takes
from ..ops.symm_gemm import Workspace, gemm, linear
from ..ops.weight_update import weight_update
from .chain import Apply, Column, Gram, Node, Number, Product, chain
from .coefficients import Schedule, Table


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
    plan = chain(schedule, tuple(sorted(restarts)))
    numbers = (plan.constants, plan.powers, schedule.slacks)
    tight = schedule.norm == "tight"
    found = list(xs)
    at_once = [i for i, x in enumerate(xs) if takes(x, plan.constants, updates[i] if updates else None)]
    if at_once:
        own = [xs[i] for i in at_once]
        ys = [torch.empty_like(x) for x in own]
        into = [updates[i] for i in at_once] if updates else ()
        polar_chain(own, ys, [slacks[i] for i in at_once], plan.packed, *numbers, tight=tight, eps=eps, updates=into)
        for i, y in zip(at_once, ys if plan.result == "y" else own, strict=True):
            found[i] = y
    for i, x in enumerate(xs):
        if i in at_once:
            continue
        run = _Run(x, workspace if len(xs) == 1 else Workspace())
        run(Gram("gram", "x"))
        run.numbers = chain_numbers(run["gram"], *numbers, tight=tight, eps=eps, slack=slacks[i])
        for node in plan.nodes[:-1] if updates else plan.nodes:
            run(node)
        if updates:
            run.update(plan.nodes[-1], updates[i])
        found[i] = run[plan.result]
    return [] if updates else found


def newton_schulz_plain(x: Tensor, table: Table, *, eps: float) -> Tensor:
    """The standard form as it is printed, quintic, step for step the arithmetic of torch.optim.Muon.

    x: (batch, m, n), overwritten.  X / max(||X||_F, eps), then full products.
    """
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_min(eps)
    x.div_(torch.where(norm == 0, torch.ones_like(norm), norm))
    wide = x.mT if x.shape[-2] > x.shape[-1] else x
    for a, b, c in table:
        gram = torch.bmm(wide, wide.mT)
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.mT if x.shape[-2] > x.shape[-1] else wide


class _Run:
    """The buffers and numbers of one batch; called with a node, it does what the node says."""

    def __init__(self, x: Tensor, workspace: Workspace) -> None:
        self.x, self.workspace = x, workspace
        self.tall = x.shape[-2] > x.shape[-1]
        self.numbers: Tensor | None = None

    def __getitem__(self, name: str) -> Tensor:
        if name == "x":
            return self.x
        m = min(self.x.shape[-2:])
        return self.workspace.get(name, self.x.shape if name == "y" else (len(self.x), m, m), self.x)

    def value(self, number: Number) -> float | Tensor:
        if not isinstance(number, Column):
            return number
        assert self.numbers is not None
        return self.numbers[:, number.index]

    def update(self, node: Node, update: Update) -> None:
        assert isinstance(node, Apply)
        assert node.beta == 0
        q, x = self[node.q], self[node.x]
        a, b = (x, q) if self.tall else (q, x)
        alpha = torch.where(update.eta == 0, 0, update.eta * self.value(node.alpha))  # of NaN too
        weight_update(a, b, update.weights, alpha=alpha, beta=update.beta, workspace=self.workspace)

    def __call__(self, node: Node) -> None:
        out, space = self[node.out], self.workspace
        if isinstance(node, Gram):
            x = self[node.x].mT if self.tall else self[node.x]
            gemm(x, x.mT, out=out, symmetric=True)
            return
        alpha, beta = self.value(node.alpha), self.value(node.beta)
        if isinstance(node, Product):
            a, b, c = self[node.a], self[node.b], self[node.c]
            gemm(a, b, c, alpha=alpha, beta=beta, out=out, symmetric=True, workspace=space)
        elif isinstance(node, Apply):
            q, x = self[node.q], self[node.x]
            a, b = (x, q) if self.tall else (q, x)
            gemm(a, b, x if node.beta else None, alpha=alpha, beta=beta, out=out, workspace=space)
        else:
            linear(self[node.a], self[node.c] if node.beta else None, alpha=alpha, beta=beta, gamma=node.gamma, out=out)
