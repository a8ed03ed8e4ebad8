"""Steepest descent under preconditioned norms, fast.

    import steepest
    optimizer = steepest.MuAdam(model, lr=2e-3)        # matrices by MuAdam, everything else by AdamW
    optimizer.step()

Optimizers: `Muon` (drop-in for torch.optim.Muon), `MuAdam`, `MuAdamSANIA`; in the eigenbases of Kronecker factors
`Shampoo`, `OneSidedShampoo`, `KLShampoo`, `SOAP`, `KLSOAP`, `SPlus`, `KFAC`. `param_groups` says which parameter goes
where, `graphed` makes a step one CUDA graph, `polar` is the orthogonalization itself, `backends` what this machine can
run.
"""

from __future__ import annotations

from ._version import __version__
from .graph import graphed
from .linalg.polar import polar
from .ops.backend import backends
from .routing import param_groups
from .zoo import KFAC, KLSOAP, SOAP, KLShampoo, MuAdam, MuAdamSANIA, Muon, OneSidedShampoo, Shampoo, SPlus

__all__ = [
    "KFAC",
    "KLSOAP",
    "SOAP",
    "KLShampoo",
    "MuAdam",
    "MuAdamSANIA",
    "Muon",
    "OneSidedShampoo",
    "SPlus",
    "Shampoo",
    "__version__",
    "backends",
    "graphed",
    "param_groups",
    "polar",
]
