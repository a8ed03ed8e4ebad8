"""One run: a method at a learning rate on a task, as a record that goes into a line of JSON."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._pytree import tree_leaves

from .methods import ADAMW_RATE, Method
from .tasks import Batch, Task

WARM_UP = 0.15  # of all steps
FINAL_LEARNING_RATE = 0.1  # of the highest
UNTIMED_STEPS = 5  # the first steps allocate and are left out of the medians

Record = dict[str, Any]


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over WARM_UP of the steps, then linear decay to FINAL_LEARNING_RATE; `step` counts from 0."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    left = (steps - step) / max(1, steps - warm)
    return FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * max(0.0, left)


def train(
    task: Task,
    method: Method,
    lr: float,
    steps: int,
    seed: int,
    evaluations: int = 20,
    adamw_lr: float = ADAMW_RATE,
) -> Record:
    """Trains once. The record holds

        task, described, optimizer, lr, adamw_lr, steps, seed   what was run
        status              "done", "diverged" (a loss was not finite) or "failed" (with `reason`)
        first_loss, loss    held-out loss before and after; None unless done
        points              [steps, seconds of training, training loss or None, held-out loss or None]
        step_ms, optimizer_ms   medians of a whole step and of what the optimizer adds to forward and backward
        state_bytes         state of a weight, in bytes: of the matrices that are the method's and not AdamW's

    Times are CPU times of the process, which another one beside it does not lengthen by what it takes for itself.
    An optimizer with `eval` and `train` (SPlus) is held to its averages. Errors of the optimizer end the run, not the
    comparison.
    """
    run = _Run(task, method, lr, adamw_lr, steps, seed)
    record: Record = {
        "task": task.name,
        "described": task.described,
        "optimizer": method.name,
        "lr": lr,
        "adamw_lr": adamw_lr,
        "steps": steps,
        "seed": seed,
    }
    try:
        status, reason = run.train(max(1, steps // evaluations)), None
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        status, reason = "failed", f"{type(error).__name__}: {error}"
    done = status == "done"
    return {
        **record,
        "status": status,
        "reason": reason,
        "first_loss": run.points[0][3] if run.points else None,
        "loss": run.points[-1][3] if done else None,
        "step_ms": _median_ms(run.step_seconds),
        "optimizer_ms": _median_ms(run.optimizer_seconds),
        "state_bytes": run.state_bytes,
        "points": run.points,
    }


class _Run:
    def __init__(self, task: Task, method: Method, lr: float, adamw_lr: float, steps: int, seed: int) -> None:
        self.task, self.method, self.lr, self.adamw_lr, self.steps, self.seed = task, method, lr, adamw_lr, steps, seed
        self.state_bytes: float | None = None
        self.points: list[tuple[int, float, float | None, float | None]] = []
        self.step_seconds: list[float] = []
        self.optimizer_seconds: list[float] = []

    def train(self, evaluate_every: int) -> str:
        """The status."""
        model = self.task.create(self.seed)
        optimizer = self.method.build(model, self.lr, self.task.routed, self.adamw_lr)
        schedule = LambdaLR(optimizer, lambda step: learning_rate_factor(step, self.steps))
        self.points.append((0, 0.0, None, self.task.evaluate(model)))
        for step, batch in enumerate(self.task.batches(self.steps, self.seed), start=1):
            loss = self._step(model, optimizer, batch)
            schedule.step()
            held_out = None
            if step % evaluate_every == 0 or step == self.steps:
                with _averaged(optimizer):
                    held_out = self.task.evaluate(model)
            if not math.isfinite(loss) or not (held_out is None or math.isfinite(held_out)):
                return "diverged"
            self.points.append((step, sum(self.step_seconds), loss, held_out))
        self.state_bytes = state_bytes(optimizer)
        return "done"

    def _step(self, model: torch.nn.Module, optimizer: Optimizer, batch: Batch) -> float:
        """Forward, backward and update in the closure that every optimizer takes; -> the loss before the update."""
        losses: list[Tensor] = []
        spent = [0.0]

        def closure() -> Tensor:
            started = time.process_time()
            optimizer.zero_grad()
            loss = self.task.loss(model, batch)
            loss.backward()
            losses.append(loss.detach())
            spent[0] += time.process_time() - started
            return losses[-1]

        started = time.process_time()
        optimizer.step(closure)  # type: ignore[arg-type]
        seconds = time.process_time() - started
        self.step_seconds.append(seconds)
        self.optimizer_seconds.append(seconds - spent[0])
        return float(losses[0])


def state_bytes(optimizer: Optimizer) -> float:
    """Bytes of state of a weight of the matrices that are not AdamW's; one number for the whole matrix counts too."""
    matrices = [p for group in optimizer.param_groups if group.get("use_muon", True) for p in group["params"]]
    matrices = [p for p in matrices if p.ndim > 1]
    kept = [leaf for p in matrices for leaf in tree_leaves(optimizer.state[p]) if isinstance(leaf, Tensor)]
    storages = {leaf.untyped_storage()._cdata: leaf.untyped_storage().nbytes() for leaf in kept}
    return round(sum(storages.values()) / sum(p.numel() for p in matrices), 3)


@contextmanager
def _averaged(optimizer: Optimizer) -> Iterator[None]:
    """The weights that the optimizer wants to be evaluated."""
    evaluate: Callable[[], None] | None = getattr(optimizer, "eval", None)
    if evaluate is None:
        yield
        return
    evaluate()
    try:
        yield
    finally:
        optimizer.train()  # type: ignore[attr-defined]


def _median_ms(seconds: list[float]) -> float | None:
    return round(1e3 * statistics.median(seconds[UNTIMED_STEPS:] or seconds), 4) if seconds else None
