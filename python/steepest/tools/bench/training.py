"""A training run: several methods train the same GPT on the same batches of real text, a step of each in turn.

What slows the machine down for a moment slows all of them. A step's time is split in two: forward and backward, and the
optimizer's. Every so often the polar slack of each matrix is read: s = ||X||_F over the bound of its largest singular
value that `polar="auto"` divides by instead. How many steps "auto" may leave out, with which table, is decided by it
(see `steepest.polar`), so the run shows what that choice rests on.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from steepest import zoo
from steepest.linalg.coefficients import schedule
from steepest.optimizer import MatrixOptimizer

from ..compare.gpt import GPT, Shape
from ..compare.text import Corpus, windows
from ..compare.training import learning_rate_factor
from .case import OK, Row, failure

BETAS = (0.9, 0.95)
ADAMW_DECAY = 0.1
UNTIMED_STEPS = 5  # the first steps allocate and are left out of the medians
HELD_OUT_SEED = 20_261_010


@dataclass(frozen=True)
class Size:
    """Model, batch (windows a step), steps, and how often held-out text and slack are looked at."""

    shape: Shape
    windows: int
    steps: int
    held_out_windows: int
    every: int


FULL = Size(Shape(layers=17, width=768, heads=12, context=1024), 16, 400, 32, 20)  # 121 million parameters
QUICK = Size(Shape(layers=17, width=768, heads=12, context=1024), 8, 60, 8, 10)
CPU = Size(Shape(layers=2, width=64, heads=2, context=64), 16, 60, 32, 10)
TINY = Size(Shape(layers=1, width=32, heads=2, context=32), 8, 8, 8, 4)


@dataclass(frozen=True)
class Method:
    """build(model, lr, adamw_lr) gives optimizers that together update every parameter once.

    rates: the learning rate at GPT-2's size and at a toy's; not tuned at the former.
    """

    build: Callable[[GPT, float, float], list[Optimizer]]
    rates: tuple[float, float]
    ours: bool = True


def _adamw(params: Sequence[nn.Parameter], lr: float) -> Optimizer:
    return torch.optim.AdamW(params, lr=lr, betas=BETAS, weight_decay=ADAMW_DECAY, fused=True)


def _torch_muon(model: GPT, lr: float, adamw_lr: float) -> list[Optimizer]:
    matrices = model.hidden_matrices()
    covered = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in covered]
    return [torch.optim.Muon(matrices, lr=lr, weight_decay=0.0), _adamw(rest, adamw_lr)]


def _ours(kind: type[MatrixOptimizer], **options: Any) -> Callable[[GPT, float, float], list[Optimizer]]:
    def build(model: GPT, lr: float, adamw_lr: float) -> list[Optimizer]:
        adamw: dict[str, Any] = {"adamw_lr": adamw_lr, "adamw_betas": BETAS, "adamw_weight_decay": ADAMW_DECAY}
        return [kind(model, lr=lr, weight_decay=0.0, **adamw, **options)]  # type: ignore[call-arg]

    return build


ADAMW = "torch fused AdamW"
METHODS: dict[str, Method] = {
    ADAMW: Method(lambda model, lr, _: [_adamw(list(model.parameters()), lr)], (1e-3, 1.6e-2), ours=False),
    "torch.optim.Muon": Method(_torch_muon, (2e-2, 8e-2), ours=False),
    "Muon": Method(_ours(zoo.Muon, polar="auto"), (2e-2, 8e-2)),
    "MuAdam": Method(_ours(zoo.MuAdam, betas=BETAS), (1e-3, 4e-3)),
    "SOAP": Method(_ours(zoo.SOAP, precondition_frequency=1), (3e-3, 2e-2)),
}


class Stopwatch:
    """Seconds between marks: of the device's own clock on a GPU, where nothing waits until they are read."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        self.marks: list[Any] = []

    def mark(self) -> None:
        if not self.cuda:
            self.marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append(event)

    def read(self) -> list[float]:
        """The seconds between each mark and the next, which are forgotten."""
        marks, self.marks = self.marks, []
        if not self.cuda:
            return [b - a for a, b in zip(marks, marks[1:])]
        marks[-1].synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in zip(marks, marks[1:])]


@dataclass
class Run:
    """One method's model and what has been measured of it; points: [step, seconds, held-out loss]."""

    name: str
    method: Method
    lr: float
    model: GPT
    device: str
    optimizers: list[Optimizer]
    rates: list[LambdaLR]
    status: str = OK
    points: list[tuple[int, float, float]] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)  # seconds
    updates: list[float] = field(default_factory=list)  # of them the optimizer's
    slack: dict[str, list[float]] = field(default_factory=dict)  # of every matrix, whenever it was read

    @staticmethod
    def start(name: str, lr: float, adamw_lr: float, size: Size, device: str) -> Run:
        method = METHODS[name]
        model = GPT.create(size.shape, 0).to(device)
        optimizers = method.build(model, lr, adamw_lr)
        rates = [LambdaLR(each, lambda step: learning_rate_factor(step, size.steps)) for each in optimizers]
        return Run(name, method, lr, model, device, optimizers, rates)

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        watch = Stopwatch(self.device)
        watch.mark()
        with precision(self.device):
            loss = self.model.loss(inputs, targets)
        loss.backward()
        watch.mark()
        for optimizer in self.optimizers:
            optimizer.step()
        watch.mark()
        for optimizer, rate in zip(self.optimizers, self.rates):
            optimizer.zero_grad()
            rate.step()
        before, update = watch.read()
        self.steps.append(before + update)
        self.updates.append(update)
        self._end_unless_finite(loss.item())

    @torch.no_grad()
    def look(self, step: int, held_out: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Held-out loss, and the slack of the step before."""
        with precision(self.device):
            losses: list[Tensor] = [self.model.loss(x, y).float() * len(x) for x, y in held_out]
        loss = torch.stack(losses).sum().item() / sum(len(x) for x, _ in held_out)
        self._end_unless_finite(loss)
        if self.status != OK:
            return
        self.points.append((step, round(sum(self.steps), 4), round(loss, 5)))
        for name, value in polar_slack(self.model, self.optimizers).items():
            self.slack.setdefault(name, []).append(round(value, 3))

    def _end_unless_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            self.status = "failed: the loss is not finite"

    def row(self, size: Size, described: str) -> Row:
        row: Row = {"suite": "train", "case": described, "variant": self.name, "ours": self.method.ours}
        row |= {"version": "" if self.method.ours else torch.__version__, "status": self.status, "lr": self.lr}
        row |= {"steps": len(self.steps), "points": self.points}
        if self.points and self.status == OK:
            row |= {"first_loss": self.points[0][2], "loss": self.points[-1][2]}
        timed, updates = (each[UNTIMED_STEPS:] or each for each in (self.steps, self.updates))
        if timed:
            step, update = statistics.median(timed), statistics.median(updates)
            quartiles = statistics.quantiles(timed, n=4) if len(timed) > 1 else [step] * 3
            row |= {"ms": round(1e3 * step, 4), "spread_ms": round(500 * (quartiles[2] - quartiles[0]), 4)}
            row |= {"optimizer_ms": round(1e3 * update, 4), "optimizer_share": round(update / step, 4)}
            row["tokens_per_s"] = round(size.windows * size.shape.context / step)
        if self.slack:
            last = [values[-1] for values in self.slack.values()]
            row |= {"slack": self.slack, "slack_median": statistics.median(last), "slack_least": min(last)}
            row["auto_tables"] = auto_tables([value for values in self.slack.values() for value in values])
        return row


def train(
    names: Sequence[str],
    rates: dict[str, float],
    size: Size,
    corpus: Corpus,
    device: str,
    *,
    toy: bool,
    deadline: float = math.inf,
    report: Callable[[int, str], None] = lambda step, note: None,
) -> list[Row]:
    """A row for each method. All stop at the same step, the last or the first after ``deadline`` (time.monotonic)."""
    runs: list[Run] = []
    rows: list[Row] = []
    described = f"{size.shape.layers}x{size.shape.width} GPT, {size.windows} x {size.shape.context} bytes"
    adamw = rates.get(ADAMW, METHODS[ADAMW].rates[toy])
    for name in names:
        try:
            runs.append(Run.start(name, rates.get(name, METHODS[name].rates[toy]), adamw, size, device))
        except Exception as error:
            rows.append(
                {"suite": "train", "case": described, "variant": name, "ours": METHODS[name].ours}
                | {"status": failure(error)}
            )
    held_out = list(_batches(corpus.validation, size, 1, size.held_out_windows, HELD_OUT_SEED, device))
    held_out = [(x, y) for a, b in held_out for x, y in zip(a.split(size.windows), b.split(size.windows))]
    for run in runs:
        run.look(0, held_out)
    for step, batch in enumerate(_batches(corpus.train, size, size.steps, size.windows, 0, device), start=1):
        late = time.monotonic() > deadline
        for run in _rotated([run for run in runs if run.status == OK], step):
            try:
                run.step(*batch)
                if step % size.every == 0 or step == size.steps or late:
                    run.look(step, held_out)
            except Exception as error:
                run.status = failure(error)
        report(step, "  ".join(f"{run.name} {run.points[-1][2]:.3f}" for run in runs if run.points))
        if late:
            break
    rows = [run.row(size, described) for run in runs] + rows
    base = next((row for row in rows if row["variant"] == ADAMW and "ms" in row), None)
    for row in rows:
        if base is not None and "ms" in row:
            row |= {"base": ADAMW, "ratio": round(base["ms"] / row["ms"], 3)}
    return rows


def precision(device: str) -> contextlib.AbstractContextManager[Any]:
    """bf16 products on a GPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.startswith("cuda") else contextlib.nullcontext()


def polar_slack(model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, float]:
    """The slack of the last step, by parameter name; empty for methods that have none. It reads the device."""
    names = {id(p): name for name, p in model.named_parameters()}
    slacks: dict[str, float] = {}
    for optimizer in optimizers:
        if not isinstance(optimizer, MatrixOptimizer):
            continue
        metrics = optimizer.metrics()
        for i, group in enumerate(optimizer.param_groups):
            values = metrics.get(f"{i}/polar_slack")
            # Matrices of one shape together, in the order of the group.
            shapes = dict.fromkeys(p.shape for p in group["params"])
            order = [p for shape in shapes for p in group["params"] if p.shape == shape]
            if values is not None and len(values) == len(order):
                named = {names[id(p)]: value for p, value in zip(order, values.tolist())}
                slacks |= {name: value for name, value in named.items() if math.isfinite(value)}
    return slacks


def auto_tables(slacks: Sequence[float]) -> list[float]:
    """The share of slacks that each table of "auto" takes: the first whose least slack they reach, the last any."""
    least = schedule("auto", None, None).slacks
    tables = [next((k for k, at_least in enumerate(least) if value >= at_least), len(least)) for value in slacks]
    return [round(tables.count(k) / len(tables), 4) for k in range(len(least) + 1)]


def _batches(
    data: Tensor, size: Size, steps: int, count: int, seed: int, device: str
) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        inputs, targets = windows(data, count, size.shape.context, generator)
        yield inputs.to(device), targets.to(device)


def _rotated(runs: Sequence[Run], step: int) -> Sequence[Run]:
    """The runs in an order that changes with every step, so that no method always finds the batch in cache."""
    first = step % len(runs) if runs else 0
    return [*runs[first:], *runs[:first]]
