"""Updates whose rows or entries are divided by a running root mean square of theirs; see `steepest.parts.Normalize`.

    v <- beta2 v + (1 - beta2) mean(u o u)           over a row, or of an entry; as it was where that is not finite
    s = 1 / (sqrt(v) + eps)                          0 where that is 1 / 0
    factors = length / ||s u||_F                     length: ||u||_F, or that of entries of root mean square rms

Of rows the factors are those of rows, s length / ||s u||_F: an update is read once and not written, and `apply_update`
multiplies as it reads it. Entries become s u in the same pass, and the factors are those of matrices.

On their way into the weights updates are normalized by `apply_update` itself, item by item as a `Normalization` says:
on a GPU in the same launch (csrc/multi_tensor/normalize.cu), whose blocks wait for the factors of their matrix.
`normalize_updates` is the first half alone. Elsewhere, and where Triton has the elementwise ops, these are torch's
operations, `normalized`: Triton has no way for a block to wait for another.

A matrix has the same bits whatever else is in the call, wherever it lies in memory, on any number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import backend as _backend
from .backend import choose
from .fakes import register_fake
from .program import CHUNK
from .reductions import vector_norm

FAMILY = "normalization"  # of the self-check
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MOST = 2**31 - 1  # elements that share a factor, and rows of a matrix: kMostOfRow in csrc/multi_tensor/normalize.h


@dataclass(frozen=True)
class Normalization:
    """How `apply_update` normalizes the directions of an item before it reads them, where its step is taken.

    second: contiguous, fp32 (fp64 for fp64), a number for each row, (matrices, rows), or for each entry; mutated.
    divided: where the entries divided by their roots go, contiguous, of the dtype of second; it may be the directions
        themselves; None: rows are normalized.
    rms: root mean square of the entries of what is made; None: a matrix keeps its length.
    """

    second: Tensor
    divided: Tensor | None
    beta2: float
    eps: float
    rms: float | None

    @property
    def rates(self) -> tuple[float, float, float]:
        return self.beta2, self.eps, 0.0 if self.rms is None else self.rms


def normalize_updates(
    updates: Sequence[Tensor],
    seconds: Sequence[Tensor],
    beta2: Sequence[float],
    *,
    eps: float,
    rms: float | None = None,
    divided: Sequence[Tensor] = (),
    scratch: Tensor | None = None,
) -> list[Tensor]:
    """The factors, (matrices, rows) of each stack, or where there is `divided` (matrices, 1), in the compiled version,
    which `route` says is there.

    updates: (matrices, rows, columns) each, at least one, not mutated; what is not contiguous is copied.
    seconds: contiguous, fp32 (fp64 for fp64), all of one dtype; a number for each row, or where there is `divided` for
        each entry; mutated.
    divided: where s u goes, contiguous, of the dtype of seconds; may be the update itself.
    beta2: of each stack.
    scratch: as `scratch_for` gives it, which calls on one stream may share; None: new.
    """
    if scratch is None:
        scratch = scratch_for([u.shape for u in updates], updates[0].device)
    updates = [u.contiguous() for u in updates]
    shapes = [(len(u), 1 if divided else u.shape[1]) for u in updates]
    factors = room_for_factors(shapes, seconds[0])
    torch.ops.steepest.normalize_updates(
        updates, seconds, divided, factors, scratch, beta2, eps, 0.0 if rms is None else rms
    )
    return factors


def room_for_factors(shapes: Sequence[tuple[int, int]], like: Tensor) -> list[Tensor]:
    """Tensors of these shapes, of a dtype and on a device as `like`."""
    sizes = [matrices * numbers for matrices, numbers in shapes]
    each = like.new_empty(sum(sizes)).split(sizes)
    return [t.view(shape) for t, shape in zip(each, shapes, strict=True)]


def scratch_for(shapes: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Zeroed memory for updates of these shapes, or of some of them; what counts in it is zero again when a call has
    ended.
    """
    # Two numbers for a block: those of rows are no more than these, those of entries have CHUNK of them.
    numbers = sum(matrices * (4 + 2 * max(rows, rows * columns // CHUNK)) for matrices, rows, columns in shapes)
    return torch.zeros(1 + numbers, dtype=torch.float64, device=device)


def route(updates: Sequence[Tensor], seconds: Sequence[Tensor], beta2: Sequence[float | Tensor]) -> str:
    """The backend of a call: "cuda" or "cpu" for `normalize_updates`, or "torch" for `normalized`."""
    device = updates[0].device if updates else torch.device("cpu")
    if torch.compiler.is_compiling() or device.type not in ("cpu", "cuda"):
        return "torch"  # what is traced is torch's own operations
    why = unsupported(updates, seconds, beta2)
    reasons = {"cpu": _backend.extension_reason or why}
    if device.type == "cuda":
        reasons = {"cuda": _backend.cuda_reason(device.index) or why}
    return choose("normalize_updates", "auto", reasons, device, FAMILY)


def unsupported(
    updates: Sequence[Tensor], seconds: Sequence[Tensor], beta2: Sequence[float | Tensor] = ()
) -> str | None:
    """Why the compiled versions do not take a call; None where they do."""
    if any(isinstance(number, Tensor) and number.is_cuda for number in beta2):
        return "beta2 is a tensor on a GPU"
    if len({v.dtype for v in seconds}) > 1:
        return "second moments are of several dtypes"
    for u, v in zip(updates, seconds, strict=True):
        if u.dtype not in DTYPES or v.dtype not in (torch.float32, torch.float64):
            return f"updates and second moments are {u.dtype} and {v.dtype}"
        if torch.float64 in (u.dtype, v.dtype) and (v.dtype is not torch.float64 or v.device.type != "cpu"):
            return f"updates are {u.dtype} and second moments {v.dtype} on {v.device.type}; float64 is for the CPU"
        if not v.is_contiguous():
            return f"second moments of updates {tuple(u.shape)} have strides {v.stride()}"
        largest = u.shape[1] * u.shape[2] if v.numel() == u.numel() else max(u.shape[1:])
        if largest > MOST:
            return f"updates are {tuple(u.shape)}; more than 2^31 - 1 elements share a factor"
    return None


def normalized(
    u: Tensor, second: Tensor, beta2: float | Tensor, *, eps: float, rms: float | None = None
) -> tuple[Tensor, Tensor]:
    """(the update, its second moment), in torch's operations; nothing is mutated.

    u: (matrices, rows, columns).   second: a number for each row, (matrices, rows), or for each entry.
    """
    over_rows, wide = second.ndim < u.ndim, torch.promote_types(u.dtype, second.dtype)
    size = vector_norm(u, -1, dtype=wide) if over_rows else u.to(wide).abs()
    fresh = beta2 * second + (1 - beta2) / (u.shape[-1] if over_rows else 1) * size.square()
    fresh = torch.where(fresh.isfinite(), fresh, second)
    root = fresh.sqrt() + eps
    scale = torch.where(root == 0, 0, 1 / root)
    # Lengths of matrices from those of their rows or entries.
    before, after = (vector_norm(t.flatten(1), -1) for t in (size, size * scale))
    if rms is not None:
        before = torch.full_like(after, rms * (u.shape[-2] * u.shape[-1]) ** 0.5)
    ratio = before / after
    ratio = torch.where(ratio.isfinite(), ratio, 0)  # of nothing, and of what is too large to be squared
    scale = scale * ratio.view(-1, *(1,) * (scale.ndim - 1))
    return u * (scale.unsqueeze(-1) if over_rows else scale), fresh


if _backend.extension is not None:

    @register_fake("normalize_updates")
    def _(*arguments: object) -> None:
        """Mutates seconds, divided, factors and scratch; no metadata changes."""
