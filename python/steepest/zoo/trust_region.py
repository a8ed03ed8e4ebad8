"""Steps of a given length: the trust region in any norm, and the methods that came before Muon.

TrustRegion      argmin { <m, X> + R(X) : ||X - W|| <= lr },  m an average of gradients     arXiv:2503.12645
OrthogonalSGDM   polar(g) first, momentum after                                             Tuddenham et al. 2022
NIGT             ||step||_F = lr, the gradient taken further along the way                  arXiv:2002.03305
Fromage          ||step||_F = lr ||W||_F, divided by sqrt(1 + lr^2)                         arXiv:2002.03432
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..matrices import LAYOUT_KEYS
from ..optimizer import MatrixOptimizer, Params
from ..optimizer.checkpoint_state import Kept
from ..optimizer.group_options import (
    Group,
    number,
    refuse_cautious_update,
    refuse_decay_methods,
    refuse_option,
    refuse_schedule_free,
)
from ..optimizer.option_types import HEAVY_BALL, OptionType
from ..parts import (
    Columns,
    Decay,
    Direction,
    Frobenius,
    Hyper,
    Identity,
    Momentum,
    Nuclear,
    Number,
    OneHot,
    Rows,
    Sign,
    UpdateTransform,
    shape_ratio,
)
from ..parts.direction import length
from ..recipe import Recipe, State
from ..sharding.local import local_tensor
from ..state_layout import StateSpec
from ..step.modes import in_default_modes
from .shared import Extras, Polar, defaults_of, polar_of, recipe_of, spectral
from .vector import MomentumOptimizer, VectorOptimizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

_NORMS: dict[str, Direction] = {
    "frobenius": Frobenius(),
    "sign": Sign(),
    "rows": Rows(),
    "columns": Columns(),
    "nuclear": Nuclear(),
    "one_hot": OneHot(),
}
#: The names of the norms: those of `steepest.parts.direction`.
NORMS = ("spectral", *_NORMS)
# Whose ball has a nearest point in closed form.
_NEAREST = ("spectral", "frobenius", "sign", "rows", "columns")
# State of NIGT: the iterate, where the parameter is the point ahead of it; and that point while eval() has put it away.
WEIGHTS, AHEAD = "weights", "ahead"


class InsideDecayRecipe(Recipe):
    """A recipe whose direction is asked about m + weight_decay W: the decay is the gradient of wd/2 ||W||_F^2."""

    reads_weight: ClassVar[bool] = True

    def direction_input(
        self, state: State, m: Tensor, hyper: Hyper, w: Tensor | None = None, chosen: Tensor | None = None
    ) -> Tensor:
        if w is not None:
            m = m + w.to(m.dtype) * hyper.weight_decay
        return self.precondition.into(state, m, hyper, state.get("step"))


class RidgeRecipe(InsideDecayRecipe):
    """A recipe that steps to the ball's point nearest to the minimiser of a model with ridge, and no further."""

    def direction_dtype(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """Wide: the weight is a part of the input, and where the step ends at the minimiser, of its end."""
        return dtype

    def descent_direction(self, x: Tensor, hyper: Hyper) -> Tensor:
        radius = hyper.weight_decay * hyper.lr * hyper.step_factor * shape_ratio(self.adjust_lr, *x.shape[-2:])
        return self.direction.saturated(x, radius.to(x.dtype) if isinstance(radius, Tensor) else radius)


@dataclass(frozen=True)
class NoDecay(Decay):
    """W <- W - step u: the decay is in the direction's input."""

    fused: ClassVar[bool] = False

    def length(self, lr: Number, weight_decay: Number, ratio: float) -> Number:
        return 0.0

    def apply(self, w: Tensor, u: Tensor, decay: Number, step: Number) -> Tensor:
        return w - u * step


@dataclass(frozen=True)
class RelativeStep(Decay):
    """W <- (W - step ||W||_F u / ||u||_F) / sqrt(1 + step^2): a step as long as the weight is, Fromage's.

    w and u are one tensor, and where either is 0 the step is plain.
    """

    fused: ClassVar[bool] = False
    elementwise: ClassVar[bool] = False

    def length(self, lr: Number, weight_decay: Number, ratio: float) -> Number:
        return 0.0

    def apply(self, w: Tensor, u: Tensor, decay: Number, step: Number) -> Tensor:
        weight, update = (length(t.reshape(1, 1, -1)).reshape(()) for t in (w, u))
        turns = (weight > 0) & (update > 0)
        u = torch.where(turns, u / update, u) * torch.where(turns, weight, 1)
        return (w - u * step) * (1 + step * step) ** -0.5


@dataclass(frozen=True)
class UpdateMomentum(UpdateTransform):
    """Heavy ball of updates, m <- momentum m + u, and m is what is stepped. dtype: None is the gradient's."""

    dtype: torch.dtype | None = None
    key: str = "momentum_buffer"

    def __post_init__(self) -> None:
        Momentum("heavy_ball", dtype=self.dtype)  # which takes the same dtypes

    @property
    def specs(self) -> tuple[StateSpec, ...]:
        return (StateSpec(self.key, "elementwise", self.dtype, of_gradient=True, codes="signed"),)

    def apply(self, state: State, u: Tensor, m: Tensor, hyper: Hyper) -> tuple[Tensor, State]:
        buffer = Momentum("heavy_ball").observe(state[self.key], u, hyper.beta1).to(state[self.key].dtype)
        return buffer.to(torch.promote_types(buffer.dtype, u.dtype)), {self.key: buffer}


def _no_decay(group: Group) -> Decay:
    return _plain(group, NoDecay())


def _plain(group: Group, decay: Decay) -> Decay:
    if group["cautious_wd"]:
        raise ValueError(
            "cautious_wd=True is not taken here: decay is inside the model, or there is none, which leaves no decay to "
            "be cautious; leave it out"
        )
    refuse_decay_methods(group, "decay is inside the model, or there is none", "independent", "l2")
    return decay


class TrustRegion(VectorOptimizer):
    """The model of the loss is linear, and so far as lr in a norm it is trusted.

        m <- momentum m + (1 - momentum) g,  m = g at first
        W <- argmin { <m, X> : ||X - (1 - lr weight_decay) W|| <= lr }                       composite="decay"
        W <- argmin { <m, X> + weight_decay / 2 ||X||_F^2 : ||X - W|| <= lr }                composite="ridge"

    The first is W <- (1 - lr weight_decay) W - lr ratio unit(m), in the spectral norm Muon without Nesterov: from a
    start in it no iterate leaves the ball ||W|| <= 1 / weight_decay, and it is Frank and Wolfe's step for that ball. In
    the second the step is -lr times the point of the unit ball nearest to (m + weight_decay W) / (lr weight_decay): it
    ends at the minimiser as soon as that is near enough, where the first goes around it. The norm is that of `norm`
    divided by ratio(rows, cols), which is 1 unless adjust_lr_fn says otherwise.

    params: a module, named parameters or tensors, of which matrices go by this rule and the rest to AdamW, or groups,
        which may hold any shape (fewer than two dimensions are one column).
    norm: "spectral", "frobenius", "sign" (largest entry), "rows", "columns", "nuclear" or "one_hot" (sum of entries); a
        group value. composite="ridge" knows the first five, the spectral one by SVD whatever `polar` says.
    momentum: in [0, 1), 1 - alpha of the paper.   polar, adjust_lr_fn: as in `steepest.MuAdam`.

    Equals `NormalizedSGD`, `SignSGD` and `steepest.Muon(nesterov=False)` in their norms but for the first average,
    which there begins at zero. With an iterative `polar` the ball is as exact as that is.
    composite="ridge" steps by torch operations.

    Source: arXiv:2503.12645, Algorithm 1.
    """

    route = MatrixOptimizer.route
    argument_lines: ClassVar[dict[str, str]] = {
        "composite": '"decay" or "ridge": what weight_decay is in the model of the loss',
    }

    def __init__(
        self,
        params: Params,
        lr: Number = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        *,
        norm: str = "spectral",
        composite: str = "decay",
        adjust_lr_fn: str | None = None,
        polar: Polar = "auto",
        **extra: Unpack[Extras],
    ) -> None:
        options = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "norm": norm,
            "composite": composite,
            "adjust_lr_fn": adjust_lr_fn,
            "polar": polar,
        }
        super().__init__(params, *defaults_of("TrustRegion", options, extra))

    def recipe(self, group: Group) -> Recipe:
        parts: dict[str, Any] = {
            "momentum": Momentum(start="first", dtype=group["momentum_dtype"]),
            "precondition": Identity(),
            "direction": _NORMS[group["norm"]] if group["norm"] in _NORMS else polar_of(group),
        }
        if group["composite"] == "decay":
            return recipe_of(group, ratio="none", **parts)
        if group["norm"] == "spectral":  # by SVD, and so from an input that is not rounded to 16 bits
            parts["direction"] = spectral(group, "svd")
        return recipe_of(group, kind=RidgeRecipe, ratio="none", decay=_no_decay(group), **parts)

    def hyper(self, group: Group) -> Hyper:
        return Hyper(*map(number, (group["lr"], group["weight_decay"], group["momentum"])))

    def check_values(self, group: Group) -> None:
        refuse_cautious_update(group, "an update that is made longer leaves the trust region")
        refuse_schedule_free(group, "the trust region is around the weights themselves")
        if group["norm"] not in NORMS:
            raise ValueError(f"norm {group['norm']!r} is not known; use one of {', '.join(NORMS)}")
        if group["composite"] not in ("decay", "ridge"):
            raise ValueError(f"composite {group['composite']!r} is not known; use 'decay' or 'ridge'")
        if group["composite"] == "ridge" and group["norm"] not in _NEAREST:
            raise ValueError(f"composite 'ridge' with norm {group['norm']!r} has no closed form; use composite='decay'")
        super().check_values(group)


class OrthogonalSGDM(MatrixOptimizer):
    """SGD with momentum of orthogonalized gradients: polar first and momentum after, where Muon has them around.

        o = polar(g + weight_decay W);   m <- momentum m + o;   W <- W - lr ratio(rows, cols) m

    What the momentum averages are directions: noise that hides the gradient is not averaged before it is orthogonalized
    (so arXiv:2503.12645 on why the other order is better). A step is up to lr / (1 - momentum) long.

    Arguments as in `steepest.MuAdam`, momentum in [0, 1]; adjust_lr_fn=None is "none" here. With momentum=0 and no
    decay it equals `steepest.Muon(momentum=0)` without its ratio. Steps by torch operations.

    Source: Tuddenham, Prugel-Bennett and Hare, Orthogonalising gradients to speed up neural network optimisation, 2022.
    """

    option_types: ClassVar[dict[str, OptionType]] = {"momentum": HEAVY_BALL}

    def __init__(
        self,
        params: Params,
        lr: Number = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        *,
        adjust_lr_fn: str | None = None,
        polar: Polar = "auto",
        **extra: Unpack[Extras],
    ) -> None:
        options = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "adjust_lr_fn": adjust_lr_fn,
            "polar": polar,
        }
        super().__init__(params, *defaults_of("OrthogonalSGDM", options, extra))

    def recipe(self, group: Group) -> Recipe:
        parts: dict[str, Any] = {
            "momentum": None,
            "precondition": Identity(),
            "direction": polar_of(group),
            "decay": _no_decay(group),
            "transforms": (UpdateMomentum(group["momentum_dtype"]),),
        }
        return recipe_of(group, kind=InsideDecayRecipe, ratio="none", **parts)

    def hyper(self, group: Group) -> Hyper:
        return Hyper(*map(number, (group["lr"], group["weight_decay"], group["momentum"])))


class NIGT(MomentumOptimizer):
    """Normalized SGD with implicit gradient transport: gradients are taken ahead of the iterate.

        X = W + momentum / (1 - momentum) (W - W'),  W' the iterate before W;   g the gradient at X
        m <- momentum m + (1 - momentum) g;   W <- (1 - lr weight_decay) W - lr m / ||m||_F

    At X the old average, transported, and the new gradient agree to second order, so that more of the past can be
    averaged. The parameters hold X, where the loss is to be evaluated; `eval()` puts the iterates W in their place and
    `train()` takes them out again. A step in between is refused.

    Arguments as in `NormalizedSGD`, momentum in [0, 1); equals it with momentum=0. W is kept in the state, in the
    parameter's dtype, and a step begins there: what others write to the parameters after the first step is lost. A step
    holds a copy of all of them. Not for torch.compile.

    Source: arXiv:2002.03305, Algorithm 1.
    """

    _direction = Frobenius()
    extrapolates = True

    def kept_state(self, p: Tensor, group: Group) -> dict[str, Kept]:
        """During eval() the points ahead too."""
        return {
            **super().kept_state(p, group),
            AHEAD: Kept(p.shape, missing="together" if group["use_muon"] else "leave"),
        }

    def fresh_state(self, p: Tensor, dtype: torch.dtype, group: Group) -> State:
        weights = {WEIGHTS: p.detach().clone()} if group["use_muon"] else {}
        return {**super().fresh_state(p, dtype, group), **weights}

    def take_step(self, scaling: Any, loss: Number | None) -> None:
        if any(AHEAD in state for state in self.state.values()):
            raise RuntimeError("the weights are iterates since eval(); call train() before the next step")
        plan = self.ready_plan()
        stepping = [(p, g) for g in self.param_groups if g["use_muon"] for p in g["params"] if p.grad is not None]
        ahead = [local_tensor(p).clone() for p, _ in stepping]
        before = [self._iterate(self.state_here(p)[WEIGHTS], p, group) for p, group in stepping]
        for p, _ in stepping:
            p.copy_(self.state[p][WEIGHTS])
        super().take_step(scaling, loss)
        stepped = {parameter.source: parameter.stepped for parameter in plan.parameters}
        for (p, group), x, w in zip(stepping, ahead, before, strict=True):
            here = local_tensor(p)
            beta, after = number(group["momentum"]), self._iterate(here, p, group)
            further = after + (after - w) * (beta / (1 - beta))
            self.state[p][WEIGHTS].copy_(p)  # as it was where no step was taken
            here.copy_(torch.where(stepped[p], further.to(p.dtype), x))

    def check_values(self, group: Group) -> None:
        super().check_values(group)
        self.check_values_of_others(group)
        refuse_option(group, "variance_reduction", "NIGT has one of its own")
        refuse_decay_methods(group, "NIGT's gradients are of a point ahead of the weights", "l2")

    def check_values_of_others(self, group: Group) -> None:
        super().check_values_of_others(group)
        if group["average"] is not None:
            raise ValueError(f"NIGT has eval() and train() of its own: leave out average={group['average']!r}")

    def _iterate(self, stored: Tensor, p: Tensor, group: Group) -> Tensor:
        """W with the bits that its dtype drops, where they are kept."""
        return self.recipe_of(group).rounding.value(stored, self.state_here(p))

    @in_default_modes
    def eval(self) -> None:
        """Puts the iterates W in place of the points ahead of them."""
        for p, state in self.state.items():
            if WEIGHTS in state and AHEAD not in state:
                state[AHEAD] = p.clone()
                p.copy_(state[WEIGHTS])

    @in_default_modes
    def train(self) -> None:
        """Puts the points ahead back."""
        for p, state in self.state.items():
            if AHEAD in state:
                p.copy_(state.pop(AHEAD))


class Fromage(VectorOptimizer):
    """Every tensor turns by the same angle: a step is as long, relative to its tensor, as lr.

        W <- (W - lr ||W||_F g / ||g||_F) / sqrt(1 + lr^2),   W <- (W - lr g) / sqrt(1 + lr^2) where W = 0 or g = 0

    The division keeps ||W||_F where g is orthogonal to W, as it is before a normalization layer, and stops it from
    growing by more where it is not. No weight decay and no averages, though the buffer of a momentum is there. A tensor
    is a parameter, or a split of it; heads and batches of matrices are refused. The bound on ||W||_F / ||W_0||_F of the
    authors' code is not here. Steps by torch operations.

    params: a module, named parameters or tensors, all by this rule, or groups.   lr: a number >= 0 or a 1-element
    tensor. OneCycleLR and CyclicLR are to have cycle_momentum=False: there is none to cycle. Source: arXiv:2002.03432,
    Algorithm 1.
    """

    def __init__(self, params: Params, lr: Number = 1e-2, **extra: Unpack[Extras]) -> None:
        options = {"lr": lr, "weight_decay": 0.0, "adjust_lr_fn": None}
        super().__init__(params, *defaults_of("Fromage", options, extra))

    def recipe(self, group: Group) -> Recipe:
        parts: dict[str, Any] = {
            "momentum": Momentum(dtype=group["momentum_dtype"]),
            "precondition": Identity(),
            "direction": Frobenius(),
            "decay": _plain(group, RelativeStep()),
        }
        return recipe_of(group, ratio="none", scale="dual", **parts)

    def hyper(self, group: Group) -> Hyper:
        return Hyper(number(group["lr"]), beta1=0.0)

    def check_values(self, group: Group) -> None:
        refuse_option(group, "constraint", "Fromage has a rule of its own for norms")
        refuse_schedule_free(group, "a step of Fromage is as long as the weights themselves")
        taken = [key for key in LAYOUT_KEYS if group[key] not in (None, 0, 1)]
        if taken:
            raise ValueError(f"Fromage's length is that of a whole tensor: leave out {taken[0]}={group[taken[0]]!r}")
        if group["adjust_lr_fn"] not in (None, "none"):
            raise ValueError(f"Fromage's step has no ratio of a shape but adjust_lr_fn is: {group['adjust_lr_fn']!r}")
        if not isinstance(group["weight_decay"], Tensor) and group["weight_decay"] != 0:
            raise ValueError(f"Fromage has no weight decay, its norm is its own, but is given: {group['weight_decay']}")
        super().check_values(group)
