"""Numbers of a training run for any logger: `watch` looks at some of the steps and hands over a flat dict."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..optimizer import MatrixOptimizer, unwrap
from .alignment import COMMON, NORMS
from .recorder import copies, measured, names_of

Log = Callable[[dict[str, float]], object]


def watch(
    optimizer: Optimizer,
    log: Log,
    every: int = 100,
    *,
    model: nn.Module | None = None,
    norms: Sequence[str] = COMMON,
    first: int = 1,
) -> Watch:
    """Calls log(numbers) after a step of any torch optimizer, the first one and then once in `every`.

    numbers: a flat dict of Python numbers, one read from the device a call:

        step                        of the optimizer, the next one being `first`
        <layer>/<quantity>          what `diagnostics.record` measures of every parameter with a gradient
        groups/<group>/lr           learning rate
        groups/<group>/<name>       what the optimizer's own `metrics()` has, of those that have it
        skipped/<device>            likewise

    What cannot be said is NaN: a cosine where nothing moved. model names the layers. norms: see `diagnostics.measure`;
    without "spectral" nothing is decomposed. A watched step holds a copy of the weights; the others cost nothing. The
    wrappers that `unwrap` knows are seen through. `remove()` of what is returned ends it. For a step in a CUDA graph,
    which runs no hooks, log `metrics()` yourself.
    ValueError for every < 1 and for unknown norms.

        steepest.watch(optimizer, wandb.log, model=model)
    """
    optimizer = unwrap(optimizer)
    return Watch(optimizer, log, every, names_of(optimizer, model), norms, first)


class Watch:
    """The hooks that `watch` has registered."""

    def __init__(
        self, optimizer: Optimizer, log: Log, every: int, names: Mapping[Tensor, str], norms: Sequence[str], first: int
    ) -> None:
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every should be a whole number of at least 1 but is: {every!r}")
        for name in norms:
            if name not in NORMS:
                raise ValueError(f"norm {name!r} is not known; use some of {', '.join(NORMS)}")
        self.log, self.every, self.names, self.norms = log, every, dict(names), tuple(norms)
        self.step, self.seen = first, 0
        self._before: dict[Tensor, Tensor] = {}
        self._hooks = [
            optimizer.register_step_pre_hook(self._look),
            optimizer.register_step_post_hook(self._tell),
        ]

    def remove(self) -> None:
        """Stops watching."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @torch.no_grad()
    def _look(self, optimizer: Optimizer, arguments: Any, named: Any) -> None:
        self._before = copies(optimizer) if self.seen % self.every == 0 else {}

    @torch.no_grad()
    def _tell(self, optimizer: Optimizer, arguments: Any, named: Any) -> None:
        step, before = self.step, self._before
        self.step, self.seen, self._before = step + 1, self.seen + 1, {}
        if before:
            names = self.names if before.keys() <= self.names.keys() else names_of(optimizer) | self.names
            layers = measured(optimizer, before, names, self.norms)
            of_layers = {
                f"{layer}/{key}": value for layer, measures in layers.items() for key, value in measures.items()
            }
            self.log({"step": step, **plain(of_layers | _of_groups(optimizer))})


def plain(metrics: Mapping[str, Tensor | float]) -> dict[str, float]:
    """Metrics as Python numbers; one read for each device."""
    numbers = {key: value for key, value in metrics.items() if not isinstance(value, Tensor)}
    tensors = {key: value for key, value in metrics.items() if isinstance(value, Tensor)}
    for device in {t.device for t in tensors.values()}:
        on_device = {key: t for key, t in tensors.items() if t.device == device}
        read = torch.stack([t.reshape(()).double() for t in on_device.values()]).tolist()
        numbers |= dict(zip(on_device, read, strict=True))
    return {key: numbers[key] for key in metrics}


def _of_groups(optimizer: Optimizer) -> dict[str, Tensor | float]:
    of_groups: dict[str, Tensor | float] = {
        f"groups/{i}/lr": group["lr"] for i, group in enumerate(optimizer.param_groups)
    }
    if isinstance(optimizer, MatrixOptimizer):
        for key, value in optimizer.metrics().items():
            if value.ndim == 0:
                of_groups[key if key.startswith("skipped/") else f"groups/{key}"] = value
    return of_groups
