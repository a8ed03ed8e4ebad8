"""A method is a choice of parts; `step_one` is the whole algorithm.

    m  = momentum(G)             what is remembered
    P.observe(G)                 statistics, from the raw gradient
    x  = P.into(m)               to the variables in which the norm is the base norm
    d  = direction(x)            steepest there, of length 1 ("lmo") or of length dual_norm(x) ("dual")
    u  = P.back(d)               back to the weight's variables, as long as the graft's update where there is one
    W <- decay(W) - lr scale ratio(m, n) u      scale: 1 but where layers are coupled
    P.learn(G), P.refresh()      factors, and now and then what is made of them, where P has any: before or after

This is Algorithm 1 of arXiv:2510.10777 with the two step types of its section 2: "lmo" is constrained steepest descent
(Muon, SignSGD, MuAdam), "dual" the regularized one (SGD, Adam). `step_one` is the reference: plain torch, any dtype,
nothing in place. `plan.Plan` does the same for all parameters at once and must agree with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .parts import (
    Decay,
    Diagonal,
    Direction,
    Frobenius,
    Hyper,
    Identity,
    Momentum,
    Precondition,
    Rounding,
    shape_ratio,
)
from .parts.precondition import Kronecker, Phase, State

__all__ = ["ADAMW", "CLOCK", "Recipe", "State", "adamw", "all_finite", "step_one"]

CLOCK = "clock"  # steps that factors have seen: int64 on the host, where it is decided when to refresh


@dataclass(frozen=True)
class Recipe:
    """The parts of a method. Frozen and hashable: two equal recipes are one program.

    scale: "lmo", "dual", or "within": the ball's point nearest to the minimiser, which a model with `Decay.inside` has.
    graft: every matrix's update is made as long, in the Frobenius norm, as what this preconditioner alone would give.
    coupled: its step waits for a number that all layers give: `Hyper.scale`, or the learning rate.
    """

    momentum: Momentum = Momentum()
    precondition: Precondition = Identity()
    direction: Direction = Frobenius()
    scale: Literal["lmo", "dual", "within"] = "lmo"
    adjust_lr: str = "none"
    decay: Decay = Decay()
    rounding: Rounding = Rounding()
    graft: Diagonal | None = None
    coupled: bool = False

    def __post_init__(self) -> None:
        if self.scale not in ("lmo", "dual", "within"):
            raise ValueError(f"scale {self.scale!r} is not known; use 'lmo' (length lr in the norm) or 'dual'")
        if self.scale == "within" and not (self.decay.inside and isinstance(self.precondition, Identity)):
            raise ValueError("scale 'within' is for weight decay inside the model and no preconditioner")
        shape_ratio(self.adjust_lr, 1, 1)
        if self.graft is not None and self.graft.key in self.precondition.keys:
            raise ValueError(
                f"the graft keeps its second moment under {self.graft.key!r}, which is taken; name another"
            )

    @property
    def counts_steps(self) -> bool:
        """Whether the state holds a step count t."""
        parts = (self.precondition, self.rounding, *(() if self.graft is None else (self.graft,)))
        return self.momentum.counts_steps or any(part.counts_steps for part in parts)

    @property
    def kronecker(self) -> Kronecker | None:
        """The preconditioner, where it has Kronecker factors."""
        return self.precondition if isinstance(self.precondition, Kronecker) else None

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the state tensors of a single matrix, in a fixed order."""
        own = (self.momentum.key, *self.precondition.keys, *self.rounding.keys)
        own += () if self.graft is None else self.graft.keys
        own += (CLOCK,) if self.kronecker is not None else ()
        return (*own, "step") if self.counts_steps else own

    @property
    def by_matrix(self) -> bool:
        """Whether a step needs to know the matrices of a weight before and after its direction."""
        return self.kronecker is not None or self.graft is not None

    def input_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Of what the direction is given for (batch, m, n)."""
        return shape if self.kronecker is None else self.kronecker.input_shape(shape)

    def names(self, piece: int) -> dict[str, str]:
        """Keys of Kronecker factors and all that goes with them, and the names they have in the state of a parameter.

        Elementwise state is the whole parameter's. Factors belong to matrices of one shape: a second piece has its own.
        """
        own = () if self.kronecker is None else self.kronecker.keys
        return {key: f"{key}.{piece}" if piece else key for key in own}

    def init(self, w: Tensor, g: Tensor | None = None, matrices: Sequence[Tensor] | None = None) -> State:
        """State of weight w before its first gradient, whose dtype g has (None: that of w); `step` is 0-d fp32.

        matrices: tensors (batch, m, n) of g's dtype, one for each piece that w is read as; None: w is one, (..., m, n).
        """
        g = w if g is None else g
        state = {self.momentum.key: self.momentum.init(g), **self.rounding.init(w)}
        if self.graft is not None:
            state |= self.graft.init(g)
        if self.kronecker is None:
            state |= self.precondition.init(g)
        else:
            state[CLOCK] = torch.zeros((), dtype=torch.int64)
            for number, matrix in enumerate([_matrices(g)] if matrices is None else matrices):
                own = self.kronecker.init(matrix)
                state |= {name: own[key] for key, name in self.names(number).items()}
        if self.counts_steps:
            state["step"] = torch.zeros((), dtype=torch.float32, device=g.device)
        return state

    def phase(self, state: State) -> Phase:
        """What a step from this state does; reads the host only."""
        return Phase() if self.kronecker is None else self.kronecker.phase(int(state[CLOCK]))

    def observe(self, state: State, g: Tensor, hyper: Hyper) -> State:
        """The state after gradient g but for factors, in the state's dtypes; the stored weight's part is not in it."""
        m = state[self.momentum.key]
        if self.momentum.start == "first":
            hyper = hyper.beginning(state["step"])
        fresh = {}
        if self.momentum.of == "gradients":
            fresh[self.momentum.key] = self.momentum.observe(m, g, hyper.beta1).to(m.dtype)
        for part in (self.graft, None if self.kronecker is not None else self.precondition):
            fresh |= {} if part is None else part.observe(state, g, hyper)
        if self.counts_steps:
            fresh["step"] = state["step"] + 1
        return fresh

    def momentum_of(self, state: State, g: Tensor, hyper: Hyper) -> Tensor:
        """What the momentum reads, in the weight's variables."""
        if self.momentum.of == "updates":
            return g
        return self.momentum.read(state[self.momentum.key], g, hyper.beta1, state.get("step"))

    def into(self, state: State, g: Tensor, hyper: Hyper, w: Tensor | None = None) -> Tensor:
        """What the direction is asked about: the momentum in the preconditioner's variables.

        w: the weight in g's shape, for a recipe that decays `inside`.
        """
        m = self.momentum_of(state, g, hyper)
        if self.decay.inside and w is not None:
            m = m + w.to(m.dtype) * hyper.weight_decay
        return self.precondition.into(state, m, hyper, state.get("step"))

    def towards(self, x: Tensor, hyper: Hyper | None = None) -> Tensor:
        """The step in the preconditioner's variables, before the learning rate; hyper: for scale "within"."""
        if self.scale == "within":
            assert hyper is not None
            radius = hyper.weight_decay * hyper.lr * hyper.scale * shape_ratio(self.adjust_lr, *x.shape[-2:])
            return self.direction.saturated(x, radius.to(x.dtype) if isinstance(radius, Tensor) else radius)
        return self.direction.unit(x) if self.scale == "lmo" else self.direction.scaled(x)

    def back(self, state: State, d: Tensor, hyper: Hyper) -> Tensor:
        return self.precondition.back(state, d, hyper, state.get("step"))

    def update(self, state: State, d: Tensor, g: Tensor, hyper: Hyper) -> Tensor:
        """The update, of g's shape, which is (batch, m, n) for a recipe that goes `by_matrix`."""
        u = self.back(state, d, hyper)
        if self.kronecker is not None:
            u = self.kronecker.unblock(u, *g.shape[-2:])
        if self.graft is None:
            return u
        step, m = state.get("step"), self.momentum_of(state, g, hyper)
        model = self.graft.back(state, self.graft.into(state, m, hyper, step), hyper, step)
        wanted, own = (torch.linalg.vector_norm(t, dim=(-2, -1), keepdim=True) for t in (model, u))
        return u * torch.where(own > 0, wanted / own, 0)

    def remember(self, state: State, u: Tensor, hyper: Hyper) -> tuple[Tensor, State]:
        """What the momentum makes of an update, and what is new in the state; only where it is `of` updates."""
        if self.momentum.of == "gradients":
            return u, {}
        m = state[self.momentum.key]
        fresh = self.momentum.observe(m, u.reshape(m.shape), hyper.beta1).to(m.dtype)
        return self.momentum.read(fresh, u.reshape(m.shape), hyper.beta1, None), {self.momentum.key: fresh}

    def moved(self, w: Tensor, u: Tensor, hyper: Hyper, ratio: float) -> Tensor:
        """The weight after its update and decay; ratio: of the matrix' shape."""
        decay = hyper.lr * hyper.weight_decay * (ratio if self.decay.scaled else 1.0)
        return self.decay.apply(w, u, decay, hyper.lr * ratio * hyper.scale)

    def learn(self, state: State, g: Tensor, hyper: Hyper, phase: Phase) -> State:
        """The state after what the factors learn from a gradient (batch, m, n), refreshed when due."""
        part = self.kronecker
        assert part is not None
        state = state | part.learn(state, g, hyper)
        if phase.takes:
            state |= part.take(state)
        if phase.refreshes:
            state |= part.refresh(part.gather([state], exact=phase.exact), [state])[0]
        return state | part.take(state) if phase.at_once else state


def _matrices(t: Tensor) -> Tensor:
    """(..., m, n) -> (batch, m, n)."""
    return t.reshape(t.shape[:-2].numel(), *t.shape[-2:])


def all_finite(g: Tensor) -> Tensor:
    """0-d bool on g's device: whether every entry is finite."""
    return torch.isfinite(torch.stack(torch.aminmax(g))).all() if g.numel() else g.new_ones((), dtype=torch.bool)


def step_one(recipe: Recipe, w: Tensor, g: Tensor, state: State, hyper: Hyper) -> tuple[Tensor, State]:
    """One step for one weight (..., m, n): (new weight, new state), inputs untouched.

    A gradient that is not finite leaves the weight and its state as they were, but for the clock.
    """
    if recipe.by_matrix and w.ndim != 3:
        shaped = {key: _matrices(t) if t.shape == w.shape else t for key, t in state.items()}
        stepped, shaped = step_one(recipe, _matrices(w), _matrices(g), shaped, hyper)
        return stepped.reshape(w.shape), {key: t.reshape(state[key].shape) for key, t in shaped.items()}
    finite, phase = all_finite(g), recipe.phase(state)
    fresh, stored = dict(state), w
    if phase.before:
        fresh = recipe.learn(fresh, g, hyper, phase)
    if phase.steps:
        fresh |= recipe.observe(fresh, g, hyper)
        if recipe.kronecker is not None:
            fresh |= recipe.kronecker.observe(fresh, g, hyper)
        value = recipe.rounding.value(w, state)
        x = recipe.into(fresh, g, hyper, value).to(value.dtype)
        u, remembered = recipe.remember(fresh, recipe.update(fresh, recipe.towards(x, hyper), g, hyper), hyper)
        moved = recipe.moved(value, u.to(value.dtype), hyper, shape_ratio(recipe.adjust_lr, *w.shape[-2:]))
        stored, left_over = recipe.rounding.store(moved, w.dtype, fresh.get("step"), (0, 0, 0))
        fresh |= remembered | left_over
    if phase.after:
        fresh = recipe.learn(fresh, g, hyper, phase)
    kept = {key: torch.where(finite, fresh[key].to(held.dtype), held) for key, held in state.items() if key != CLOCK}
    if CLOCK in state:
        kept[CLOCK] = state[CLOCK] + 1
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
