"""Steepest descent under preconditioned norms, fast.

    import steepest
    optimizer = steepest.MuAdam(model, lr=2e-3)        # matrices by MuAdam, everything else by AdamW
    optimizer.step()

Optimizers: `Muon` (drop-in for torch.optim.Muon), `MuAdam`, `MuAdamSANIA`; in the eigenbases of Kronecker factors
`Shampoo`, `OneSidedShampoo`, `KLShampoo`, `SOAP`, `KLSOAP`, `SPlus`, `KFAC`; and their relatives down to `Adam`, a row
each in docs/optimizers.md. `param_groups` says which parameter goes where, `graphed` makes a step one CUDA graph,
`polar` is the orthogonalization itself, `backends` what this machine can run.
"""

from __future__ import annotations

from ._version import __version__
from .diagnostics import watch
from .graph import graphed
from .linalg.polar import polar
from .ops.backend import backends
from .routing import param_groups
from .zoo import (
    KFAC,
    KLSOAP,
    MADGRAD,
    NIGT,
    SOAP,
    AdaGrad,
    Adam,
    AdamSANIA,
    Fromage,
    KLShampoo,
    Momo,
    MuAdam,
    MuAdamSANIA,
    Muon,
    MuonAdam,
    MuonMax,
    NormalizedSGD,
    OneSidedShampoo,
    OrthogonalSGDM,
    ProdigyMuon,
    ProductNormDescent,
    Schattor,
    Scion,
    Shampoo,
    SignSGD,
    SPlus,
    TrustRegion,
    hasd,
    scion_groups,
)

__all__ = [
    "KFAC",
    "KLSOAP",
    "MADGRAD",
    "NIGT",
    "SOAP",
    "AdaGrad",
    "Adam",
    "AdamSANIA",
    "Fromage",
    "KLShampoo",
    "Momo",
    "MuAdam",
    "MuAdamSANIA",
    "Muon",
    "MuonAdam",
    "MuonMax",
    "NormalizedSGD",
    "OneSidedShampoo",
    "OrthogonalSGDM",
    "ProdigyMuon",
    "ProductNormDescent",
    "SPlus",
    "Schattor",
    "Scion",
    "Shampoo",
    "SignSGD",
    "TrustRegion",
    "__version__",
    "backends",
    "graphed",
    "hasd",
    "param_groups",
    "polar",
    "scion_groups",
    "watch",
]
