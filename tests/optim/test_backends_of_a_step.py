"""Which backend takes a parameter's step, and why not the ones before it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from steepest.matrices import pieces
from steepest.ops import backend, multi_tensor
from steepest.parts import Diagonal
from steepest.recipe import Recipe
from steepest.step import Parameter, StepOptions
from steepest.step.plan import reason, route
from steepest.step.program import program
from support.problems import RECIPES

needs_extension = pytest.mark.skipif(backend.extension is None, reason=f"{backend.extension_reason}")
ODD_POWER = replace(RECIPES["muadam"], precondition=Diagonal(0.3))


def parameter_of(recipe: Recipe, p: Tensor, **options: Any) -> Parameter:
    p.grad = torch.ones_like(p)
    return Parameter(p, recipe.init(p), recipe, pieces(p.shape), options=StepOptions(**options))


def why_not(p: Parameter) -> str | None:
    return reason(p, program(p.recipe))


@needs_extension
def test_what_the_fused_ops_take() -> None:
    matrix = torch.zeros(6, 4)
    assert why_not(parameter_of(RECIPES["muadam"], matrix)) is None
    assert why_not(parameter_of(RECIPES["muadam"], matrix.double())) is None
    assert why_not(parameter_of(RECIPES["muadam"], torch.zeros(4, 6).t())) is None
    assert why_not(parameter_of(ODD_POWER, matrix)) == (
        "the preconditioner's power is 0.3; the kernels have 1/4, 1/2 and 1/6"
    )
    deep = torch.zeros(2, 2, 2, 2, 2)[:, :, ::2]
    assert why_not(parameter_of(RECIPES["muadam"], deep)) == "a tensor is not contiguous and has more than 4 dimensions"


@needs_extension
def test_routes_on_a_cpu() -> None:
    parameter = parameter_of(RECIPES["muadam"], torch.zeros(6, 4))
    assert route(parameter) == "cpu"
    assert route(replace(parameter, options=StepOptions(backend="torch"))) == "torch"
    assert route(parameter_of(RECIPES["muadam"], torch.zeros(0, 4), backend="cpu")) == "torch"
    assert route(parameter_of(ODD_POWER, torch.zeros(6, 4))) == "torch"
    with pytest.raises(RuntimeError, match="step: backend='cuda' cannot run: the tensors are on cpu"):
        route(replace(parameter, options=StepOptions(backend="cuda")))
    with pytest.raises(RuntimeError, match="step: backend='cpu' cannot run: the preconditioner's power is 0.3"):
        route(parameter_of(ODD_POWER, torch.zeros(6, 4), backend="cpu"))


@pytest.mark.parametrize(
    "p,recipe,wanted",
    [
        (torch.zeros(6, 4), "muadam", "triton"),
        (torch.zeros(4, 6).t(), "muadam", "torch"),
        (torch.zeros(4, 6).t(), "adamw", "triton"),
        (torch.zeros(6, 4)[:, :3], "adamw", "torch"),
    ],
    ids=["contiguous", "transposed matrix", "transposed, elementwise", "row slice"],
)
def test_triton_takes_what_is_flat(p: Tensor, recipe: str, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    why = {"cuda": "not built", "triton": None, "cpu": "the tensors are on cuda"}
    monkeypatch.setattr(multi_tensor, "reasons", lambda device: why)
    assert route(parameter_of(RECIPES[recipe], p)) == wanted
