"""What the optimizers are compared on: a model from a seed, batches in a fixed order, and what is held out.

    gpt                 next byte of a text: a small GPT, fp32; embeddings, head and norms go to AdamW
    mushrooms           112-10-2 network with ReLU on binary features, fp64; both matrices go to the method
    mushrooms-scaled    the same function of features multiplied by s = exp(U[0, 20]), started at W_1 / s

The last two differ in the variables only: a scale-invariant method has the same losses in both. This is the experiment
on scale invariance of arXiv:2510.10777, with the initial point carried along.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from . import mushrooms, text
from .gpt import GPT, Shape

Batch = tuple[Tensor, Tensor]

NAMES = ("gpt", "mushrooms", "mushrooms-scaled")
HIDDEN = 10
LARGEST_EXPONENT = 20.0
HELD_OUT_SEED = 20_261_010  # what is held out is the same for every seed


@dataclass(frozen=True)
class Size:
    """How much is computed: model and batch of the GPT, rows of a mushrooms batch, steps of each, learning rates."""

    shape: Shape = field(default_factory=lambda: Shape(layers=2, width=64, heads=2, context=64))
    windows: int = 16
    held_out_windows: int = 128
    rows: int = 128
    gpt_steps: int = 200
    mushrooms_steps: int = 300
    rates: int = 5
    evaluations: int = 20


FULL = Size(Shape(), windows=32)
QUICK = Size(Shape(layers=1, width=32, heads=2, context=32), 8, 64, 64, 40, 60, 3, 10)


@dataclass(frozen=True)
class Task:
    """create(seed) is the model; batches(steps, seed) what it sees; routed: whether a method is given the module.

    described: what results depend on besides method, learning rate, steps and seed.
    """

    name: str
    described: str
    steps: int
    create: Callable[[int], nn.Module]
    batches: Callable[[int, int], Iterator[Batch]]
    held_out: Sequence[Batch]
    routed: bool

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross entropy, 0-d."""
        return cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> float:
        """Mean loss over what is held out."""
        rows = sum(len(batch[0]) for batch in self.held_out)
        return sum(float(self.loss(model, batch)) * len(batch[0]) for batch in self.held_out) / rows


def make(names: Sequence[str], size: Size, book: Path | None, table: Path | None) -> dict[str, Task]:
    """The tasks of these names; ValueError for an unknown one and for files that are none."""
    for name in names:
        if name not in NAMES:
            raise ValueError(f"--tasks: unknown task {name!r}; pass some of {', '.join(NAMES)}")
    tasks: dict[str, Task] = {}
    if "gpt" in names:
        tasks["gpt"] = _gpt(text.load(book, size.shape.context), size)
    if any(name != "gpt" for name in names):
        data = mushrooms.load(table)
        exponents = torch.rand(mushrooms.FEATURES, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        scales: Mapping[str, Tensor] = {
            "mushrooms": torch.ones_like(exponents),
            "mushrooms-scaled": (LARGEST_EXPONENT * exponents).exp(),
        }
        tasks |= {name: _mushrooms(name, data, scale, size) for name, scale in scales.items() if name in names}
    return {name: tasks[name] for name in names}


def _gpt(corpus: text.Corpus, size: Size) -> Task:
    context = size.shape.context
    held_out = text.windows(
        corpus.validation, size.held_out_windows, context, torch.Generator().manual_seed(HELD_OUT_SEED)
    )

    def batches(steps: int, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            yield text.windows(corpus.train, size.windows, context, generator)

    shape = size.shape
    return Task(
        "gpt",
        f"{shape.layers}x{shape.width} GPT, {size.windows} x {context} bytes of {corpus}",
        size.gpt_steps,
        lambda seed: GPT.create(size.shape, seed),
        batches,
        list(zip(held_out[0].split(size.windows), held_out[1].split(size.windows), strict=True)),
        routed=True,
    )


def _mushrooms(name: str, data: mushrooms.Table, scale: Tensor, size: Size) -> Task:
    x = data.x * scale
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(HELD_OUT_SEED))
    training, held_out = order.split([len(x) - 3 * len(x) // 10, 3 * len(x) // 10])

    def create(seed: int) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        first, second = (
            nn.Linear(n, m, bias=False, dtype=torch.float64) for n, m in ((len(scale), HIDDEN), (HIDDEN, 2))
        )
        with torch.no_grad():
            for layer in (first, second):
                layer.weight.normal_(generator=generator).div_(layer.in_features**0.5)
            first.weight.div_(scale)
        return nn.Sequential(first, nn.ReLU(), second)

    def batches(steps: int, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            rows = training[torch.randint(len(training), (size.rows,), generator=generator)]
            yield x[rows], data.y[rows]

    described = f"{len(scale)}-{HIDDEN}-2 network, {size.rows} of {data}"
    return Task(name, described, size.mushrooms_steps, create, batches, [(x[held_out], data.y[held_out])], routed=False)
