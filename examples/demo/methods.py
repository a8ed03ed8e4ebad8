"""The methods the demo can compare, each built for a GPT from one learning rate of its own.

What a matrix method does not cover (embeddings, head, norms) is AdamW's in every method, at the learning rate that is
best for AdamW alone. AdamW decays its weights at the usual rate, which lowers its loss by .01 here; the matrix methods
do not decay the matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

import steepest
from demo.rates import Row, best
from steepest.tools.compare.gpt import GPT

BETAS = (0.9, 0.95)  # of every method that has Adam's two averages
ADAMW_DECAY = 0.1

Build = Callable[[GPT, float, float], list[Optimizer]]


@dataclass(frozen=True)
class Method:
    """`build(model, lr, adamw_lr)` gives optimizers that together update every parameter of the model once.

    `swept_as` names the method whose learning rate this one takes; None is its own.
    """

    name: str
    label: str
    build: Build
    swept_as: str | None = None

    def best_rate(self, sweep: Sequence[Row]) -> float:
        """The learning rate that was best in the rows of a sweep; ValueError if it was not swept."""
        return best(sweep, self.swept_as or self.name)


def _muadam(model: GPT, lr: float, adamw_lr: float) -> list[Optimizer]:
    return [steepest.MuAdam(model, lr=lr, betas=BETAS, **_adamw_part(adamw_lr))]


def _muadam_sania(model: GPT, lr: float, adamw_lr: float) -> list[Optimizer]:
    return [steepest.MuAdamSANIA(model, lr=lr, betas=BETAS, **_adamw_part(adamw_lr))]


def _muon(model: GPT, lr: float, adamw_lr: float) -> list[Optimizer]:
    return [steepest.Muon(model, lr=lr, weight_decay=0.0, polar="auto", **_adamw_part(adamw_lr))]


def _soap(model: GPT, lr: float, adamw_lr: float) -> list[Optimizer]:
    return [steepest.SOAP(model, lr=lr, weight_decay=0.0, **_adamw_part(adamw_lr))]


def _kl_soap(model: GPT, lr: float, adamw_lr: float) -> list[Optimizer]:
    return [steepest.KLSOAP(model, lr=lr, weight_decay=0.0, **_adamw_part(adamw_lr))]


def _adamw_part(lr: float) -> dict[str, Any]:
    """What steepest's optimizers are told about the parameters that are AdamW's."""
    return {"adamw_lr": lr, "adamw_betas": BETAS, "adamw_weight_decay": ADAMW_DECAY}


def _torch_muon(model: GPT, lr: float, adamw_lr: float) -> list[Optimizer]:
    matrices = model.hidden_matrices()
    covered = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in covered]
    return [torch.optim.Muon(matrices, lr=lr, weight_decay=0.0), _torch_adamw(rest, adamw_lr)]


def _adamw(model: GPT, lr: float, adamw_lr: float) -> list[Optimizer]:
    return [_torch_adamw(list(model.parameters()), lr)]


def _torch_adamw(parameters: list[torch.nn.Parameter], lr: float) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, betas=BETAS, weight_decay=ADAMW_DECAY, fused=True)


METHODS = {
    method.name: method
    for method in (
        Method("muadam", "MuAdam", _muadam),
        Method("muon", "Muon", _muon),
        Method("adamw", "AdamW", _adamw),
        Method("muadam-sania", "MuAdam-SANIA", _muadam_sania),
        Method("soap", "SOAP", _soap),
        Method("kl-soap", "KL-SOAP", _kl_soap),
        Method("torch-muon", "Muon (torch.optim)", _torch_muon, swept_as="muon"),
    )
}
