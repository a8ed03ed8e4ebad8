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

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import _moved, zoo
from ._version import __version__
from .diagnostics import watch
from .graph import graphed
from .linalg.polar import polar
from .ops.backend import backends
from .optimizer import unwrap
from .routing import param_groups
from .zoo import *  # noqa: F403

if TYPE_CHECKING:
    from .attention import QKClip
    from .zoo.aion import AION
    from .zoo.infinite_descent import infinite_descent

__all__ = [
    "AION",
    "QKClip",
    "__version__",
    "backends",
    "graphed",
    "infinite_descent",
    "param_groups",
    "polar",
    "unwrap",
]
__all__ += ["watch", *zoo.__all__]

#: Names that few trainings use, and where they are: imported when they are asked for.
_LATER = {"AION": ".zoo.aion", "QKClip": ".attention", "infinite_descent": ".zoo.infinite_descent"}


def __getattr__(name: str) -> Any:
    if name == "attention":
        return import_module(".attention", __name__)
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(_LATER[name], __name__), name)
    return value


def __dir__() -> list[str]:
    """The public names, without the modules that importing them has left here."""
    return sorted(__all__)


_moved.install()
