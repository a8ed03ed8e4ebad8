"""The checks of `steepest.ops.selfcheck`, one module a family: inputs, the call of the kernels, and what is right."""

from __future__ import annotations

import torch

from .. import backend as _backend


def cuda_reason(device: torch.device) -> str | None:
    """Why compiled CUDA kernels do not run on a device, whatever their family; None where they do."""
    return _backend.cuda_reason(device.index) if device.type == "cuda" else f"the tensors are on {device.type}"
