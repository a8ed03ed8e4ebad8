"""A whole chain of products on stacks of matrices in one call, with nothing of Python between its launches.

    G = X X^T;  numbers = chain_numbers(G);  then node by node:
    gram       out = A A^T, A^T A where A is tall
    product    out = alpha A B + beta C, symmetric
    sum        out = alpha A + beta C + gamma I
    apply      out = alpha A X + beta X, alpha X A + beta X where X is tall; the last one may go into weights instead

Every stack has its own shape; a node of the chain is one list of products over all of them. fp16 or bf16, accumulated
in fp32, rounded once. The reference is `steepest.linalg.newton_schulz` in torch ops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import backend as _backend
from .chain_numbers import too_many
from .environment import switch
from .fakes import register_fake

DTYPES = (torch.float16, torch.bfloat16)
MULTIPLE = 8  # rows begin at multiples of 16 bytes
WEIGHTS = (torch.float32, torch.bfloat16, torch.float16)
# Whether compiled products are taken where they run; all other kernels stay. Read once.
hopper_wanted = switch("STEEPEST_HOPPER", True)
KINDS = ("gram", "product", "sum", "apply")  # Kind in csrc/polar/chain.h
BUFFERS = ("x", "y", "gram", "z", "t", "q", "p")  # Buffer there


@dataclass(frozen=True)
class Update:
    """A chain's end in weights: W[i] <- beta[i] W[i] + eta[i] polar(X[i]), in place.

    weights: (m, n) for each matrix of a stack, contiguous and anywhere, all fp32, all bf16 or all fp16; eta, beta:
    (batch,) fp32, contiguous. Where eta is 0 the polar factor does not count, NaN or not.
    """

    weights: Sequence[Tensor]
    eta: Tensor
    beta: Tensor

    def split(self, size: int) -> list[Update]:
        """Updates of so many matrices at a time."""
        starts = range(0, len(self.weights), size)
        return [Update(self.weights[i : i + size], self.eta[i : i + size], self.beta[i : i + size]) for i in starts]


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
    updates: Sequence[Update] = (),
    chunks: int = 0,
) -> None:
    """Runs the chain in place on xs, with ys as the second buffer of each; fills slacks.

    xs, ys: (batch, m, n), contiguous, all fp16 or all bf16, on one device; slacks: (batch,) fp32 for each. nodes: seven
    integers for each (place in KINDS, buffers out, a, b, c by their place in BUFFERS, columns of alpha and beta or -1)
    and three numbers (alpha and beta where they are no column, gamma). constants to eps: as for `chain_numbers`.

    updates: one for each stack. The last product then goes into the weights, in fp32 and rounded once, and is not
    written anywhere else; what is left in xs and ys is undefined.

    The matrices go through the chain in so many ``chunks`` one after another. 0 stands for as many as the planner's
    model (csrc/polar/chunks.h) finds worth it, so that squares stay in the L2 cache. A matrix does not know the others
    of its launch, but where its tiles are cut, and so in which order their sums are added up, depends on their number:
    the same call gives the same bits, another batch may round otherwise. Under STEEPEST_BATCH_INVARIANT=1 no tile is
    cut, and a matrix has its bits in every batch; a few large matrices then leave much of the GPU idle.
    """
    flat = [value for row in constants for value in row]
    weights = [w for update in updates for w in update.weights]
    into = (weights, [update.eta for update in updates], [update.beta for update in updates])
    numbers = (*nodes, flat, powers, least, tight, eps, chunks, _backend.batch_invariant)
    torch.ops.steepest.polar_chain(xs, ys, slacks, *into, *numbers)


def weights_reason(weights: Sequence[Tensor]) -> str | None:
    """Why compiled products do not go into these weights; None where they do."""
    if any(w.dtype not in WEIGHTS or w.dtype != weights[0].dtype for w in weights):
        return f"weights are {', '.join(sorted({str(w.dtype) for w in weights}))}; one of {WEIGHTS} is taken"
    if any(not w.is_contiguous() or w.data_ptr() % 16 for w in weights):
        return "a weight is not contiguous, or does not begin at a multiple of 16 bytes"
    return None


def supports(x: Tensor, constants: Sequence[Sequence[float]], update: Update | None = None) -> bool:
    """Whether the compiled kernels run this chain on x; products one by one have more versions."""
    if not _backend.compiled_wanted():
        return False
    why = _reason(x, constants)
    if why is None and update is not None:
        why = weights_reason(update.weights)
    if why is None:
        why = _backend.checked("polar chain", x.device)
    if why is not None and x.is_cuda:
        _backend.log_once("polar_chain", "torch", {"cuda": why}, x.device)
    return why is None


def hopper_reason(x: Tensor) -> str | None:
    """Why the compiled products do not run where x is; None where they do."""
    return device_reason(x.device)


def device_reason(device: torch.device) -> str | None:
    """Why the compiled products do not run on a device; None where they do."""
    if device.type != "cuda":
        return f"the tensor is on {device.type}"
    if not hopper_wanted:
        return "STEEPEST_HOPPER=0 turns the products for Hopper off"
    if (why := _backend.cuda_reason(device.index)) is not None:
        return why
    if torch.cuda.get_device_capability(device) != (9, 0):
        return "the compiled products are for compute capability 9.0"
    assert _backend.extension is not None
    return None if _backend.extension.build_info()["hopper"] else _backend.NO_HOPPER


def shape_reason(rows: int, columns: int, constants: Sequence[Sequence[float]]) -> str | None:
    """Why no compiled chain with these constants takes matrices of rows x columns; None where one does."""
    if too_many(constants):
        return "the schedule has too many numbers"
    return f"a side is no multiple of {MULTIPLE}" if rows % MULTIPLE or columns % MULTIPLE else None


def _reason(x: Tensor, constants: Sequence[Sequence[float]]) -> str | None:
    """Why the compiled chain does not run on x; None where it does."""
    rows, columns = x.shape[-2:]
    if (why := hopper_reason(x) or shape_reason(rows, columns, constants)) is not None:
        return why
    if x.dtype not in DTYPES:
        return f"the compute dtype is {x.dtype}"
    if x.numel() == 0:
        return "there are no elements"
    return None if x.is_contiguous() and x.data_ptr() % 16 == 0 else "the matrices are not contiguous from 16 bytes on"


if _backend.extension is not None:

    @register_fake("polar_chain")
    def _(*arguments: object) -> None:
        """Mutates xs, ys, slacks and weights; no metadata changes."""
