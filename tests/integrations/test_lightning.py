"""Lightning and Fabric: clipping in mixed precision, reports, a loss, accumulation and resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

L = pytest.importorskip("lightning", reason="lightning is not installed (make test-integrations)")

import steepest  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


class MuAdamMomo(steepest.Momo, steepest.MuAdam):
    """A method that needs the loss."""


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


class Task(L.LightningModule):  # type: ignore[name-defined,misc]
    def __init__(self, cls: Any) -> None:
        super().__init__()
        self.net, self.cls = network(), cls

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return self.cls(self)


def data(size: int = 4) -> Any:
    return torch.utils.data.DataLoader(torch.randn(32, 6, generator=torch.Generator().manual_seed(0)), size)


def fit(task: Task, folder: Path, batch: int = 4, resume: str | None = None, **kwargs: Any) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = L.Trainer(default_root_dir=folder, **{"max_epochs": 2, **quiet, **kwargs})
    trainer.fit(task, data(batch), ckpt_path=resume)
    return trainer


def weights(task: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in task.parameters()]


def in_precision(name: str, plugins: Any = L.pytorch.plugins) -> dict[str, Any]:
    """Options of a Trainer; on a CPU it makes bf16-mixed of 16-mixed by itself, with which there is no scaler."""
    if name != "16-mixed":
        return {"precision": name}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    return {"plugins": [plugins.MixedPrecision("16-mixed", "cpu", scaler)]}


@pytest.mark.parametrize("cls", [steepest.MuAdam, steepest.SOAP, steepest.KFAC])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_clipping_in_every_precision(tmp_path: Path, cls: Any, precision: str) -> None:
    task = Task(cls)
    before = weights(task)
    options = in_precision(precision)
    fit(task, tmp_path, gradient_clip_val=0.1, max_epochs=1, enable_checkpointing=False, **options)
    assert all(torch.isfinite(p).all() and not torch.equal(p, q) for p, q in zip(weights(task), before, strict=True))


@pytest.mark.parametrize("clip", [None, 1e9])
def test_kfac_s_factors_are_of_the_unscaled_loss(tmp_path: Path, clip: float | None) -> None:
    """Lightning unscales before the step; what the hooks have seen is divided by the scale all the same."""
    runs = []
    for precision in ("32-true", "16-mixed"):
        task = Task(lambda model: steepest.KFAC(model, damping=0.1))
        options = in_precision(precision)
        fit(task, tmp_path, max_epochs=1, enable_checkpointing=False, gradient_clip_val=clip, **options)
        runs.append(torch.cat([p.flatten() for p in weights(task)]))
    moved = runs[0] - torch.cat([p.flatten() for p in weights(Task(None))])
    assert (runs[1] - runs[0]).norm() < 0.05 * moved.norm()


def test_kfac_sees_an_accumulated_batch_as_one(tmp_path: Path) -> None:
    runs = []
    for parts in (1, 2):
        task = Task(lambda model: steepest.KFAC(model, precondition_frequency=1))
        fit(task, tmp_path, batch=8 // parts, accumulate_grad_batches=parts, enable_checkpointing=False)
        runs.append(weights(task))
    for p, q in zip(*runs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("cls", [steepest.MuAdam, steepest.SOAP, MuAdamMomo])
def test_resume_is_the_same_bit_for_bit(tmp_path: Path, cls: Any) -> None:
    whole = Task(cls)
    fit(whole, tmp_path, max_epochs=4)
    begun = Task(cls)
    trainer = fit(begun, tmp_path, max_epochs=2)
    trainer.save_checkpoint(path := str(tmp_path / "begun.ckpt"))
    resumed = Task(cls)
    fit(resumed, tmp_path, max_epochs=4, resume=path)
    assert all(torch.equal(p, q) for p, q in zip(weights(whole), weights(resumed), strict=True))


def test_reports_through_lightning_s_wrapper(tmp_path: Path) -> None:
    task = Task(steepest.MuAdam)
    told: list[Any] = []

    class Look(L.Callback):  # type: ignore[name-defined,misc]
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            wrapped = module.optimizers()
            told.append((wrapped.describe(), wrapped.metrics(), steepest.unwrap(wrapped)))

    fit(task, tmp_path, max_steps=1, callbacks=[Look()], enable_checkpointing=False)
    text, metrics, inside = told[0]
    assert type(inside) is steepest.MuAdam
    assert text == inside.describe()
    assert metrics["0/grad_norm"] == inside.metrics()["0/grad_norm"] > 0


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_fabric(tmp_path: Path, precision: str) -> None:
    fabric = L.Fabric(accelerator="cpu", devices=1, **in_precision(precision, L.fabric.plugins))
    net = network()
    model, optimizer = fabric.setup(net, MuAdamMomo(net, lr=0.1, lower_bound=0.0))
    seen: list[dict[str, float]] = []
    steepest.watch(optimizer, seen.append, every=1)

    def train(steps: int) -> None:
        for batch in list(data())[:steps]:
            loss = model(batch).square().mean()
            fabric.backward(loss)
            fabric.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.tell_loss(loss)
            optimizer.step()
            optimizer.zero_grad()

    train(2)
    assert seen[-1]["groups/0/grad_norm"] == float(optimizer.metrics()["0/grad_norm"]) > 0
    assert optimizer.describe() == steepest.unwrap(optimizer).describe()
    fabric.save(tmp_path / "a", {"model": model, "optimizer": optimizer})
    train(3)
    whole = weights(net)
    fabric.load(tmp_path / "a", {"model": model, "optimizer": optimizer})
    train(3)
    if precision != "16-mixed":  # the scale is the scaler's, which Fabric does not save
        assert all(torch.equal(p, q) for p, q in zip(whole, weights(net), strict=True))
