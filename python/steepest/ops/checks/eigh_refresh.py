"""The refresh of eigenbases in one launch: what a basis promises, and that it is no worse than the one it came from."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import eigh
from ..selfcheck import Check
from . import cuda_reason
from .comparison import Comparison

ACCEPTED, NOT_FINITE = 1, 16  # of `steepest.linalg.basis`


def run(backend: str, comparison: Comparison) -> None:
    most = eigh._most_rows(torch.cuda.get_device_capability(comparison.device))
    check(torch.ops.steepest.eigh_refresh, comparison, most)


def check(refresh: Callable[..., None], comparison: Comparison, most: int) -> None:
    """refresh: torch.ops.steepest.eigh_refresh; most: rows of the largest matrix."""
    for n, method in ((1, "jr"), (5, "auto"), (37, "jr"), (most, "auto"), (most - 1, "eigh")):
        P, Q = _problem(comparison, n)
        basis, values = (comparison.empty(*shape, dtype=torch.float32) for shape in ((3, n, n), (3, n)))
        status, order = comparison.empty(3, dtype=torch.int32), comparison.empty(3, n, dtype=torch.int64)
        refresh(P, Q, basis, values, status, order, eigh.METHODS.index(method), 1)
        what = f"{n} x {n} by {method!r}"
        comparison.expect(f"a matrix that is not finite, {what}", basis[1], Q[1])
        comparison.expect(f"its values, {what}", values[1], 0.0)
        comparison.expect(f"its status, {what}", status[1] & NOT_FINITE, float(NOT_FINITE))
        comparison.expect(f"order, {what}", order.sort(-1).values, torch.arange(n, device=P.device).expand(3, n))
        p, q, new = (t[::2].double() for t in (P, Q, basis))
        comparison.expect(f"Q^T Q of {what}", new.mT @ new, torch.eye(n, dtype=torch.float64, device=P.device), 1e-4)
        now, trace = new.mT @ p @ new, p.diagonal(dim1=1, dim2=2).sum(-1)
        comparison.expect(f"values of {what}", values[::2], now.diagonal(dim1=1, dim2=2), trace[:, None] * 1e-5)
        # It is off by a few percent before; one rotation squares that.
        left, before = (_off_diagonal(t) for t in (now, q.mT @ p @ q))
        comparison.expect(f"what is off the diagonal, {what}", left, 0.0, before * 0.5 + 1e-5 * trace)
        if n > 1:
            comparison.expect(f"acceptance of {what}", status[::2] & ACCEPTED, 1.0)


def _problem(comparison: Comparison, n: int) -> tuple[Tensor, Tensor]:
    """Three matrices with well separated values, and bases that are a little off; the second matrix is not finite."""
    exact = torch.linalg.qr(comparison.normal(3, n, n).double()).Q
    values = torch.logspace(0, -2, n, dtype=torch.float64, device=comparison.device)
    P = (exact * values) @ exact.mT
    P = comparison.place(((P + P.mT) / 2).float())
    P[1, 0, 0] = torch.nan
    turn = comparison.normal(3, n, n).double() * (0.02 / n)
    Q = torch.linalg.qr(exact + exact @ (turn - turn.mT)).Q
    signs = (Q * exact).sum(-2, keepdim=True).sign()
    return P, comparison.place((Q * signs).float())


def _off_diagonal(t: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(t - torch.diag_embed(t.diagonal(dim1=1, dim2=2)))


CHECK = Check(lambda backend, device: cuda_reason(device), run)
