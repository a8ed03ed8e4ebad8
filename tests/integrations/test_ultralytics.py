"""Ultralytics' own trainer with an optimizer from here: a small detector on squares, stopped and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("ultralytics", reason="ultralytics is not installed (make test-trainers)")

import torchvision
from PIL import Image
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn import tasks

import steepest
from steepest.routing import route

pytestmark = pytest.mark.filterwarnings("ignore")


def first_of_each(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Non-maximum suppression, which a torchvision without its compiled part lacks."""
    kept, rest = [], scores.argsort(descending=True)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    while len(rest):
        best, rest = rest[0], rest[1:]
        kept.append(best)
        sides = torch.minimum(boxes[best, 2:], boxes[rest, 2:]) - torch.maximum(boxes[best, :2], boxes[rest, :2])
        shared = sides.clamp(min=0).prod(1)
        rest = rest[shared <= threshold * (area[best] + area[rest] - shared)]
    return torch.stack(kept) if kept else rest


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if not torchvision.extension._has_ops():
        monkeypatch.setattr(torchvision.ops, "nms", first_of_each)
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 8), ("val", 4)):
        images, labels = (tmp_path / what / split for what in ("images", "labels"))
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        for i in range(count):
            x, y = torch.randint(16, 48, (2,), generator=generator).tolist()
            image = Image.new("RGB", (64, 64))
            image.paste((250, 50 * i, 50), (x - 10, y - 10, x + 10, y + 10))
            image.save(images / f"{i}.png")
            (labels / f"{i}.txt").write_text(f"0 {x / 64} {y / 64} {20 / 64} {20 / 64}\n")
    file = tmp_path / "data.yaml"
    file.write_text(f"path: {tmp_path}\ntrain: images/train\nval: images/val\nnames:\n  0: square\n")
    return file


@pytest.mark.parametrize("name", ["Muon", "MuAdam", "SOAP"])
def test_a_run_is_stopped_and_resumed(name: str, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Trainer(DetectionTrainer):
        def build_optimizer(self, model: Any, name_: str = "auto", lr: float = 0.001, **values: Any) -> Any:
            return getattr(steepest, name)(model, lr=lr, weight_decay=values["decay"])

    class StoppedError(Exception):
        pass

    def stop(trainer: Any) -> None:
        if trainer.epoch == 1:
            raise StoppedError

    monkeypatch.chdir(data.parent)
    options: dict[str, Any] = {"imgsz": 64, "batch": 4, "device": "cpu", "workers": 0, "plots": False, "amp": False}
    model = YOLO("yolo11n.yaml")
    start = {key: p.detach().clone() for key, p in model.model.named_parameters()}
    model.add_callback("on_model_save", stop)
    with pytest.raises(StoppedError):
        model.train(
            trainer=Trainer, data=str(data), epochs=3, project=str(data.parent), name="run", lr0=0.01, **options
        )
    stopped = model.trainer.optimizer.state_dict()
    resumed = YOLO(data.parent / "run" / "weights" / "last.pt")
    resumed.train(trainer=Trainer, resume=True)
    optimizer = resumed.trainer.optimizer
    assert type(optimizer).__name__ == name
    found = optimizer.state_dict()
    assert [{k: t.dtype for k, t in state.items()} for state in found["state"].values()] == [
        {k: t.dtype for k, t in state.items()} for state in stopped["state"].values()
    ]
    weights = dict(resumed.trainer.model.named_parameters())
    assert all(p.isfinite().all() for p in weights.values())
    key = "model.0.conv.weight"
    assert not torch.equal(weights[key].detach(), start[key])


def test_last_layers_are_adamw_s() -> None:
    found = {r.name: r for r in route(tasks.DetectionModel("yolo11n.yaml", verbose=False))}
    heads = {name for name, r in found.items() if r.reason.startswith("head, by")}
    assert heads == {f"model.23.cv{branch}.{scale}.2.weight" for branch in (2, 3) for scale in range(3)}
    (linear,) = (r for r in route(tasks.ClassificationModel("yolo11n-cls.yaml")) if r.name == "model.10.linear.weight")
    assert (linear.rule, linear.reason) == ("adamw", "head, by linear of Classify")
