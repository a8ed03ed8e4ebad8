"""torch's ZeroRedundancyOptimizer, which makes an optimizer of this package from what each rank is to step."""

from __future__ import annotations

import sys
from types import FrameType

__all__ = ["check_zero"]

_MODULE = "torch.distributed.optim.zero_redundancy_optimizer"
_WAY_OUT = (
    'pass steepest.param_groups(model, names=False, adamw={"lr": ...}), whose groups say their rule and have the '
    "numbers of AdamW"
)


def check_zero(optimizer: str) -> None:
    """ValueError where a ZeroRedundancyOptimizer is making an optimizer of this class from what would train otherwise
    than in one process: vectors in a group that does not say its rule, or adamw_ options, which its groups override.

    A rank sees its share alone, and that of another may be fine: the wrapper has all of them, so that all ranks fail
    together. It is looked up on the stack, as it tells the class nothing of itself.
    """
    if _MODULE not in sys.modules:
        return
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_name == "__init__":
        frame = frame.f_back
    making = sys.modules[_MODULE].ZeroRedundancyOptimizer._init_local_optimizer
    if frame is None or frame.f_code is not making.__code__:
        return
    zero = frame.f_locals["self"]
    if any(key.startswith("adamw_") for key in zero.defaults):
        raise ValueError(
            f"ZeroRedundancyOptimizer fills {optimizer}'s options into all groups, adamw_ ones too: {_WAY_OUT}"
        )
    for number, group in enumerate(zero.param_groups):
        vectors = [p for p in group["params"] if p.ndim < 2]
        if vectors and "use_muon" not in group and "algorithm" not in group:
            raise ValueError(
                f"ZeroRedundancyOptimizer cannot split a group of matrices and vectors between {optimizer} and AdamW; "
                f"group {number} has a parameter of shape {tuple(vectors[0].shape)}: {_WAY_OUT}"
            )
