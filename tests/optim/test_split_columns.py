"""Heads side by side: a step is that of every head's columns as a parameter of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import steepest
from steepest.optimizer import MatrixOptimizer
from support.training import name_of

HEADS, ROWS, WIDTH = 3, 10, 4


def noise(step: int, rows: int) -> torch.Tensor:
    return torch.randn(rows, HEADS * WIDTH, generator=torch.Generator().manual_seed(step))


def heads_of(p: torch.Tensor) -> list[torch.Tensor]:
    return [p[:, h * WIDTH : (h + 1) * WIDTH] for h in range(HEADS)]


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "cls",
    [steepest.Muon, steepest.MuAdam, steepest.NorMuon, steepest.SOAP, steepest.KLShampoo, steepest.Scion],
    ids=name_of,
)
def test_heads_step_alone(cls: type[MatrixOptimizer], transposed: bool, backend: str) -> None:
    """To the rounding of products that are batched otherwise."""
    rows = WIDTH if cls is steepest.SOAP else ROWS  # what it makes of a null space is of rounding errors
    start = noise(9, rows)
    p = nn.Parameter(start.mT.contiguous() if transposed else start.clone())
    alone = [nn.Parameter(part.clone()) for part in heads_of(start)]
    options: dict[str, Any] = {"lr": 0.05, "backend": backend}
    whole = cls([{"params": [p], "num_heads": HEADS, "split_columns": True, "transposed": transposed}], **options)
    parts = cls(alone, **options)
    for step in range(4):
        g = noise(step, rows)
        p.grad = g.mT.contiguous() if transposed else g
        for q, part in zip(alone, heads_of(g), strict=True):
            q.grad = part.clone()
        whole.step()
        parts.step()
    moved, wanted = p.detach().mT if transposed else p.detach(), torch.cat([q.detach() for q in alone], 1)
    assert (moved - wanted).abs().max() < 0.005 * (wanted - start).abs().max()


def test_it_is_routed_and_shown() -> None:
    model = nn.ModuleDict({"o_proj": nn.Linear(HEADS * WIDTH, ROWS, bias=False)})
    groups = steepest.param_groups(model, overrides={"o_proj.weight": {"num_heads": HEADS, "split_columns": True}})
    assert "3 matrices (10, 4)" in steepest.Muon(groups).describe()
