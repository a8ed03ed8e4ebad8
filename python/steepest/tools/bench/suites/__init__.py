"""The suites, each a function of the settings that gives its jobs.

polar       the polar factor of stacks of matrices
symm_gemm   a symmetric product
small       many small matrices in one call
step        a whole optimizer step on a named model
refresh     eigenbases, inverse roots and the products they are made of
fused       the elementwise part of a step
memory      state, and what a step holds beyond it
launch      launches, and what the host needs for a step
train       a training run of a GPT
common      stacks of Gaussian matrices, dtypes and names that suites share
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..case import Job, Settings
from .fused import fused
from .launch import launch
from .memory import memory
from .polar import polar
from .refresh import refresh
from .small import small
from .step import step
from .symm_gemm import symm_gemm
from .train import train

Suite = Callable[[Settings], Iterator[Job]]

SUITES: dict[str, Suite] = {
    "polar": polar,
    "symm_gemm": symm_gemm,
    "small": small,
    "step": step,
    "refresh": refresh,
    "fused": fused,
    "memory": memory,
    "launch": launch,
    "train": train,
}
#: What runs where nothing is named: a training run is asked for by name.
USUAL = tuple(name for name in SUITES if name != "train")
