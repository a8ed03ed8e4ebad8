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

# ruff: noqa: F403, F405 (the names of `zoo`, which are there for a type checker, and when they are asked for)
from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import _moved
from ._version import __version__
from .linalg.polar import polar
from .ops.backend import backends

if TYPE_CHECKING:
    from .attention import QKClip
    from .diagnostics import watch
    from .graph import graphed
    from .optimizer import unwrap
    from .routing import param_groups
    from .zoo import *
    from .zoo.aion import AION
    from .zoo.infinite_descent import infinite_descent

__all__ = [
    "AION",
    "KFAC",
    "KLSOAP",
    "MADGRAD",
    "NAMO",
    "NIGT",
    "SGD",
    "SOAP",
    "AdaGrad",
    "AdaMuon",
    "Adam",
    "AdamSANIA",
    "Dion2",
    "Fromage",
    "KLShampoo",
    "Lion",
    "Momo",
    "MuAdam",
    "MuAdamSANIA",
    "Muon",
    "MuonAdam",
    "MuonMax",
    "NorMuon",
    "NormalizedSGD",
    "OneSidedShampoo",
    "OrthogonalSGDM",
    "ProdigyMuon",
    "ProductNormDescent",
    "QKClip",
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
    "infinite_descent",
    "param_groups",
    "polar",
    "scion_groups",
    "unwrap",
    "watch",
]

#: Where the names are that are not in `zoo`. Each is imported when it is asked for: `import steepest` takes a
#: seventieth of the time of `import torch`, the first optimizer a seventh.
_MODULES = {
    "AION": "zoo.aion",
    "QKClip": "attention",
    "graphed": "graph",
    "infinite_descent": "zoo.infinite_descent",
    "param_groups": "routing",
    "unwrap": "optimizer",
    "watch": "diagnostics",
}
#: Modules that are attributes as well.
_ROOMS = (
    *("attention", "diagnostics", "graph", "matrices", "optimizer", "parts", "recipe", "routing", "sharding"),
    *("state_layout", "step", "zoo"),
)


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f".{name}", __name__)
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f".{_MODULES.get(name, 'zoo')}", __name__), name)
    return value


def __dir__() -> list[str]:
    """The public names, without the modules that importing them has left here."""
    return sorted(__all__)


_moved.install()
