"""What the learning rate means for a matrix of m rows (outputs) and n columns (inputs).

    original              sqrt(max(1, m / n))       Keller Jordan's Muon; the default everywhere
    match_rms_adamw       0.2 sqrt(max(m, n))       arXiv:2502.16982: AdamW's update RMS, so its lr and decay carry over
    spectral_unclamped    sqrt(m / n)               RMS-to-RMS operator norm (arXiv:2409.20325)
    none                  1

Names follow `torch.optim.Muon`'s adjust_lr_fn. The ratio is taken from the matrix that is really orthogonalized: a
convolution's flattened kernel, one head, one expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable

_RATIOS: dict[str, Callable[[int, int], float]] = {
    "original": lambda m, n: math.sqrt(max(1.0, m / n)),
    "match_rms_adamw": lambda m, n: 0.2 * math.sqrt(max(m, n)),
    "spectral_unclamped": lambda m, n: math.sqrt(m / n),
    "none": lambda m, n: 1.0,
}

#: The accepted names.
ADJUST_LR = tuple(_RATIOS)


def shape_ratio(name: str, m: int, n: int) -> float:
    """The factor on the learning rate for an (m, n) matrix; ValueError for a name not in `ADJUST_LR`."""
    if name not in _RATIOS:
        raise ValueError(f"Adjust learning rate function {name} is not supported; use one of {', '.join(_RATIOS)}")
    return _RATIOS[name](m, n) if m and n else 1.0
