"""Optimizers inside wrappers such as frameworks have, stated here; the frameworks themselves are in integrations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import steepest


class Holder(torch.optim.Optimizer):
    """A wrapper as Accelerate's: it has what it wraps, and few of its methods."""

    def __init__(self, optimizer: torch.optim.Optimizer, key: str = "optimizer") -> None:
        vars(self)[key] = optimizer

    def __getattr__(self, name: str) -> Any:
        if name not in ("param_groups", "state"):
            raise AttributeError(name)
        return getattr(steepest.unwrap(self), name)


class Imitation:
    """A wrapper as Lightning's and Fabric's: of a class derived from that of what it wraps."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self.__class__ = type(f"Wrapped{type(optimizer).__name__}", (Imitation, type(optimizer)), {})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)

    def step(self) -> None:
        self._optimizer.step()


def model_and_optimizer() -> tuple[nn.Module, steepest.MuAdam]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    model(torch.ones(2, 4)).square().sum().backward()
    return model, steepest.MuAdam(model)


@pytest.mark.parametrize("key", ["optimizer", "_optimizer", "optim"])
def test_unwrap_finds_the_optimizer_through_wrappers(key: str) -> None:
    _, optimizer = model_and_optimizer()
    assert steepest.unwrap(optimizer) is optimizer
    assert steepest.unwrap(Holder(Holder(optimizer, key))) is optimizer
    adam = torch.optim.AdamW([torch.ones(2)])
    assert steepest.unwrap(Holder(adam)) is adam


def test_reports_are_the_same_through_a_wrapper_of_its_class() -> None:
    _, optimizer = model_and_optimizer()
    wrapped = Imitation(optimizer)
    wrapped.step()
    assert wrapped.describe() == optimizer.describe()
    assert "Wrapped" not in wrapped.describe()
    assert wrapped.metrics().keys() == optimizer.metrics().keys() != set()


@pytest.mark.parametrize("wrap", [Holder, Imitation])
def test_watch_sees_through_wrappers(wrap: Any) -> None:
    model, optimizer = model_and_optimizer()
    seen: list[dict[str, float]] = []
    steepest.watch(wrap(optimizer), seen.append, every=1, model=model)
    optimizer.step()
    assert seen[0]["groups/0/grad_norm"] > 0


def test_only_a_grad_scaler_is_told_that_the_step_unscales() -> None:
    """Lightning, which asks too, would refuse to clip; a GradScaler that is not told reads the host and skips all."""
    _, optimizer = model_and_optimizer()
    assert not getattr(optimizer, "_step_supports_amp_scaling", False)

    class Scaler(torch.amp.GradScaler):
        def _maybe_opt_step(self, *args: Any, **kwargs: Any) -> float | None:
            raise AssertionError("the scaler was not told")

    scaler = Scaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))
    scaler.step(optimizer)


def test_a_loss_told_before_a_step_without_arguments() -> None:
    class MuAdamMomo(steepest.Momo, steepest.MuAdam):
        """MuAdam with a lower bound."""

    runs = []
    for told in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
        optimizer = MuAdamMomo(model, lr=0.5, lower_bound=0.0)
        for _ in range(3):
            loss = model(torch.ones(2, 4)).square().mean()
            loss.backward()
            if told:
                for part in (0.5, 1.5):  # of micro-batches, whose mean counts
                    Imitation(optimizer).tell_loss(part * loss)
                optimizer.step()
            else:
                optimizer.step(loss=loss)
            optimizer.zero_grad()
        runs.append([p.detach().clone() for p in model.parameters()])
    for p, q in zip(*runs, strict=True):
        torch.testing.assert_close(p, q)
    with pytest.raises(RuntimeError, match=r"needs the loss: step\(loss=loss\), step\(closure\), tell_loss\(loss\)"):
        optimizer.step()
