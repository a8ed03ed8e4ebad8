"""Every class trains a small network with the arguments it has by default."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

import steepest
from steepest.optimizer import MatrixOptimizer
from steepest.zoo.momo import Momo

TEXT = "the quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 8
CLASSES = {
    name: kind
    for name, kind in ((name, getattr(steepest, name)) for name in steepest.__all__)
    if inspect.isclass(kind) and issubclass(kind, MatrixOptimizer) and kind not in (MatrixOptimizer, Momo)
}


def test_every_class_is_there() -> None:
    assert {"Muon", "KFAC", "ProdigyMuon", "AdamSANIA", "KLSOAP", "Fromage"} <= set(CLASSES)
    assert len(CLASSES) >= 26


#: Those that train it in every run; the others do in the slow ones.
QUICK = ("Muon", "MuAdam", "AdamSANIA", "SOAP", "KFAC", "Schattor")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CLASSES]
)
def test_a_model_of_characters_trains(name: str) -> None:
    """The next of eight characters, 60 steps: the loss falls, and is never far above its start."""
    letters = sorted(set(TEXT))
    ids = torch.tensor([letters.index(c) for c in TEXT])
    windows = ids.unfold(0, 9, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Embedding(len(letters), 8), nn.Flatten(), nn.Linear(64, 32), nn.LayerNorm(32), nn.GELU()
        )
        model.extend([nn.Linear(32, 32), nn.GELU(), nn.Linear(32, len(letters))])
    optimizer, losses = CLASSES[name](model), []
    for step in range(60):
        batch = windows[torch.randint(len(windows), (32,), generator=torch.Generator().manual_seed(step))]
        loss = nn.functional.cross_entropy(model(batch[:, :8]), batch[:, 8])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    seen = torch.stack(losses)
    assert seen.isfinite().all()
    assert seen.max() < 1.2 * seen[0]
    assert seen[-10:].mean() < seen[:5].mean() - 0.02
    assert all(p.isfinite().all() for p in model.parameters())
