"""A whole chain of products on a CPU in one call: from matrices as they are to their polar factors.

The nodes are those of `steepest.ops.polar_chain`, in fp32, or in bf16 summed in fp32; a product is rounded once, with
alpha, beta and gamma in it. Products of symmetric results take half the work at any size, and matrices of 2^18 elements
and less go one to a thread, all of the chain in its cache (csrc/cpu_polar). The reference is
`steepest.linalg.newton_schulz` in torch ops, which runs where this does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import backend as _backend
from .chain_numbers import too_many
from .fakes import register_fake
from .tracing import assume_constant_result

DTYPES = (torch.float32, torch.bfloat16)  # of matrices, of products and of results


@dataclass(frozen=True)
class CpuChain:
    """A chain of products and what it makes of matrices in the end.

    nodes to eps: as for `polar_chain`.   result: which buffer holds it.   divides: a matrix is divided by
    max(||X||_F, eps), in ``dtype``, so that no number follows from its norm, and its slack is 1.   dtype: of the
    products.   at_once: how many matrices may have buffers at a time.
    """

    nodes: tuple[list[int], list[float]]
    constants: Sequence[Sequence[float]]
    powers: Sequence[int]
    least: Sequence[float]
    tight: bool
    eps: float
    result: int
    divides: bool
    dtype: torch.dtype
    at_once: int


def cpu_chain(xs: Sequence[Tensor], outs: Sequence[Tensor], slacks: Sequence[Tensor], chain: CpuChain) -> None:
    """Fills outs with what the chain makes of xs, and slacks.

    xs, outs: (batch, m, n), contiguous, fp32 or bf16, any sides; slacks: (batch,) fp32 for each; xs are not mutated.
    A matrix is brought to a largest entry in [1/2, 1) first, by a power of two. One that is not finite gives NaN.

    A matrix has the same bits in every call, whatever the number of threads.
    """
    flat, bf16 = [value for row in chain.constants for value in row], chain.dtype == torch.bfloat16
    numbers = (*chain.nodes, flat, chain.powers, chain.least, chain.tight, chain.eps, chain.result, chain.divides)
    torch.ops.steepest.cpu_chain(xs, outs, slacks, *numbers, bf16, chain.at_once)


def supports(x: Tensor, dtype: torch.dtype, constants: Sequence[Sequence[float]]) -> bool:
    """Whether products in ``dtype`` of x are compiled for this processor and chain; else they are torch's."""
    return x.device.type == "cpu" and takes(dtype, constants)


def takes(dtype: torch.dtype, constants: Sequence[Sequence[float]]) -> bool:
    """`supports` of any matrix on a CPU."""
    return _backend.wants_cpu_calls() and not too_many(constants) and compiled(dtype)


@assume_constant_result
def compiled(dtype: torch.dtype) -> bool:
    """Whether products of a dtype are compiled for this processor."""
    return dtype in DTYPES and _backend.has_cpu_products(dtype == torch.bfloat16)


if _backend.extension is not None:

    @register_fake("cpu_chain")
    def _(*arguments: object) -> None:
        """Mutates outs and slacks; no metadata changes."""
