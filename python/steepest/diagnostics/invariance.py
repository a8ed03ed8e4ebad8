"""Does training notice that the weights are written in other variables?

The model f(W) and its twin f(read(W')), started at W'_0 = read^-1(W_0), see the same batches. A method is invariant to
the change when read(W'_t) = W_t for all t: its result does not depend on the units of features and layers.

    scale     read(W') = A o W', A > 0 entry by entry      MuAdamSANIA with eps=0
    affine    read(W') = L W' R, L and R invertible        Muon and SGD for orthogonal L and R

Both are compared through `read`, so that rounding is the only other source of a gap. Source: arXiv:2510.10777,
Theorem 2.4 and the corollary on MuAdam-SANIA.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

MakeOptimizer = Callable[[nn.Module], Optimizer]
Loss = Callable[[nn.Module, Any], Tensor]
Chosen = Callable[[str, Tensor], bool]


@dataclass(frozen=True)
class Change:
    """`read` gives the weight from the twin's, `write` the twin's from the weight."""

    read: Callable[[Tensor], Tensor]
    write: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Changes:
    """Which weights are written in other variables, and in which.

    change: makes a `Change` of a weight, from random numbers.   changeable: which weights it can be made of.
    only: which of them; None: all but those that the optimizer leaves to AdamW.   seed: of these and of both runs.
    """

    change: Callable[[Tensor, torch.Generator], Change]
    changeable: Callable[[Tensor], bool]
    only: Chosen | None
    seed: int

    def of(self, weights: Mapping[str, Tensor], of_adamw: set[Tensor]) -> dict[str, Change]:
        """The changes by the names of the weights; ValueError where there are none."""
        generator = torch.Generator().manual_seed(self.seed)
        changes = {
            name: self.change(p.detach(), generator)
            for name, p in weights.items()
            if self.changeable(p) and (p not in of_adamw if self.only is None else self.only(name, p))
        }
        if not changes:
            raise ValueError(
                "no parameter would be written in other variables: say which with only=lambda name, p: ..."
            )
        return changes


@dataclass(frozen=True)
class Gap:
    """How far the twin went from the model.

    losses: largest relative difference of two losses at the same step.
    weights: largest difference of each parameter after the last step, relative to its largest entry.
    moved: how far training moved the changed weights, measured alike: a gap of 0 means something only beside it.
    changed: names of the parameters that were written in other variables.
    """

    losses: float
    weights: Mapping[str, float]
    moved: float
    changed: tuple[str, ...]

    @property
    def worst(self) -> float:
        """The largest of all gaps; NaN where a loss or a weight is not finite."""
        values = [self.losses, *self.weights.values()]
        return math.nan if any(map(math.isnan, values)) else max(values)


def check_scale_invariance(
    make_model: Callable[[], nn.Module],
    make_optimizer: MakeOptimizer,
    loss: Loss,
    batches: Sequence[Any],
    *,
    spread: float = 10.0,
    only: Chosen | None = None,
    seed: int = 0,
) -> Gap:
    """Trains a model and its twin with W = A o W', log A uniform in [0, spread]; one step a batch.

    loss(model, batch) is a 0-d tensor. only(name, parameter): what to write in other variables (None: parameters of two
    dimensions and more, without those that the optimizer leaves to AdamW). In fp64 an invariant method has a gap of
    about 1e-14 times the condition of the training, others are above 1e-2; fp32 blurs both. Both runs draw the same
    random numbers. The method must read gradients only: one that watches layers from outside (KFAC) is not told of the
    change. ValueError where nothing would be changed, and without batches.
    """

    def change(w: Tensor, generator: torch.Generator) -> Change:
        a = (spread * torch.rand(w.shape, generator=generator, dtype=torch.float64)).exp().to(w)
        return Change(lambda x: x * a, lambda x: x / a)

    changes = _Changes(change, lambda p: p.ndim >= 2, only, seed)
    return _gap(make_model, make_optimizer, loss, batches, changes)


def check_affine_invariance(
    make_model: Callable[[], nn.Module],
    make_optimizer: MakeOptimizer,
    loss: Loss,
    batches: Sequence[Any],
    *,
    condition: float = 1.0,
    only: Chosen | None = None,
    seed: int = 0,
) -> Gap:
    """Trains a model and its twin with W = L W' R for random L and R of this condition number; 1: orthogonal.

    Other arguments, and what is said there, as in `check_scale_invariance`; only matrices are changed. ValueError for a
    condition below 1.
    """
    if not condition >= 1:
        raise ValueError(f"condition should be at least 1 but is: {condition}")

    def change(w: Tensor, generator: torch.Generator) -> Change:
        left, right = (_random_matrix(n, condition, generator).to(w) for n in w.shape)
        inverse_left, inverse_right = torch.linalg.inv(left), torch.linalg.inv(right)
        return Change(lambda x: left @ x @ right, lambda x: inverse_left @ x @ inverse_right)

    changes = _Changes(change, lambda p: p.ndim == 2, only, seed)
    return _gap(make_model, make_optimizer, loss, batches, changes)


class _Loss(nn.Module):
    """The loss as a module, whose parameters `functional_call` exchanges."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Any) -> Tensor:
        return self.loss(self.model, batch)


def _gap(
    make_model: Callable[[], nn.Module],
    make_optimizer: MakeOptimizer,
    loss: Loss,
    batches: Sequence[Any],
    changes: _Changes,
) -> Gap:
    if not len(batches):
        raise ValueError("there are no batches to train on: give one for each step")
    model, twin = make_model(), make_model()
    twin.load_state_dict(model.state_dict())
    optimizer, other = make_optimizer(model), make_optimizer(twin)
    weights, twin_weights = dict(model.named_parameters()), dict(twin.named_parameters())
    changed = changes.of(weights, _of_adamw(optimizer))
    start = {name: weights[name].detach().clone() for name in changed}
    with torch.no_grad():
        for name, change in changed.items():
            twin_weights[name].copy_(change.write(weights[name]))

    def twin_loss(_: nn.Module, batch: Any) -> Tensor:
        read = {f"model.{name}": change.read(twin_weights[name]) for name, change in changed.items()}
        return functional_call(_Loss(twin, loss), read, (batch,))

    losses = _train(model, optimizer, loss, batches, changes.seed)
    twin_losses = _train(twin, other, twin_loss, batches, changes.seed)
    with torch.no_grad():
        read = {name: changed[name].read(p) if name in changed else p for name, p in twin_weights.items()}
        gaps = {name: _relative(read[name], p) for name, p in weights.items()}
        moved = max(_relative(start[name], weights[name]) for name in changed)
    differences = [abs(a - b) / abs(b) if b else abs(a) for a, b in zip(twin_losses, losses, strict=True)]
    return Gap(math.nan if any(map(math.isnan, differences)) else max(differences), gaps, moved, tuple(changed))


def _train(model: nn.Module, optimizer: Optimizer, loss: Loss, batches: Sequence[Any], seed: int) -> list[float]:
    """The losses before each step."""
    losses: list[float] = []
    gpus = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(gpus, device_type="cuda"):
        torch.manual_seed(seed)
        for batch in batches:

            def closure(batch: Any = batch) -> float:
                optimizer.zero_grad()
                value = loss(model, batch)
                value.backward()
                return value.detach()  # type: ignore[return-value]

            losses.append(float(optimizer.step(closure)))  # type: ignore[arg-type]
    return losses


def _of_adamw(optimizer: Optimizer) -> set[Tensor]:
    """The parameters that a matrix method's groups leave to AdamW."""
    return {p for group in optimizer.param_groups if group.get("use_muon") is False for p in group["params"]}


def _relative(value: Tensor, wanted: Tensor) -> float:
    if not wanted.numel():
        return 0.0
    largest = wanted.detach().double().abs().amax().clamp(min=torch.finfo(torch.float64).tiny)
    return float((value.detach().double() - wanted.detach().double()).abs().amax() / largest)


def _random_matrix(n: int, condition: float, generator: torch.Generator) -> Tensor:
    """Q1 diag(s) Q2 with log s uniform in the range that the condition number leaves."""
    q1, q2 = (torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q for _ in range(2))
    s = condition ** (torch.rand(n, generator=generator, dtype=torch.float64) - 0.5)
    return (q1 * s) @ q2
