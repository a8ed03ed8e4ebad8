"""What stands around an optimizer: the wrappers of frameworks, and a GradScaler that asks it something."""

from __future__ import annotations

import sys
from typing import Any

import torch

__all__ = ["asking_scaler", "unwrap"]

# Under which names Lightning and Fabric, Accelerate and DeepSpeed, and ZeroRedundancyOptimizer keep what they wrap.
_INSIDE = ("_optimizer", "optimizer", "optim")


def unwrap(optimizer: Any) -> Any:
    """The optimizer inside the wrappers of Accelerate, Lightning, Fabric, DeepSpeed and ZeRO; one without is itself.

    steepest.unwrap(accelerator.prepare(optimizer)).describe()
    """
    inside = next(
        (value for key in _INSIDE if isinstance(value := vars(optimizer).get(key), torch.optim.Optimizer)), None
    )
    return optimizer if inside is None else unwrap(inside)


def asking_scaler() -> torch.amp.GradScaler | None:
    """The torch.amp.GradScaler that reads the property from whose getter this is called; None where it is not one.

    A GradScaler leaves unscaling and skipping to an optimizer with `_step_supports_amp_scaling`, and Lightning refuses
    to clip the gradients of one, whether or not there is a scaler: so the answer depends on who asks.
    """
    frame = sys._getframe(2)
    asks = frame.f_locals.get("self") if frame.f_globals.get("__name__") == torch.amp.grad_scaler.__name__ else None
    return asks if isinstance(asks, torch.amp.GradScaler) else None
