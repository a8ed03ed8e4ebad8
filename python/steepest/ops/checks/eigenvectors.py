"""cuSOLVER's batched eigensolver as it is called here: vectors in rows, values ascending."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..eigh import cusolver_reason
from ..selfcheck import Check
from . import cuda_reason
from .comparison import Comparison


def run(backend: str, comparison: Comparison) -> None:
    check(torch.ops.steepest.eigh_batched, comparison)


def check(op: Callable[..., None], comparison: Comparison) -> None:
    """op: torch.ops.steepest.eigh_batched."""
    for n in (3, 37, 130):
        x = comparison.normal(3, n, n)
        P = x + x.mT
        A, values = comparison.place(P), comparison.empty(3, n, dtype=torch.float32)
        info = comparison.empty(3, dtype=torch.int32)
        op(A, values, info)
        what, size, identity = f"{n} x {n}", 1e-5 * n, torch.eye(n, dtype=torch.float64, device=P.device)
        vectors, exact = A.mT.double(), P.double()
        comparison.expect(f"status of {what}", info, 0.0)
        comparison.expect(f"V^T V of {what}", vectors.mT @ vectors, identity, size)
        comparison.expect(f"P V of {what}", exact @ vectors, vectors * values.double()[:, None], size)
        comparison.expect(f"order of {what}", values, values.sort(-1).values)


CHECK = Check(lambda backend, device: cuda_reason(device) or cusolver_reason(), run)
