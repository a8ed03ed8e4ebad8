"""The polar factor: the nearest semi-orthogonal matrix, U V^T for X = U S V^T.

factors         `polar` and `polars`: matrices in, polar factors out
choice          form, compute dtype, schedule and restarts for a matrix, chosen in one place
sharded         `sharded_polars`: parts of matrices in, parts of their polar factors out
nodes           what a choice multiplies, and its work
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
    choose_sharded,
    compute_dtype,
    cpu_bf16,
    default_restarts,
)
from .factors import CpuChain, cpu_chains, polar, polars
from .jobs import CPU_CHUNK, workspace_bytes
from .nodes import nodes_of, polar_flop
from .sharded import AllReduce, gram_elements, sharded_polars

__all__ = [
    "COMPUTE_DTYPES",
    "CPU_CHUNK",
    "FORMS",
    "GRAM_ASPECT",
    "GRAM_SHORT_SIDE",
    "PLAIN",
    "STANDARD_PRESETS",
    "AllReduce",
    "Choice",
    "CpuChain",
    "choose",
    "choose_sharded",
    "compute_dtype",
    "cpu_bf16",
    "cpu_chains",
    "default_restarts",
    "gram_elements",
    "nodes_of",
    "polar",
    "polar_flop",
    "polars",
    "sharded_polars",
    "workspace_bytes",
]
