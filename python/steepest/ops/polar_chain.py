"""A whole chain of products on stacks of matrices in one call, with nothing of Python between its launches.

    G = X X^T;  numbers = chain_numbers(G);  then node by node:
    gram       out = A A^T, A^T A where A is tall
    product    out = alpha A B + beta C, symmetric
    sum        out = alpha A + beta C + gamma I
    apply      out = alpha A X + beta X, alpha X A + beta X where X is tall

Every stack has its own shape; a node of the chain is one list of products over all of them. fp16 or bf16, accumulated
in fp32, rounded once. The reference is `steepest.linalg.newton_schulz` in torch ops.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import backend as _backend
from .chain_numbers import too_many

DTYPES = (torch.float16, torch.bfloat16)
MULTIPLE = 8  # rows begin at multiples of 16 bytes
KINDS = ("gram", "product", "sum", "apply")  # Kind in csrc/polar/chain.h
BUFFERS = ("x", "y", "gram", "z", "t", "q", "p")  # Buffer there


def polar_chain(
    xs: Sequence[Tensor],
    ys: Sequence[Tensor],
    slacks: Sequence[Tensor],
    nodes: tuple[list[int], list[float]],
    constants: Sequence[Sequence[float]],
    powers: Sequence[int],
    least: Sequence[float],
    *,
    tight: bool,
    eps: float,
) -> None:
    """Runs the chain in place on xs, with ys as the second buffer of each; fills slacks.

    xs, ys: (batch, m, n), contiguous, all fp16 or all bf16, on one device; slacks: (batch,) fp32 for each. nodes: seven
    integers for each (place in KINDS, buffers out, a, b, c by their place in BUFFERS, columns of alpha and beta or -1)
    and three numbers (alpha and beta where they are no column, gamma). constants to eps: as for `chain_numbers`.
    """
    flat = [value for row in constants for value in row]
    torch.ops.steepest.polar_chain(xs, ys, slacks, *nodes, flat, powers, least, tight, eps)


def takes(x: Tensor, constants: Sequence[Sequence[float]]) -> bool:
    """Whether the compiled kernels run this chain on x; products one by one have more versions."""
    if torch.compiler.is_compiling() or _backend.requested("auto") not in ("auto", "cuda"):
        return False
    why = _reason(x, constants)
    if why is not None and x.is_cuda:
        _backend.log_once("polar_chain", "torch", {"cuda": why}, x.device)
    return why is None


def _reason(x: Tensor, constants: Sequence[Sequence[float]]) -> str | None:
    """Why not; None where they do."""
    if not x.is_cuda:
        return f"the tensor is on {x.device.type}"
    if (why := _backend.cuda_reason(x.device.index)) is not None:
        return why
    assert _backend.extension is not None
    if not _backend.extension.build_info()["hopper"]:
        return "the products for Hopper were not built; `pip install nvidia-cutlass` and rebuild for sm_90a"
    if torch.cuda.get_device_capability(x.device) != (9, 0):
        return "the compiled products are for compute capability 9.0"
    if too_many(constants):
        return "the schedule has too many numbers"
    if x.dtype not in DTYPES:
        return f"the compute dtype is {x.dtype}"
    if any(size % MULTIPLE for size in x.shape[-2:]) or x.numel() == 0:
        return f"the shape {tuple(x.shape)} is no multiple of {MULTIPLE}"
    return None


if _backend.extension is not None:

    @torch.library.register_fake("steepest::polar_chain")
    def _(*arguments: object) -> None:
        """Mutates xs, ys and slacks; no metadata changes."""
