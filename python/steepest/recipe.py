"""A method is a choice of parts; `step_one` is the whole algorithm.

    m  = momentum(G)             what is remembered
    P.observe(G)                 statistics, from the raw gradient
    x  = P.into(m)               to the variables in which the norm is the base norm
    d  = direction(x)            steepest there, of length 1 ("lmo") or of length dual_norm(x) ("dual")
    u  = P.back(d)               back to the weight's variables
    W <- decay(W) - lr ratio(m, n) u

This is Algorithm 1 of arXiv:2510.10777 with the two step types of its section 2: "lmo" is constrained steepest descent
(Muon, SignSGD, MuAdam), "dual" the regularized one (SGD, Adam). `step_one` is the reference: plain torch, any dtype,
nothing in place. `plan.Plan` does the same for all parameters at once and must agree with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .parts import Decay, Diagonal, Direction, Frobenius, Hyper, Identity, Momentum, Precondition, Rounding, shape_ratio
from .parts.precondition import State

__all__ = ["ADAMW", "Recipe", "State", "adamw", "all_finite", "step_one"]


@dataclass(frozen=True)
class Recipe:
    """The parts of a method. Frozen and hashable: two equal recipes are one program."""

    momentum: Momentum = Momentum()
    precondition: Precondition = Identity()
    direction: Direction = Frobenius()
    scale: Literal["lmo", "dual"] = "lmo"
    adjust_lr: str = "none"
    decay: Decay = Decay()
    rounding: Rounding = Rounding()

    def __post_init__(self) -> None:
        if self.scale not in ("lmo", "dual"):
            raise ValueError(f"scale {self.scale!r} is not known; use 'lmo' (length lr in the norm) or 'dual'")
        shape_ratio(self.adjust_lr, 1, 1)

    @property
    def counts_steps(self) -> bool:
        """Whether the state holds a step count t."""
        return self.momentum.bias_correction or self.precondition.counts_steps or self.rounding.counts_steps

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the state tensors, in a fixed order."""
        own = (self.momentum.key, *self.precondition.keys, *self.rounding.keys)
        return (*own, "step") if self.counts_steps else own

    def init(self, w: Tensor, g: Tensor | None = None) -> State:
        """State of weight w before its first gradient, whose dtype g has (None: that of w); `step` is 0-d fp32."""
        g = w if g is None else g
        state = {self.momentum.key: self.momentum.init(g), **self.precondition.init(g), **self.rounding.init(w)}
        if self.counts_steps:
            state["step"] = torch.zeros((), dtype=torch.float32, device=g.device)
        return state

    def observe(self, state: State, g: Tensor, hyper: Hyper) -> State:
        """The state after gradient g, in the state's dtypes; what belongs to the stored weight is not in it."""
        m = state[self.momentum.key]
        fresh = {self.momentum.key: self.momentum.observe(m, g, hyper.beta1).to(m.dtype)}
        fresh |= self.precondition.observe(state, g, hyper)
        if self.counts_steps:
            fresh["step"] = state["step"] + 1
        return fresh

    def into(self, state: State, g: Tensor, hyper: Hyper) -> Tensor:
        """What the direction is asked about: the momentum in the preconditioner's variables."""
        step = state.get("step")
        m = self.momentum.read(state[self.momentum.key], g, hyper.beta1, step)
        return self.precondition.into(state, m, hyper, step)

    def towards(self, x: Tensor) -> Tensor:
        """The step in the preconditioner's variables, before the learning rate."""
        return self.direction.unit(x) if self.scale == "lmo" else self.direction.scaled(x)

    def back(self, state: State, d: Tensor, hyper: Hyper) -> Tensor:
        return self.precondition.back(state, d, hyper, state.get("step"))


def all_finite(g: Tensor) -> Tensor:
    """0-d bool on g's device: whether every entry is finite."""
    return torch.isfinite(torch.stack(torch.aminmax(g))).all() if g.numel() else g.new_ones((), dtype=torch.bool)


def step_one(recipe: Recipe, w: Tensor, g: Tensor, state: State, hyper: Hyper) -> tuple[Tensor, State]:
    """One step for one weight (..., m, n): (new weight, new state), inputs untouched.

    A gradient that is not finite leaves the weight and its state as they were.
    """
    finite = all_finite(g)
    fresh = recipe.observe(state, g, hyper)
    value = recipe.rounding.value(w, state)
    x = recipe.into(fresh, g, hyper).to(value.dtype)
    u = recipe.back(fresh, recipe.towards(x), hyper)
    step = hyper.lr * shape_ratio(recipe.adjust_lr, *w.shape[-2:])
    moved = recipe.decay.apply(value, u.to(value.dtype), hyper.lr * hyper.weight_decay, step)
    stored, left_over = recipe.rounding.store(moved, w.dtype, fresh.get("step"), (0, 0, 0))
    fresh |= left_over
    kept = {key: torch.where(finite, fresh.get(key, state[key]), state[key]) for key in state}
    return torch.where(finite, stored, w), kept


def adamw(dtype: torch.dtype | None = None, decay: Decay = Decay(), rounding: Rounding = Rounding()) -> Recipe:
    """AdamW (arXiv:1711.05101) as a recipe: what every parameter that is not a matrix gets. dtype: of its momentum."""
    return Recipe(
        momentum=Momentum(bias_correction=True, key="exp_avg", dtype=dtype),
        precondition=Diagonal(power=0.25, eps_inside=False),
        direction=Frobenius(),
        scale="dual",
        decay=decay,
        rounding=rounding,
    )


ADAMW = adamw()
