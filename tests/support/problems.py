"""Small problems, recipes and references that several test modules share; fp64 unless they say otherwise."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from steepest.matrices import Piece
from steepest.parts import Diagonal, Hyper, Momentum, Sign, Spectral
from steepest.recipe import ADAMW, Recipe, State, step_one
from steepest.state_layout import piece_view
from support.references import gap as gap
from support.references import gaussian as gaussian
from support.references import polar_by_svd as polar_by_svd

#: Property tests: few examples, the same ones every time.
FEW = settings(max_examples=25, deadline=None, derandomize=True, database=None)

SVD = Spectral("svd")
ADAM_AVERAGE = Momentum(bias_correction=True)

#: Table 1 of arXiv:2510.10777 as far as the parts reach, with the exact polar factor.
RECIPES = {
    "sgd": Recipe(momentum=Momentum("heavy_ball"), scale="dual"),
    "sgd_nesterov": Recipe(momentum=Momentum("heavy_ball", nesterov=True), scale="dual"),
    "normalized_sgd": Recipe(),
    "sign_sgd": Recipe(direction=Sign()),
    "adamw": ADAMW,
    "adagrad": Recipe(precondition=Diagonal(0.25, "sum", False, False), scale="dual"),
    "madgrad_power": Recipe(ADAM_AVERAGE, Diagonal(1 / 6, eps_inside=False), scale="dual"),
    "adam_sania": Recipe(ADAM_AVERAGE, Diagonal(0.5, eps_inside=False), scale="dual"),
    "muon": Recipe(Momentum(nesterov=True), direction=SVD, adjust_lr="original"),
    "muadam": Recipe(ADAM_AVERAGE, Diagonal(0.25), SVD, adjust_lr="original"),
    "muadam_sania": Recipe(ADAM_AVERAGE, Diagonal(0.5), SVD, adjust_lr="original"),
}


def uniform(*shape: int, low: float, high: float, seed: int) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- parameters of every shape class ------------------------------------------------------------------------------

#: shape class: parameter shape, how it is read as matrices
SHAPES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "tall": ((7, 3), {}),
    "wide": ((3, 7), {}),
    "square": ((5, 5), {}),
    "row": ((1, 6), {}),
    "column": ((6, 1), {}),
    "conv": ((4, 3, 2, 2), {}),
    "heads": ((6, 5), {"num_heads": 2}),
    "experts": ((3, 4, 5), {"batch_dims": 1}),
    "split": ((9, 4), {"split_sizes": (4, 3, 2)}),
    "split experts": ((2, 8, 3), {"batch_dims": 1, "split_sizes": (4, 4), "num_heads": 2}),
    "empty": ((0, 4), {}),
}
#: `plan` against `step_one`: a spectral direction magnifies a rounding error by a condition number, about ten here.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def refer(
    recipe: Recipe, hyper: Hyper, p: Tensor, g: Tensor, state: State, parts: tuple[Piece, ...]
) -> tuple[Tensor, State]:
    """`step_one` on every matrix of a parameter; a gradient that is not finite anywhere stops all of them."""
    p, fresh = p.clone(), {key: t.clone() for key, t in state.items()}
    if not torch.isfinite(g).all():
        return p, fresh
    layouts = recipe.layouts
    for number, piece in enumerate(parts):

        def part(key: str, t: Tensor, number: int = number) -> Tensor:
            return piece_view(layouts.get(key, "factor"), t, parts, number)

        own = {key: part(key, t) for key, t in state.items()}
        whole = {key for key, layout in layouts.items() if layout == "elementwise" and state[key].shape == p.shape}
        own |= {key: t.reshape(piece.shape) for key, t in own.items() if key in whole}
        own |= {key: t.flatten() for key, t in own.items() if layouts.get(key) in ("row", "matrix")}
        w, after = step_one(recipe, *(piece.view(t).reshape(piece.shape) for t in (p, g)), own, hyper)
        for key, t in after.items():
            target = part(key, fresh[key])
            target.copy_(t.reshape(target.shape))
        piece.view(p).copy_(w.reshape(piece.view(p).shape))
    return p, fresh


# ---- a two-layer network in which every weight may be read in other variables ------------------------------------

Change = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Network:
    """f(W1, W2) = cross entropy of W2 tanh(W1 x), a fresh minibatch a step: noisy, smooth, no exact zeros."""

    inputs: int = 8
    hidden: int = 12
    classes: int = 5
    batch: int = 32

    def start(self) -> list[Tensor]:
        return [gaussian(self.hidden, self.inputs, seed=1) / 3, gaussian(self.classes, self.hidden, seed=2) / 3]

    def loss(self, weights: Sequence[Tensor], step: int) -> Tensor:
        x = gaussian(self.batch, self.inputs, seed=100 + step)
        logits = torch.tanh(x @ weights[0].mT) @ weights[1].mT
        target = (x[:, : self.classes] + gaussian(self.batch, self.classes, seed=500 + step)).argmax(dim=1)
        return torch.nn.functional.cross_entropy(logits, target)

    def train(
        self,
        make: Callable[[list[Tensor]], torch.optim.Optimizer],
        *,
        steps: int = 60,
        read: Change = lambda w, i: w,
        write: Change = lambda w, i: w,
        loss_scale: float = 1.0,
    ) -> list[Tensor]:
        """The weights of f after training f(read(W')) from write(W_0); `write` inverts `read`."""
        weights = [torch.nn.Parameter(write(w, i).clone()) for i, w in enumerate(self.start())]
        optimizer = make(weights)
        for step in range(steps):
            optimizer.zero_grad()
            (loss_scale * self.loss([read(w, i) for i, w in enumerate(weights)], step)).backward()
            optimizer.step()
        return [read(w.detach(), i) for i, w in enumerate(weights)]


class RecipeOptimizer(torch.optim.Optimizer):
    """`step_one` as an optimizer, so that a recipe without a named class can train."""

    def __init__(self, params: list[Tensor], recipe: Recipe, hyper: Hyper) -> None:
        self.recipe, self.hyper = recipe, hyper
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for p in self.param_groups[0]["params"]:
            state = self.state[p] or self.recipe.init(p.grad)
            w, self.state[p] = step_one(self.recipe, p, p.grad, state, self.hyper)
            p.copy_(w)


# ---- LIBSVM mushrooms --------------------------------------------------------------------------------------------


def mushrooms() -> tuple[Tensor, Tensor]:
    """(8124, 112) features in {0, 1} and 8124 labels in {0, 1}; skips the test where the file is absent."""
    default = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "mushrooms.svm"
    path = Path(os.environ.get("STEEPEST_DATA", default))
    path = path / "mushrooms.svm" if path.is_dir() else path
    if not path.is_file():
        pytest.skip(f"no LIBSVM mushrooms at {path}: download it there or set STEEPEST_DATA")
    rows = [line.split() for line in path.read_text().splitlines() if line.strip()]
    x = torch.zeros(len(rows), 112, dtype=torch.float64)
    for i, row in enumerate(rows):
        for entry in row[1:]:
            column, value = entry.split(":")
            x[i, int(column) - 1] = float(value)
    labels = torch.tensor([float(row[0]) for row in rows])
    return x, (labels == labels.max()).long()


def minibatches(count: int, size: int, steps: int, seed: int = 0) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield torch.randint(count, (size,), generator=generator)
