"""What the optimizers are compared on: a model from a seed, batches in a fixed order, and what is held out.

    gpt                 next byte of a text: a small GPT, fp32; embeddings, head and norms go to AdamW
    gpt-small-batch     the same with an eighth of the batch
    gpt-fine-tune       the same, started where AdamW ended on that text, on another: the English of Python's manual
    mushrooms           112-10-2 network with ReLU on binary features, fp64; both matrices go to the method
    mushrooms-scaled    the same function of features multiplied by s = exp(U[0, 20]), started at W_1 / s
    images              shapes in made-up images: a small convolutional net, fp32; norms and head go to AdamW

The mushrooms differ in the variables only: a scale-invariant method has the same losses in both. This is the experiment
on scale invariance of arXiv:2510.10777, with the initial point carried along.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR

from . import images, mushrooms, text
from .gpt import GPT, Shape

Batch = tuple[Tensor, Tensor]

GPTS = ("gpt", "gpt-small-batch", "gpt-fine-tune")
MUSHROOMS = ("mushrooms", "mushrooms-scaled")
NAMES = (GPTS[0], *MUSHROOMS, *GPTS[1:], "images")
HIDDEN = 10
LARGEST_EXPONENT = 20.0
HELD_OUT_SEED = 20_261_010  # what is held out is the same for every seed
PRETRAINING_SEED = 20_261_011
PRETRAINING_RATE = 4e-3
TRAINING_IMAGES = 8192


@dataclass(frozen=True)
class Size:
    """How much is computed: models, windows, rows and images of a batch, steps of each task, learning rates."""

    tasks: Sequence[str] = (GPTS[0], *MUSHROOMS)
    shape: Shape = field(default_factory=lambda: Shape(layers=2, width=64, heads=2, context=64))
    windows: int = 16
    held_out_windows: int = 128
    rows: int = 128
    width: int = 16
    images: int = 64
    held_out_images: int = 1024
    gpt_steps: int = 200
    pretraining_steps: int = 400
    fine_tuning_steps: int = 60
    mushrooms_steps: int = 300
    image_steps: int = 200
    rates: int = 5
    evaluations: int = 20


DEMO = Size(shape=Shape(), windows=32)  # the GPT of `make demo`
FULL = Size(
    tasks=("gpt", "images", "gpt-fine-tune", "gpt-small-batch"),
    shape=Shape(layers=2, width=48, heads=2, context=32),
    images=32,
    held_out_images=512,
    gpt_steps=100,
    fine_tuning_steps=40,
    image_steps=100,
    evaluations=10,
)
QUICK = Size(
    shape=Shape(layers=1, width=32, heads=2, context=32),
    windows=8,
    held_out_windows=64,
    rows=64,
    width=8,
    images=16,
    held_out_images=256,
    gpt_steps=40,
    pretraining_steps=40,
    fine_tuning_steps=20,
    mushrooms_steps=60,
    image_steps=40,
    rates=3,
    evaluations=10,
)


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
    made = {**_gpts(names, size, book), **_tables(names, size, table)}
    if "images" in names:
        made["images"] = _images(size)
    return {name: made[name] for name in names}


def _gpts(names: Sequence[str], size: Size, book: Path | None) -> dict[str, Task]:
    wanted = [name for name in GPTS if name in names]
    if not wanted:
        return {}
    corpus = text.load(book, size.shape.context)

    def create(seed: int) -> nn.Module:
        return GPT.create(size.shape, seed)

    made = {
        "gpt": _gpt("gpt", corpus, size, size.windows, create),
        "gpt-small-batch": _gpt("gpt-small-batch", corpus, size, max(1, size.windows // 8), create),
    }
    if "gpt-fine-tune" in wanted:
        made["gpt-fine-tune"] = _fine_tuning(made["gpt"], text.manual(size.shape.context), size)
    return made


def _gpt(name: str, corpus: text.Corpus, size: Size, count: int, create: Callable[[int], nn.Module]) -> Task:
    """A batch has `count` windows."""
    context = size.shape.context
    held_out = text.windows(
        corpus.validation, size.held_out_windows, context, torch.Generator().manual_seed(HELD_OUT_SEED)
    )

    def batches(steps: int, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            yield text.windows(corpus.train, count, context, generator)

    shape = size.shape
    return Task(
        name,
        f"{shape.layers}x{shape.width} GPT, {count} x {context} bytes of {corpus}",
        size.gpt_steps,
        create,
        batches,
        list(zip(held_out[0].split(size.windows), held_out[1].split(size.windows), strict=True)),
        routed=True,
    )


def _fine_tuning(before: Task, corpus: text.Corpus, size: Size) -> Task:
    """Every seed starts from the same weights, which AdamW has trained on the text of the task before."""

    @functools.cache
    def trained() -> nn.Module:
        model = before.create(PRETRAINING_SEED)
        optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAINING_RATE, weight_decay=0.0)
        steps = size.pretraining_steps
        schedule = LambdaLR(optimizer, lambda step: 1 - step / steps)
        for batch in before.batches(steps, PRETRAINING_SEED):
            optimizer.zero_grad()
            before.loss(model, batch).backward()
            optimizer.step()
            schedule.step()
        return model.requires_grad_(True)

    task = _gpt("gpt-fine-tune", corpus, size, size.windows, lambda seed: copy.deepcopy(trained()))
    described = f"{task.described}, after {size.pretraining_steps} steps of AdamW on {before.described}"
    return replace(task, steps=size.fine_tuning_steps, described=described)


def _images(size: Size) -> Task:
    training, held_out = images.made_up(TRAINING_IMAGES), images.made_up(size.held_out_images, HELD_OUT_SEED)

    def batches(steps: int, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            chosen = torch.randint(len(training.x), (size.images,), generator=generator)
            yield training.x[chosen], training.y[chosen]

    return Task(
        "images",
        f"{size.width}-{2 * size.width}-{4 * size.width} convolutional net, {size.images} of {training}",
        size.image_steps,
        lambda seed: images.ConvNet.create(size.width, seed),
        batches,
        list(zip(held_out.x.split(256), held_out.y.split(256), strict=True)),
        routed=True,
    )


def _tables(names: Sequence[str], size: Size, table: Path | None) -> dict[str, Task]:
    wanted = [name for name in MUSHROOMS if name in names]
    if not wanted:
        return {}
    data = mushrooms.load(table)
    exponents = torch.rand(mushrooms.FEATURES, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    scales: Mapping[str, Tensor] = {
        "mushrooms": torch.ones_like(exponents),
        "mushrooms-scaled": (LARGEST_EXPONENT * exponents).exp(),
    }
    return {name: _mushrooms(name, data, scales[name], size) for name in wanted}


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
