"""An upper bound on ||X||_2 from the Gram product R = X X^T, which the iteration computes anyway.

The largest eigenvalue of a symmetric R >= 0 is at most
    ||R||_inf                          the largest row sum of |R|                                             (Gershgorin)
    mu + sd sqrt(m - 1)                mean and spread of the eigenvalues, from tr R and ||R||_F^2            (Samuelson;
                                       Wolkowicz and Styan, 1980); never above ||R||_F, equal to it at rank 1
On Gaussian matrices of 256 to 1024 rows its root exceeds ||X||_2 by 1.3 to 1.7, where ||X||_F exceeds it by 8 to 16.
"""

from __future__ import annotations

import torch
from torch import Tensor


def squared_norm_bound(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Bound on the largest eigenvalue of ``gram`` and its trace, both (batch, 1, 1).   gram: (batch, m, m), symmetric.

    Computed in fp32 (fp64 for fp64) on the device.  The trace is ||X||_F^2.
    """
    wide = gram.to(torch.promote_types(gram.dtype, torch.float32))
    m = gram.shape[-1]
    trace = wide.diagonal(dim1=-2, dim2=-1).sum(-1)
    square = torch.linalg.vector_norm(wide.flatten(-2), dim=-1).square()
    mean = trace / m
    spread = (square / m - mean.square()).clamp_min(0).sqrt()
    rows = wide.abs().sum(-1).amax(-1)
    bound = torch.minimum(rows, mean + spread * (m - 1) ** 0.5)
    return bound[:, None, None], trace[:, None, None]
