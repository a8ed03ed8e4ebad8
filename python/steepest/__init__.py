"""Steepest descent under preconditioned norms, fast.

    import steepest
    optimizer = steepest.MuAdam(model, lr=2e-3)        # matrices by MuAdam, everything else by AdamW
    optimizer.step()

Optimizers: `Muon` (drop-in for torch.optim.Muon), `MuAdam`, `MuAdamSANIA`; in the eigenbases of Kronecker factors
`Shampoo`, `OneSidedShampoo`, `KLShampoo`, `SOAP`, `KLSOAP`, `SPlus`, `KFAC`; and their relatives down to `Adam`, a row
each in docs/optimizers.md. `param_groups` says which parameter goes where, `graphed` makes a step one CUDA graph,
`QKClip` keeps attention logits below a threshold, `polar` is the orthogonalization itself, `backends` what this machine
can run.
"""

from __future__ import annotations

from . import _moved, zoo
from ._version import __version__
from .attention import QKClip
from .diagnostics import watch
from .graph import graphed
from .linalg.polar import polar
from .ops.backend import backends
from .optimizer import unwrap
from .routing import param_groups
from .zoo import *  # noqa: F403

__all__ = ["QKClip", "__version__", "backends", "graphed", "param_groups", "polar", "unwrap", "watch"]
__all__ += zoo.__all__


def __dir__() -> list[str]:
    """The public names, without the modules that importing them has left here."""
    return sorted(__all__)


_moved.install()
