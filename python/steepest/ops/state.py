"""State that is overwritten where a flag says so, without anybody reading the flag on the host.

    copy_if     to <- from   where the flag is true

On a CPU one call copies all of it; elsewhere, and of tensors that do not lie alike, it is torch.where.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import backend as _backend
from .fakes import register_fake


def copy_if(flag: Tensor, to: Sequence[Tensor], new: Sequence[Tensor]) -> None:
    """Overwrites each tensor of `to` by that of `new`, of its shape and dtype, where the flag is true.

    flag: 0-d bool on the device of the tensors. Where it is false nothing is read, so that NaN stays out.
    """
    if not to:
        return
    if _copies(flag, (*to, *new)):
        torch.ops.steepest.copy_if(flag, to, new)
        return
    for old, t in zip(to, new, strict=True):
        torch.where(flag, t, old, out=old)


def _copies(flag: Tensor, tensors: Sequence[Tensor]) -> bool:
    if flag.device.type != "cpu" or torch.compiler.is_compiling() or _backend.extension is None:
        return False
    return _backend.wants_cpu_calls() and all(t.is_contiguous() for t in tensors)


if _backend.extension is not None:

    @register_fake("copy_if")
    def _(*arguments: object) -> None:
        """Mutates to; no metadata changes."""
