"""Steepest descent under preconditioned norms, fast.

    import steepest
    optimizer = steepest.MuAdam(model, lr=2e-3)        # matrices by MuAdam, everything else by AdamW
    optimizer.step()

Optimizers: `Muon` (drop-in for torch.optim.Muon), `MuAdam`, `MuAdamSANIA`. `param_groups` says which parameter goes
where, `graphed` makes a step one CUDA graph, `polar` is the orthogonalization itself, `backends` what this machine can
run.
"""

from __future__ import annotations

from ._version import __version__
from .graph import graphed
from .linalg.polar import polar
from .ops.backend import backends
from .routing import param_groups
from .zoo import MuAdam, MuAdamSANIA, Muon

__all__ = ["MuAdam", "MuAdamSANIA", "Muon", "__version__", "backends", "graphed", "param_groups", "polar"]
