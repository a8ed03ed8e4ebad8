"""Every optimizer of the package, with its defaults and with the options that change what a step does or keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import steepest
from steepest.optimizer import MatrixOptimizer
from steepest.parts.precondition.kronecker import FACTORS
from steepest.recipe import CLOCK
from steepest.zoo.kfac import PASSES
from support.training import copies, made, noise

#: Every class, as the package has them.
CLASSES: tuple[type[MatrixOptimizer], ...] = tuple(
    cls
    for cls in (getattr(steepest, name) for name in steepest.__all__)
    if isinstance(cls, type) and issubclass(cls, MatrixOptimizer)
)


class MuAdamMomo(steepest.Momo, steepest.MuAdam):
    """`Momo` is part of an optimizer: of this one, here."""


#: What a class does otherwise by an option.
OPTIONS: tuple[tuple[type[MatrixOptimizer], dict[str, Any]], ...] = (
    (steepest.Muon, {"polar": "svd"}),
    (steepest.Muon, {"polar": "polar_express", "backend": "torch"}),
    (steepest.Muon, {"keep_mantissa": True}),
    (steepest.Muon, {"stochastic_rounding": True}),
    (steepest.Muon, {"capturable": True}),
    (steepest.Muon, {"momentum_dtype": torch.bfloat16}),
    (steepest.Muon, {"momentum_dtype": torch.float16}),
    (steepest.Muon, {"momentum_dtype": torch.float16, "backend": "torch"}),
    (steepest.MuAdam, {"backend": "torch"}),
    (steepest.MuAdam, {"state_bits": 8}),
    (steepest.Shampoo, {"graft": None}),
    (steepest.Shampoo, {"inverse_root": "newton"}),
    (steepest.KLShampoo, {"inverse_root": "newton"}),
    (steepest.KLShampoo, {"parity": "authors"}),
    (steepest.KLShampoo, {"max_update_rms": 1.0}),
    (steepest.SOAP, {"norm": "spectral"}),
    (steepest.SOAP, {"parity": "authors"}),
    (steepest.SOAP, {"parity": "emerging-optimizers", "precondition_frequency": 1}),
    (steepest.SOAP, {"factor_dtype": torch.bfloat16}),
    (steepest.SOAP, {"refresh_delay": 3}),
    (steepest.SOAP, {"refresh": "qr", "precondition_frequency": 1}),
    (steepest.SOAP, {"refresh": "jr", "precondition_frequency": 1}),
    (steepest.SOAP, {"shampoo_beta": 1.0}),
    (steepest.SOAP, {"max_preconditioner_dim": 4, "block_preconditioner": True}),
    (steepest.SPlus, {"factor_dtype": torch.bfloat16}),
    (steepest.TrustRegion, {"composite": "ridge", "norm": "frobenius"}),
    (steepest.Schattor, {"start": "first"}),
    (steepest.MuonMax, {"lower_bound": 0.0}),
    (steepest.Muon, {"average": 0.9}),
    (steepest.MuAdam, {"average": "schedule_free"}),
    (steepest.Muon, {"weight_decay_method": "independent"}),
    (steepest.Muon, {"weight_decay_method": "l2"}),
    (steepest.MuAdam, {"cautious_update": True}),
    (steepest.Muon, {"constraint": "frobenius", "weight_decay": 0.0}),
    (steepest.Muon, {"constraint": "spectral", "weight_decay": 0.0}),
    (steepest.MuAdam, {"variance_reduction": 0.025}),
    (steepest.Dion2, {"after": "rows"}),
    (steepest.AdaMuon, {"parity": "timm"}),
)


def label(cls: type[MatrixOptimizer], options: dict[str, Any]) -> str:
    """The class as it is called, with its options."""
    values = ", ".join(
        f"{key}={value if isinstance(value, torch.dtype) else repr(value)}" for key, value in options.items()
    )
    return f"{cls.__name__}({values})" if options else cls.__name__


#: By what they are called: all classes, then all options.
CONFIGURATIONS: dict[str, tuple[type[MatrixOptimizer], dict[str, Any]]] = {
    label(cls, options): (cls, options) for cls, options in (*((cls, {}) for cls in CLASSES), *OPTIONS)
}


@dataclass
class Training:
    """An optimizer with its parameters, whose gradients go by their names; model: KFAC's, which sees its passes."""

    optimizer: MatrixOptimizer
    params: dict[str, nn.Parameter]
    model: nn.Module | None = None

    def give_gradients(self, number: int, scale: float = 1.0) -> None:
        """The gradients of step `number`, and what KFAC wants to see of them, of a loss times scale."""
        if self.model is not None:
            self.optimizer.zero_grad()
            first = next(iter(self.params.values()))
            x = noise((5, first.shape[1]), number, first.dtype)
            (self.model(x).square().sum() * scale).backward()
        for name, p in self.params.items():
            p.grad = noise(p.shape, 1000 * (number + 1) + ord(name), p.dtype) * scale

    def step(self, number: int, spoil: Callable[[Training], object] | None = None) -> None:
        """Step `number`; spoil: what is done to the gradients, or whatever else, before it."""
        self.give_gradients(number)
        if spoil is not None:
            spoil(self)
        self.take_step()

    def take_step(self) -> None:
        """A step with the gradients there are."""
        step: Any = self.optimizer.step
        step(**({"loss": 1.0} if isinstance(self.optimizer, steepest.Momo) else {}))

    def weights(self) -> list[Tensor]:
        return copies(self.params.values())

    def state(self) -> list[dict[str, Tensor]]:
        """Copies of the state of each parameter that a step alone changes: not the clock, which goes on where a step is
        not taken, and not what KFAC has of the passes.
        """
        others = (CLOCK, PASSES, *FACTORS) if self.model is not None else (CLOCK,)
        states = [self.optimizer.state.get(p, {}) for p in self.params.values()]
        return [{key: t.detach().clone() for key, t in state.items() if key not in others} for state in states]

    def skipped(self) -> int:
        return sum(int(count) for count in self.optimizer.skipped_updates().values())


class Chain(nn.Module):
    """Linear layers by the names of their weights, one after another in the order of the names, made in any order; and
    vectors, which do nothing.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.layers, self.vectors = nn.ModuleDict(), nn.ParameterDict()
        for name, shape in shapes.items():
            if len(shape) < 2:
                self.vectors[name] = nn.Parameter(torch.empty(shape))
            else:
                self.layers[name] = nn.Linear(shape[1], shape[0], bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for name in sorted(self.layers):
            x = self.layers[name](x)
        return x

    def by_name(self) -> dict[str, nn.Parameter]:
        return {name.split(".")[1]: p for name, p in self.named_parameters()}


Shapes = dict[str, tuple[int, ...]]
MATRIX_AND_VECTOR: Shapes = {"a": (4, 3), "v": (4,)}


def training(
    cls: type[MatrixOptimizer],
    options: dict[str, Any],
    shapes: Shapes = MATRIX_AND_VECTOR,
    dtype: torch.dtype | None = None,
    named: bool = False,
) -> Training:
    """An optimizer of a group of matrices and one of vectors, if there are any of these, in the order of `shapes`.

    shapes: by names of one letter.   dtype: of the parameters, by default fp32, or bf16 where the options are about
    it.   named: tells the optimizer the names.
    """
    if dtype is None:
        dtype = torch.bfloat16 if {"keep_mantissa", "stochastic_rounding"} & set(options) else torch.float32
    if "state_bits" in options:  # smaller matrices are not coded
        shapes = {name: (32 * shape[0], 32 * shape[1]) if len(shape) == 2 else shape for name, shape in shapes.items()}
    values = {"lr": 0.02, "weight_decay": 0.1, **options}
    if cls is steepest.KFAC:
        model = Chain(shapes).to(dtype)
        params = model.by_name()
        set_weights(params)
        return Training(steepest.KFAC(model, **values), params, model)
    params = {name: nn.Parameter(torch.empty(shape, dtype=dtype)) for name, shape in shapes.items()}
    set_weights(params)
    if cls is steepest.Momo:
        cls, values = MuAdamMomo, {"lower_bound": 0.0, **values}
    if cls is steepest.ProdigyMuon:
        values.setdefault("initial_step", 1e-6)  # its default: `made` takes one that is seen at once
    groups: list[dict[str, Any]] = [{"params": []}, {"params": [], "use_muon": False}]
    for name, p in params.items():
        groups[p.ndim < 2]["params"].append((name, p) if named else p)
    return Training(made(cls, [group for group in groups if group["params"]], **values), params)


def set_weights(params: dict[str, nn.Parameter]) -> None:
    for name, p in params.items():
        p.data.copy_(noise(p.shape, ord(name), p.dtype))
