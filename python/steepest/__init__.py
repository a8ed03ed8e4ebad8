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

# ruff: noqa: F403 (the names of `zoo`, which are there for a type checker, and when they are asked for)
from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from . import _moved
from ._version import __version__ as __version__
from .linalg.polar import polar as polar
from .ops.backend import backends as backends

if TYPE_CHECKING:
    from .attention import QKClip as QKClip
    from .diagnostics import watch as watch
    from .graph import graphed as graphed
    from .optimizer import unwrap as unwrap
    from .routing import param_groups as param_groups
    from .zoo import *
    from .zoo.aion import AION as AION
    from .zoo.infinite_descent import infinite_descent as infinite_descent

#: Where the public names are that are neither here nor in `zoo`, whose `__all__` says what it has. Each is imported
#: when it is asked for: `import steepest` takes a seventieth of the time of `import torch`, the first optimizer a
#: seventh.
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
    if name == "__all__":
        zoo = import_module(".zoo", __name__)
        value: Any = ["__version__", "backends", "polar", *_MODULES, *zoo.__all__]
    elif name in _MODULES:
        value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    elif not name.startswith("_") and find_spec(f"{__name__}.{name}") is None and name in __getattr__("__all__"):
        value = getattr(import_module(".zoo", __name__), name)
    else:  # of a module that nobody has imported yet, too
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, without the modules that importing them has left here."""
    return list(__getattr__("__all__"))


_moved.install()
