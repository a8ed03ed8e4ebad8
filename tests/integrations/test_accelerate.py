"""Accelerate: reports, watching, a loss and a scaler through its wrapper; accumulation and resume."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed (make test-integrations)")

import steepest  # noqa: E402


class MuAdamMomo(steepest.Momo, steepest.MuAdam):
    """A method that needs the loss."""


def prepared(cls: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, **kwargs)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    return (accelerator, *accelerator.prepare(model, cls(model)))


def batch(step: int) -> torch.Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(step))


def loss_of(model: Any, step: int) -> torch.Tensor:
    return model(batch(step)).square().mean()


def train(accelerator: Any, model: Any, optimizer: Any, steps: range) -> None:
    for step in steps:
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, step))
            optimizer.step()
            optimizer.zero_grad()


def test_reports_and_watch() -> None:
    accelerator, model, optimizer = prepared(steepest.MuAdam)
    seen: list[dict[str, float]] = []
    steepest.watch(optimizer, seen.append, every=1, model=model)
    train(accelerator, model, optimizer, range(1))
    assert "0.weight" in steepest.unwrap(optimizer).describe()
    assert seen[0]["groups/0/grad_norm"] == pytest.approx(float(steepest.unwrap(optimizer).metrics()["0/grad_norm"]))


@pytest.mark.parametrize("how", ["closure", "told"])
def test_a_loss(how: str) -> None:
    accelerator, model, optimizer = prepared(MuAdamMomo)
    other = copy.deepcopy(accelerator.unwrap_model(model))
    plain = MuAdamMomo(other)
    for group in (*optimizer.param_groups, *plain.param_groups):
        group["lr"] = 0.5
    for each in (steepest.unwrap(optimizer), plain):
        each.lower_bound = 0.0
    for step in range(3):
        loss = loss_of(model, step)
        accelerator.backward(loss)
        if how == "told":
            steepest.unwrap(optimizer).tell_loss(loss)
        optimizer.step(*([] if how == "told" else [lambda loss=loss: loss]))
        optimizer.zero_grad()
        loss = loss_of(other, step)
        loss.backward()
        plain.step(loss=loss)
        plain.zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("cls", [steepest.MuAdam, steepest.SOAP, steepest.KFAC])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_resume_is_the_same_bit_for_bit(tmp_path: Path, cls: Any, precision: str) -> None:
    runs = prepared(cls, gradient_accumulation_steps=2, mixed_precision=precision)
    train(*runs, range(4))
    accelerator, model, _ = runs
    accelerator.save_state(str(tmp_path))
    train(*runs, range(4, 8))
    whole = [p.detach().clone() for p in model.parameters()]
    accelerator.load_state(str(tmp_path))
    train(*runs, range(4, 8))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), whole, strict=True))
