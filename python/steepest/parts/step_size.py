"""What the learning rate means for a matrix of m rows (outputs) and n columns (inputs).

    original              sqrt(max(1, m / n))       Keller Jordan's Muon; the default everywhere
    match_rms_adamw       0.2 sqrt(max(m, n))       arXiv:2502.16982: AdamW's update RMS, so its lr and decay carry over
    none                  1

The others turn the unit ball of a direction's norm into that of an operator norm, in which a layer changes its output
by at most the learning rate whatever its shape (Scion, arXiv:2502.07529; modular norm, arXiv:2405.14813). |X| is the
norm of which the factor times the direction is the unit step:

    layer                 factor                 direction   |X|
    spectral_unclamped    sqrt(m / n)            Spectral    RMS to RMS: sqrt(n / m) ||X||_2; a linear layer
    original              sqrt(max(1, m / n))    Spectral    Scion's choice for a first layer
    embedding             sqrt(n)                Rows        largest RMS of a row, a token as in torch.nn.Embedding
    embedding_columns     sqrt(m)                Columns     largest RMS of a column, a token
    head                  1 / n                  Sign        n max |x_ij|; Scion's last layer
    head_rows             1 / sqrt(n)            Rows        RMS to max: sqrt(n) max_i ||x_i:||_2
    splus                 2 / (m + n)            Sign        SPlus (arXiv:2506.07254); no operator norm

A kernel of k taps is k linear maps in one: Scion takes spectral_unclamped of (out, in k) over sqrt(k), its norm
"conv"; the modular norm that of (out, in) over k for every tap.

Names follow `torch.optim.Muon`'s adjust_lr_fn where it has them. The ratio is taken from the matrix that is really
orthogonalized: a convolution's flattened kernel, one head, one expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable

_RATIOS: dict[str, Callable[[int, int], float]] = {
    "original": lambda m, n: math.sqrt(max(1.0, m / n)),
    "match_rms_adamw": lambda m, n: 0.2 * math.sqrt(max(m, n)),
    "spectral_unclamped": lambda m, n: math.sqrt(m / n),
    "none": lambda m, n: 1.0,
    "embedding": lambda m, n: math.sqrt(n),
    "embedding_columns": lambda m, n: math.sqrt(m),
    "head": lambda m, n: 1 / n,
    "head_rows": lambda m, n: 1 / math.sqrt(n),
    "splus": lambda m, n: 2 / (m + n),
}

#: The accepted names.
ADJUST_LR = tuple(_RATIOS)

#: What names of dion, timm and Emerging-Optimizers are here.
_ELSEWHERE = {
    "rms_norm": "'match_rms_adamw'",
    "spectral_norm": "'spectral_unclamped'",
    "rms_to_rms": "'spectral_unclamped'",
    "rsqrt_in": "'head_rows'",
    "shape_scaling": "'original'",
    "spectral": "'match_rms_adamw' of five times the learning rate",
    "unit_rms_norm": "'spectral_unclamped'",
}


def name_here(name: str) -> str:
    """The end of an error about a name that is none of `ADJUST_LR`: what it is here, where another package has it."""
    return f"; what other packages call {name} is {_ELSEWHERE[name]} here" if name in _ELSEWHERE else ""


def shape_ratio(name: str, m: int, n: int) -> float:
    """The factor on the learning rate for an (m, n) matrix; 1 for an empty one. ValueError off `ADJUST_LR`'s names."""
    if name not in _RATIOS:
        known = ", ".join(_RATIOS)
        raise ValueError(f"Adjust learning rate function {name} is not supported; use one of {known}{name_here(name)}")
    return _RATIOS[name](m, n) if m and n else 1.0
