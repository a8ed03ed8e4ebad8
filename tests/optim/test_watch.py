"""`diagnostics.watch`: what is logged, when, and that a step that is not watched costs and changes nothing."""

from __future__ import annotations

import csv
import importlib
import json
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest
from steepest import diagnostics
from steepest.tools.compare import methods, tasks
from support.problems import gaussian

EXAMPLES = Path(__file__).parents[2] / "examples"


def network() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(gaussian(*p.shape, seed=i))
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range = range(6), scale: float = 1.0) -> None:
    for step in steps:
        optimizer.zero_grad()
        (scale * model(gaussian(10, 5, seed=50 + step)).square().mean()).backward()
        optimizer.step()


def test_a_flat_dict_of_plain_numbers_at_the_first_step_and_every_third() -> None:
    model, seen = network(), []
    optimizer = steepest.MuAdam(model, lr=1e-3)
    watched = diagnostics.watch(optimizer, seen.append, 3, model=model)
    train(model, optimizer, range(7))
    assert [numbers["step"] for numbers in seen] == [1, 4, 7]
    for numbers in seen:
        assert all(type(value) in (int, float) for value in numbers.values())
        assert json.loads(json.dumps(numbers)) == numbers
        assert {
            "0.weight/cosine",
            "2.bias/update_norm",
            "groups/0/lr",
            "groups/1/grad_norm",
            "skipped/cpu",
        } <= numbers.keys()
        assert not any(
            "polar_slack" in key and key.count("/") == 1 and key[0] in "01" and key[1] == "/" for key in numbers
        )
    watched.remove()
    train(model, optimizer)
    assert len(seen) == 3


def test_the_numbers_are_those_of_record() -> None:
    seen: list[dict[str, float]] = []
    ours, theirs = network(), network()
    one, other = (torch.optim.Adam(model.parameters(), lr=0.01) for model in (ours, theirs))
    diagnostics.watch(one, seen.append, 2, model=ours)
    train(ours, one, range(3))
    train(theirs, other, range(2))
    other.zero_grad()
    theirs(gaussian(10, 5, seed=52)).square().mean().backward()
    with diagnostics.record(other, theirs) as layers:
        other.step()
    for layer, own in layers.items():
        for key, value in own.items():
            assert seen[1][f"{layer}/{key}"] == float(value)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))


def test_layers_have_the_names_of_the_model_or_of_the_optimizer_or_numbers() -> None:
    model = network()
    routed, plain = steepest.Muon(model), torch.optim.SGD(model.parameters(), lr=0.1)
    for optimizer, wanted in ((routed, "0.weight"), (plain, "0.0")):
        seen: list[dict[str, float]] = []
        diagnostics.watch(optimizer, seen.append)
        train(model, optimizer, range(1))
        assert f"{wanted}/cosine" in seen[0]
    later = nn.Parameter(torch.ones(3, dtype=torch.float64))
    seen = []
    diagnostics.watch(plain, seen.append, 1, model=model, norms=["sign"], first=11)
    plain.add_param_group({"params": [later]})
    later.grad = torch.ones_like(later)
    plain.step()
    assert seen[0]["step"] == 11
    assert {"0.weight/cosine", "1.0/sign_steepness"} <= seen[0].keys()
    assert not any("spectral" in key for key in seen[0])


def test_a_closure_and_a_parameter_without_gradient() -> None:
    model, seen = network(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    diagnostics.watch(optimizer, seen.append, 1, model=model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model[0](gaussian(4, 5)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    assert seen[0]["0.weight/cosine"] == pytest.approx(1.0)
    assert not any(key.startswith("2.") for key in seen[0])


def test_gradients_that_the_step_unscales_are_logged_unscaled() -> None:
    seen: list[dict[str, float]] = []
    for scale in (1.0, 64.0):
        model = network()
        optimizer = steepest.MuAdam(model, lr=1e-3)
        diagnostics.watch(optimizer, seen.append, model=model)
        optimizer.grad_scale = torch.tensor(scale)  # type: ignore[attr-defined]
        train(model, optimizer, range(1), scale)
    assert seen[0]["0.weight/gradient_norm"] == pytest.approx(seen[1]["0.weight/gradient_norm"], rel=1e-6)


def test_reads_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without "spectral", whose decomposition waits anyway."""
    model, seen = network(), []
    optimizer = steepest.MuAdam(model, lr=1e-3)
    train(model, optimizer, range(1))
    diagnostics.watch(optimizer, seen.append, norms=["sign"])
    reads: list[str] = []
    tolist = Tensor.tolist

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("watch read a tensor by itself")

    def count(self: Tensor) -> Any:
        reads.append("tolist")
        return tolist(self)

    model(gaussian(10, 5)).square().mean().backward()
    with monkeypatch.context() as patch:
        for name in ("item", "cpu", "numpy", "__bool__", "__float__"):
            patch.setattr(Tensor, name, refuse)
        patch.setattr(Tensor, "tolist", count)
        optimizer.step()
    assert reads == ["tolist"]
    assert len(seen) == 1


@pytest.mark.parametrize("name", methods.known())
def test_every_optimizer_of_the_zoo_is_watched(name: str) -> None:
    """Three steps, for the first of some is none: every weight moves, and not straight up."""
    task = tasks.make(["mushrooms"], replace(tasks.QUICK, rows=32), None, None)["mushrooms"]
    model, seen = task.create(0), []
    optimizer = methods.known()[name].build(model, 1e-4, task.routed)
    diagnostics.watch(optimizer, seen.append, 1, model=model)
    for batch in task.batches(3, 0):
        optimizer.zero_grad()
        loss = task.loss(model, batch)
        loss.backward()
        optimizer.step(**({"loss": loss.detach()} if isinstance(optimizer, steepest.Momo) else {}))
    for layer in ("0.weight", "2.weight"):
        assert seen[-1][f"{layer}/update_norm"] > 0
        assert -0.9 < seen[-1][f"{layer}/cosine"] <= 1
        assert seen[-1][f"{layer}/metric_condition"] >= 1


def test_bad_arguments_are_refused_before_a_hook_is_set() -> None:
    optimizer = torch.optim.SGD(network().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="every should be a whole number of at least 1 but is: 0"):
        diagnostics.watch(optimizer, print, 0)
    with pytest.raises(ValueError, match="norm 'nuclear' is not known; use some of frobenius, spectral, sign"):
        diagnostics.watch(optimizer, print, norms=["nuclear"])
    assert not optimizer._optimizer_step_pre_hooks


# ---- the example -------------------------------------------------------------------------------------------------


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("watch")


def test_the_example_writes_a_csv_and_a_picture(example: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert example.main(["--out", str(tmp_path / "run"), "--steps", "21", "--every", "10"]) == 0
    with (tmp_path / "run" / "steps.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "11", "21"]
    assert all(-1 <= float(row["2.weight/cosine"]) <= 1 for row in rows)
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    assert (tmp_path / "run" / "steps.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("logger", ["tensorboard", "wandb"])
def test_the_example_logs_elsewhere(logger: str, example: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip(logger)
    assert example.main(["--out", str(tmp_path), "--to", logger, "--steps", "3", "--every", "1"]) == 0
    assert list(tmp_path.rglob("*tfevents*" if logger == "tensorboard" else "*.wandb"))


def test_the_example_says_what_is_missing(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(importlib.import_module("sys").modules, "wandb", None)
    with pytest.raises(SystemExit):
        example.main(["--out", str(tmp_path), "--to", "wandb"])
    assert "--to wandb: it is not installed; pip install wandb" in capsys.readouterr().err
