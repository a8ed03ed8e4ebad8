"""torch's ZeroRedundancyOptimizer, which makes an optimizer of this package from what each rank is to step."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType

from .group_options import Group

__all__ = ["check_zero"]

_MODULE = "torch.distributed.optim.zero_redundancy_optimizer"
_WAY_OUT = (
    'pass steepest.param_groups(model, names=False, adamw={"lr": ...}), whose groups say their rule and have the '
    "numbers of AdamW"
)


def check_zero(optimizer: str, split: Callable[[Group], list[Group]]) -> None:
    """ValueError where a ZeroRedundancyOptimizer is making an optimizer of this class from what would train otherwise
    than in one process: a group, without a rule, that is not all of the class's own (split: the groups it becomes), or
    adamw_ options, which what it fills into groups overrides.

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
        if "use_muon" in group or "algorithm" in group:
            continue
        others = [part for part in split(dict(group)) if not part.get("use_muon", True)]
        if others:
            raise ValueError(
                f"ZeroRedundancyOptimizer cannot share a group between {optimizer} and AdamW, and group {number} has a "
                f"parameter of shape {tuple(others[0]['params'][0].shape)}: {_WAY_OUT}"
            )
