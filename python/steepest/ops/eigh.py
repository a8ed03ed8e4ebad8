"""Eigenbases of symmetric matrices: on CUDA the refresh of small ones in one launch and the exact solver of larger
ones, on a CPU a step of orthogonal iteration.

    refresh         the whole of `steepest.linalg.basis.eigh_refresh` for fp32 matrices of up to 128 rows, a block each
    eigenvectors    V with P V = V diag(w), w ascending
    iterate         the Q of P Q_0 = Q R, columns sorted, with its whitening error before and after

The refresh is the simultaneous Jacobi rotation with everything in shared memory and, for each matrix where that is not
enough, Jacobi sweeps from where it ended (csrc/eigh/refresh.cu): the cascade is decided by the block and nothing is
read. A block has room for 128 rows on compute capabilities 8.0, 9.0 and 10.x and for 110 on 8.6, 8.9 and 12.x.

Eigenvectors come from cuSOLVER's `cusolverDnXsyevBatched`, which torch's CUDA libraries or the toolkit bring and which
is looked for when first wanted, or else from torch.linalg.eigh, which takes one matrix after another.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from . import backend as _backend
from . import solvers
from .fakes import register_fake

METHODS = ("jr", "eigh", "auto")  # `Method` in csrc/eigh/params.h
MOST_ROWS = 128  # kMostRows there
# The file name of cuSOLVER by the major version of CUDA.
CUSOLVER = {"12": "libcusolver.so.11", "13": "libcusolver.so.12"}


def refresh(P: Tensor, Q: Tensor, method: str, sweeps: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Basis, values, status and order of `eigh_refresh`.   P, Q: (count, n, n) fp32 that `supports` says yes to.

    method: one of METHODS. One launch on the current stream, which a CUDA graph may capture; deterministic, and a
    matrix has the same result in any batch. P and Q are not written.
    """
    P, Q = P.contiguous(), Q.contiguous()
    basis, values = torch.empty_like(P), P.new_empty(P.shape[:-1])
    status = torch.empty(len(P), dtype=torch.int32, device=P.device)
    order = torch.empty(P.shape[:-1], dtype=torch.int64, device=P.device)
    torch.ops.steepest.eigh_refresh(P, Q, basis, values, status, order, METHODS.index(method), sweeps)
    return basis, values, status, order


def supports(P: Tensor, method: str) -> bool:
    """Whether `refresh` is for these matrices (..., n, n); where a device is in the way, the reason is logged once."""
    if not P.is_cuda or P.dtype != torch.float32 or P.shape[-1] > MOST_ROWS or method not in METHODS:
        return False
    if not _backend.compiled_wanted():
        return False
    reason = _backend.cuda_reason(P.device.index) or _too_large(P) or _too_many(P)
    reason = reason or _backend.checked("eigh refresh", P.device)
    if reason is not None:
        _backend.log_once("eigh_refresh", "torch", {"cuda": reason}, P.device)
    return reason is None


def eigenvectors(P: Tensor) -> Tensor:
    """Eigenvectors in columns, values ascending; NaN where the solver failed.   P: (count, n, n) symmetric.

    cuSOLVER's batched solver waits for nothing; torch's waits for the device, and says only that some matrix failed:
    all are NaN then. Neither can be captured in a CUDA graph: cuSOLVER's handle and torch's check stand in the way.
    """
    if _batched(P):
        A, values = P.clone(memory_format=torch.contiguous_format), P.new_empty(P.shape[:-1])
        info = torch.empty(len(P), dtype=torch.int32, device=P.device)
        torch.ops.steepest.eigh_batched(A, values, info)
        return torch.where(info[:, None, None] == 0, A.mT, torch.nan)  # cuSOLVER's columns are torch's rows
    try:
        return solvers.eigh(P)
    except torch.linalg.LinAlgError:
        return torch.full_like(P, torch.nan)


class Iterated(NamedTuple):
    """A new basis (count, n, n) and where its columns were, (count, n) int64. Of each matrix, (count,): whether it has
    one, the whitening error before and after, ||Q^T Q - I||_F / sqrt n, and the error before that rounding can make."""

    basis: Tensor
    order: Tensor
    done: Tensor
    before: Tensor
    after: Tensor
    residual: Tensor
    rounding: Tensor


def iterate(P: Tensor, Q: Tensor) -> Iterated:
    """Orthogonal iteration, QR of P Q with R_ii >= 0.   P, Q: (count, n, n) fp32 that `iterates` says yes to.

    Columns are sorted by diag(Q^T P Q), descending; one that P sends to zero stays, as far as it can. Gram-Schmidt by
    halves, as products of our own (csrc/eigh/iterate.cpp): about half of LAPACK's time. Errors are estimates from 16
    vectors of signs. A matrix is not done where P is not finite, zero or not symmetric to the bit, where Q is not
    orthonormal, or where rounding leaves columns of P Q dependent; its basis and order are undefined. A matrix has the
    same bits in any call and on any number of threads. P and Q are not written.
    """
    P, Q = P.contiguous(), Q.contiguous()
    basis, order = torch.empty_like(P), P.new_empty(P.shape[:-1], dtype=torch.int64)
    measured = P.new_empty((len(P), 5))
    torch.ops.steepest.eigh_iterate(P, Q, basis, order, measured)
    done, *numbers = measured.unbind(-1)
    return Iterated(basis, order, done != 0, *numbers)


def iterates(P: Tensor) -> bool:
    """Whether `iterate` is for these matrices (..., n, n); what is traced stays in torch's products."""
    on_host = P.device.type == "cpu" and not torch.compiler.is_compiling()
    return on_host and P.dtype == torch.float32 and _backend.takes_cpu_products()


def _batched(P: Tensor) -> bool:
    """Whether cuSOLVER's batched solver takes these matrices; one alone fills a GPU by torch's solver as well."""
    if not P.is_cuda or len(P) < 2 or not _backend.compiled_wanted():
        return False
    reason = _backend.cuda_reason(P.device.index) or _beyond_cusolver(P) or cusolver_reason()
    reason = reason or _backend.checked("eigenvectors", P.device)
    if reason is not None:
        _backend.log_once("eigh", "torch", {"cuda": reason}, P.device)
    return reason is None


@functools.cache
def cusolver_reason() -> str | None:
    """Why there is no batched solver; None where there is one, which is loaded then."""
    if _backend.extension is None:
        return _backend.extension_reason
    reason = _backend.extension.load_cusolver(_cusolver_names(torch.version.cuda))
    return None if reason is None else f"cuSOLVER does not load: {reason}"


def _cusolver_names(cuda: str | None) -> list[str]:
    """The names under which cuSOLVER may be: in the wheels that torch depends on, then wherever the loader looks."""
    name = CUSOLVER.get((cuda or "").partition(".")[0])
    if name is None:
        return []
    spec = importlib.util.find_spec("nvidia")
    wheels = [] if spec is None else list(spec.submodule_search_locations or [])
    return [*(str(path) for folder in wheels for path in sorted(Path(folder).glob(f"*/lib/{name}"))), name]


def _too_large(P: Tensor) -> str | None:
    most = _most_rows(torch.cuda.get_device_capability(P.device))
    n = P.shape[-1]
    return None if n <= most else f"a block's shared memory holds matrices of {most} rows, and these have {n}"


def _too_many(P: Tensor) -> str | None:
    return None if math.prod(P.shape[:-2]) < 2**31 else "a launch has at most 2^31 - 1 blocks"


def _beyond_cusolver(P: Tensor) -> str | None:
    n = P.shape[-1]
    return None if n * n < 2**31 else f"cuSOLVER counts elements in 32 bits, and these matrices have {n} rows"


@functools.cache
def _most_rows(capability: tuple[int, int]) -> int:
    assert _backend.extension is not None
    return _backend.extension.eigh_rows(10 * capability[0] + capability[1])


if _backend.extension is not None:

    @register_fake("eigh_refresh")
    def _(*arguments: object) -> None:
        """Mutates basis, values, status and order; no metadata changes."""

    @register_fake("eigh_batched")
    def _(*arguments: object) -> None:
        """Mutates A, W and info; no metadata changes."""

    @register_fake("eigh_iterate")
    def _(*arguments: object) -> None:
        """Mutates basis, order and measured; no metadata changes."""
