"""What stands around an optimizer: the wrappers of frameworks, and callers in torch that ask it something."""

from __future__ import annotations

import sys
from typing import Any

import torch

__all__ = ["asking_scaler", "is_asked_for_state", "is_made_in_backward", "unwrap"]

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


def is_asked_for_state() -> bool:
    """Whether `torch.distributed.checkpoint` takes this step, to have an optimizer without state make it.

    It does so with gradients of zeros and a learning rate of 0: a decay that is independent of the learning rate would
    move weights, and a state that counts steps would count one.
    """
    return _is_called_by("torch.distributed.checkpoint.state_dict", "_init_optim_state")


def is_made_in_backward() -> bool:
    """Whether torch's `_apply_optimizer_in_backward` makes the optimizer from whose code this is called."""
    return _is_called_by("torch.distributed.optim.apply_optimizer_in_backward", "_apply_optimizer_in_backward_to_param")


def _is_called_by(module: str, function: str) -> bool:
    frame = sys._getframe(2)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name == function and frame.f_globals.get("__name__") == module:
            return True
    return False
