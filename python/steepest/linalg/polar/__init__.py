"""The polar factor: the nearest semi-orthogonal matrix, U V^T for X = U S V^T.

factors         `polar` and `polars`: matrices in, polar factors out
choice          form, compute dtype, schedule and restarts for a matrix, chosen in one place
jobs            chunks of a batch, the memory they take, and where their results go

The iteration itself is `steepest.linalg.newton_schulz`, its tables are in `steepest.linalg.coefficients`.
"""

from .choice import (
    COMPUTE_DTYPES,
    FORMS,
    GRAM_ASPECT,
    GRAM_SHORT_SIDE,
    PLAIN,
    STANDARD_PRESETS,
    Choice,
    choose,
    compute_dtype,
    cpu_bf16,
    default_restarts,
)
from .factors import polar, polars
from .jobs import CPU_CHUNK, workspace_bytes

__all__ = [
    "COMPUTE_DTYPES",
    "CPU_CHUNK",
    "FORMS",
    "GRAM_ASPECT",
    "GRAM_SHORT_SIDE",
    "PLAIN",
    "STANDARD_PRESETS",
    "Choice",
    "choose",
    "compute_dtype",
    "cpu_bf16",
    "default_restarts",
    "polar",
    "polars",
    "workspace_bytes",
]
