"""Several methods train the same model on the same batches, one step of each in turn.

Interleaving the steps makes the comparison fair: what slows the machine down for a moment slows all of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from demo.methods import Method
from steepest.tools.compare.gpt import GPT, Shape
from steepest.tools.compare.text import Corpus, windows
from steepest.tools.compare.training import learning_rate_factor

VALIDATION_SEED = 20_261_010  # the held-out windows are the same for every seed
UNTIMED_STEPS = 5  # the first steps allocate and are left out of the medians


@dataclass(frozen=True)
class Settings:
    """One training run: model, batch (windows per step), steps, seed and how often to look at the held-out text."""

    shape: Shape = field(default_factory=Shape)
    batch: int = 32
    steps: int = 200
    seed: int = 0
    validate_every: int = 20
    validation_windows: int = 128


QUICK = Settings(shape=Shape(layers=2, width=64, heads=2, context=64), batch=16, steps=60, validate_every=10)


@dataclass(frozen=True)
class Point:
    """What one step of one method left behind; `seconds` sums the method's own training time, validation apart."""

    step: int
    method: str
    train_loss: float | None
    validation_loss: float | None
    seconds: float


class Run:
    """One method's model, optimizers and schedule, with the time each step took."""

    def __init__(self, method: Method, lr: float, adamw_lr: float, settings: Settings) -> None:
        self.method = method
        self.lr = lr
        self.model = GPT.create(settings.shape, settings.seed)
        self.optimizers = method.build(self.model, lr, adamw_lr)
        self.schedules = [LambdaLR(o, lambda step: learning_rate_factor(step, settings.steps)) for o in self.optimizers]
        self.points: list[Point] = []
        self.step_seconds: list[float] = []
        self.optimizer_seconds: list[float] = []

    def step(self, inputs: Tensor, targets: Tensor) -> float:
        """Forward, backward and update on one batch; -> the loss before the update, in nats per byte."""
        start = time.perf_counter()
        loss = self.model.loss(inputs, targets)
        loss.backward()
        updating = time.perf_counter()
        for optimizer in self.optimizers:
            optimizer.step()
        end = time.perf_counter()
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.zero_grad()
            schedule.step()
        self.step_seconds.append(end - start)
        self.optimizer_seconds.append(end - updating)
        return loss.item()

    @torch.no_grad()
    def validate(self, inputs: Tensor, targets: Tensor, batch: int) -> float:
        """Mean loss over the held-out windows, in nats per byte."""
        losses = [
            self.model.loss(x, y) * len(x) for x, y in zip(inputs.split(batch), targets.split(batch), strict=True)
        ]
        return sum(loss.item() for loss in losses) / len(inputs)

    def record(self, step: int, train_loss: float | None, validation_loss: float | None) -> None:
        self.points.append(Point(step, self.method.name, train_loss, validation_loss, sum(self.step_seconds)))

    @property
    def validation_loss(self) -> float:
        """The latest one."""
        return next(p.validation_loss for p in reversed(self.points) if p.validation_loss is not None)

    @property
    def step_ms(self) -> float:
        """Median time of a whole step, in milliseconds."""
        return _median_ms(self.step_seconds)

    @property
    def optimizer_ms(self) -> float:
        """Median time of the optimizer's part of a step, in milliseconds."""
        return _median_ms(self.optimizer_seconds)


def train(runs: Sequence[Run], corpus: Corpus, settings: Settings, report: Callable[[int, str], None]) -> None:
    """Train `runs` side by side and record their points; `report(step, note)` is called after every step."""
    held_out = windows(
        corpus.validation,
        settings.validation_windows,
        settings.shape.context,
        torch.Generator().manual_seed(VALIDATION_SEED),
    )
    for run in runs:
        run.record(0, None, run.validate(*held_out, settings.batch))
    for step, (inputs, targets) in enumerate(_batches(corpus, settings), start=1):
        validating = step % settings.validate_every == 0 or step == settings.steps
        for run in _rotated(runs, step):
            train_loss = run.step(inputs, targets)
            run.record(step, train_loss, run.validate(*held_out, settings.batch) if validating else None)
        report(step, "  ".join(f"{run.method.name} {run.points[-1].train_loss:.3f}" for run in runs))


def _batches(corpus: Corpus, settings: Settings) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(settings.seed)
    for _ in range(settings.steps):
        yield windows(corpus.train, settings.batch, settings.shape.context, generator)


def _rotated(runs: Sequence[Run], step: int) -> Sequence[Run]:
    """Who goes first changes with every step, so that no method always finds the batch in cache."""
    first = step % len(runs)
    return [*runs[first:], *runs[:first]]


def _median_ms(seconds: Sequence[float]) -> float:
    return 1e3 * statistics.median(seconds[UNTIMED_STEPS:] or seconds)
