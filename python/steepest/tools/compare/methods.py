"""Who is compared: every optimizer of `steepest.zoo` beside torch's AdamW, SGD and Muon, and at which learning rates.

A grid is the middle below times powers of a ratio; a class that is not in the table has its own default in the middle.
What a matrix method leaves to AdamW trains at one rate in all of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from steepest import zoo
from steepest.optimizer import MatrixOptimizer
from steepest.zoo import Muon

from .tasks import MUSHROOMS

STEP = 4.0  # ratio of two learning rates of a grid
ADAMW_RATE = 8e-3  # between AdamW's best of a short run and of a long one

#: The middle of a grid: (on the GPT and on images, on mushrooms).
RATES: Mapping[str, tuple[float, float]] = {
    "torch.AdamW": (1.6e-2, 4e-2),
    "torch.AdamW-0.95": (1.6e-2, 4e-2),
    "torch.SGD": (0.25, 0.25),
    "torch.Muon": (8e-2, 0.1),
    "Muon": (8e-2, 0.1),
    "NorMuon": (1.6e-2, 0.1),
    "AdaMuon": (1.6e-2, 0.1),
    "AdaMuon-timm": (1.6e-2, 0.1),
    "NAMO": (0.25, 0.25),
    "Dion2": (8e-2, 0.1),
    "Dion2-0.5": (8e-2, 0.1),
    "MuAdam": (4e-3, 2e-2),
    "MuAdamSANIA": (1.6e-4, 1e-4),
    "Shampoo": (4e-2, 4e-2),
    "OneSidedShampoo": (6e-2, 0.25),
    "KLShampoo": (6e-2, 0.1),
    "KLShampoo-0.9": (1.5e-2, 0.1),
    "SOAP": (2e-2, 4e-2),
    "KLSOAP": (2e-2, 4e-2),
    "SPlus": (0.8, 0.8),
    "KFAC": (0.1, 0.16),
    "SGD": (0.25, 0.25),
    "Lion": (4e-3, 4e-3),
    "NormalizedSGD": (0.25, 0.16),
    "SignSGD": (8e-3, 8e-3),
    "AdaGrad": (6e-2, 0.16),
    "Adam": (2e-2, 6e-2),
    "AdamSANIA": (1e-6, 2.5e-5),
    "MADGRAD": (0.1, 0.2),
    "TrustRegion": (6e-2, 0.2),
    "OrthogonalSGDM": (3e-2, 6e-2),
    "NIGT": (0.1, 0.1),
    "Fromage": (6e-2, 0.1),
    "Scion": (6e-4, 1e-2),
    "Schattor": (0.25, 0.16),
    "MuonMax": (1.5e-2, 6e-2),
    "MuonMax-Momo": (6e-2, 0.25),
    "MuonAdam": (3e-2, 0.1),
    "MuonAdam-Momo": (6e-2, 0.25),
    "PolarGrad": (1.5e-2, 6e-2),
    "ProdigyMuon": (4.0, 4.0),
}

#: What departs from the defaults, besides weight_decay=0: eps=0, with which SANIA's invariance holds; Muon's direction
#: as the others have it; an average over ten steps, as runs are short.
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "MuAdamSANIA": {"eps": 0.0},
    "Muon": {"polar": "auto"},
    "torch.SGD": {"momentum": 0.9},
    "AdamSANIA": {"eps": 0.0},
    "SPlus": {"average_rate": 0.9},
}
#: Methods that are a class with arguments of their own; AdamW's are those that it has beside a matrix method.
VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "torch.AdamW-0.95": ("torch.AdamW", {"betas": (0.9, 0.95)}),
    "MuonMax-Momo": ("MuonMax", {"lower_bound": 0.0}),
    "MuonAdam-Momo": ("MuonAdam", {"lower_bound": 0.0}),
    "PolarGrad": ("ProductNormDescent", {"product": "l2"}),
    "AdaMuon-timm": ("AdaMuon", {"parity": "timm"}),
    "Dion2-0.5": ("Dion2", {"momentum": 0.5}),
    "KLShampoo-0.9": ("KLShampoo", {"shampoo_beta": 0.9}),
}
#: With its default arguments this one is MuonMax.
NOT_ALONE = ("ProductNormDescent",)
#: Optimizers that are given the module, whose layers they watch.
TAKE_MODULE = ("KFAC",)


class TorchMuon(Optimizer):
    """torch.optim.Muon for the matrices that `steepest.Muon` would take, torch.optim.AdamW for all else.

    torch's takes parameters of two dimensions: weights of convolutions are AdamW's. model: the module, or its
    parameters, all of which are Muon's then.
    """

    def __init__(
        self, model: nn.Module | Sequence[nn.Parameter], lr: float, weight_decay: float, adamw_lr: float
    ) -> None:
        groups = Muon(model).param_groups
        routed = [(p, group["use_muon"] and p.ndim == 2) for group in groups for p in group["params"]]
        matrices, rest = ([p for p, matrix in routed if matrix == wanted] for wanted in (True, False))
        if not matrices:
            raise ValueError("torch.optim.Muon takes parameters of two dimensions, and all of these are AdamW's")
        self.parts: list[Optimizer] = [torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay)]
        if rest:
            self.parts.append(torch.optim.AdamW(rest, lr=adamw_lr, weight_decay=weight_decay))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        for group, muon in zip(self.param_groups, (True, False), strict=False):
            group["use_muon"] = muon
        for part in self.parts:
            part.state = self.state

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss


@dataclass(frozen=True)
class Method:
    """An optimizer class and how it is made for a model."""

    name: str
    kind: type[Optimizer]
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self, model: nn.Module, lr: float, routed: bool, adamw_lr: float = ADAMW_RATE) -> Optimizer:
        """routed: the module is given, so that embeddings and heads go to AdamW; else its parameters, all of them.

        adamw_lr: the rate of what goes to AdamW.
        """
        whole = self.kind.__name__ in TAKE_MODULE or (routed and issubclass(self.kind, (MatrixOptimizer, TorchMuon)))
        make: Callable[..., Optimizer] = self.kind
        make_with_rate = partial(make, model if whole else list(model.parameters()), lr=lr, **self.options)
        try:
            return make_with_rate(adamw_lr=adamw_lr)
        except TypeError:  # it leaves nothing to AdamW
            return make_with_rate()

    def grid(self, task: str, count: int) -> list[float]:
        """`count` learning rates around the default for this task, from small to large."""
        return [self.rate(task, k - (count - 1) // 2) for k in range(count)]

    def rate(self, task: str, place: int, ratio: float = STEP) -> float:
        """The rate so many places above the default for this task, below where negative; places differ by a ratio."""
        return float(f"{self._default(task) * ratio**place:.3g}")

    def _default(self, task: str) -> float:
        if self.name in RATES:
            return RATES[self.name][1 if task in MUSHROOMS else 0]
        parameter = _argument(self.kind, "lr")
        default = None if parameter is None else parameter.default
        return float(default) if isinstance(default, (int, float)) else 1e-3


def known() -> dict[str, Method]:
    """The methods by name: torch's first, then what the zoo exports and takes a learning rate, then the variants."""
    kinds: dict[str, type[Optimizer]] = {
        "torch.AdamW": torch.optim.AdamW,
        "torch.SGD": torch.optim.SGD,
        "torch.Muon": TorchMuon,
    }
    exported = {name: getattr(zoo, name) for name in zoo.__all__}
    kinds |= {name: kind for name, kind in exported.items() if isinstance(kind, type) and issubclass(kind, Optimizer)}
    kinds = {name: kind for name, kind in kinds.items() if _argument(kind, "lr")}
    methods = {name: Method(name, kind, _options(name, kind)) for name, kind in kinds.items() if name not in NOT_ALONE}
    for name, (of, options) in VARIANTS.items():
        methods[name] = Method(name, kinds[of], {**_options(of, kinds[of]), **options})
    return methods


def _options(name: str, kind: type[Optimizer]) -> dict[str, Any]:
    alike = {"weight_decay": 0.0} if _argument(kind, "weight_decay") else {}
    return {**alike, **OPTIONS.get(name, {})}


def _argument(kind: type, name: str) -> inspect.Parameter | None:
    """The parameter in the first class, along the bases, whose constructor names it."""
    for each in kind.__mro__:
        constructor = vars(each).get("__init__")
        parameter = None if constructor is None else inspect.signature(constructor).parameters.get(name)
        if parameter is not None:
            return parameter
    return None


def chosen(names: str | None) -> dict[str, Method]:
    """The methods in a comma-separated list, in any case of letters; None: all. ValueError for one that is unknown."""
    every = known()
    if names is None:
        return every
    lower = {name.lower(): name for name in every}
    methods = {}
    for name in (part.strip() for part in names.split(",")):
        if name.lower() not in lower:
            raise ValueError(f"--optimizers: unknown optimizer {name!r}; pass some of {', '.join(every)}")
        methods[lower[name.lower()]] = every[lower[name.lower()]]
    return methods


def rates(overrides: Sequence[str]) -> dict[str | None, list[float]]:
    """ "1e-3,1e-2" -> {None: [...]}, "Muon=0.02" -> {"Muon": [0.02]}; ValueError for what is no learning rate."""
    by_name: dict[str | None, list[float]] = {}
    for override in overrides:
        name, equals, values = override.rpartition("=")
        method = next(iter(chosen(name))) if equals else None
        try:
            numbers = [float(value) for value in values.split(",")]
        except ValueError:
            numbers = []
        if not numbers or not all(0 < number < float("inf") for number in numbers):
            raise ValueError(f"--rates {override}: pass positive numbers, as in --rates 1e-3,1e-2 or --rates Muon=0.02")
        by_name[method] = sorted(set(numbers))
    return by_name
