"""Momo: a step of any method, cut where a model of the loss meets a lower bound.

A step has two halves: every momentum takes its gradient, then what all layers measured decides how far each one goes.
The halves are torch operations (`steepest.unfused`): the fused ops move what they have just read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops.multi_tensor import Scaling
from ..optimizer import MatrixOptimizer
from ..parts import Number, shape_ratio
from ..parts.product_norm import truncation
from ..recipe import Recipe, State
from ..unfused import Observed
from ..values import Group, number

if TYPE_CHECKING:
    pass

Scale = Literal["lmo", "dual"]

# State of every parameter: <M, U> of its matrices when they last moved; the average of <W, G>.
DESCENT, INNER = "descent", "inner_average"
# State of the first parameter, for all of them: the average of the loss and its weights' sum; how many losses.
LOSS, LOSSES = "loss_average", "losses"


@dataclass(frozen=True)
class Chunk:
    """Matrices that share a direction call, the direction where it is kept, and <M, U> of every matrix."""

    members: list[Any]
    d: Tensor | None
    inner: list[Tensor]


@dataclass(frozen=True)
class Layers:
    """What a group's matrices say before they move.

    inner: (k,) fp64, <M, U> of every matrix times the shape's ratio of the learning rate; 0 where the gradient was not
    finite. That is the dual norm of a matrix whose step is of length ratio in its norm, or its square where the recipe
    scales by it.
    """

    observed: Observed
    chunks: list[Chunk]
    inner: Tensor

    @property
    def dual_norms(self) -> Tensor:
        return self.inner if self.observed.recipe.scale == "lmo" else self.inner.clamp(min=0).sqrt()


class Momo(MatrixOptimizer):
    """Momo's truncation for any method here: a step stops where a model of the loss meets a lower bound.

        class MuAdamMomo(Momo, MuAdam): ...
        optimizer = MuAdamMomo(model, lr=2e-3, lower_bound=0.0)
        optimizer.step(loss=loss)            # or step(closure)

        h <- beta h + (1 - beta) (loss - sum <W, G>)          as the momentum M averages the gradients
        t  = min(1, (h + sum <W, M> - lower_bound)_+ / sum <M, D>)
        W <- (1 - lr weight_decay) W - t D                     D: the step of the method, lr and all

    The sums go over all parameters with a gradient, D is constrained or regularized steepest descent as the method has
    it, and t D the step of the truncated model; see `steepest.parts.product_norm`. Where the bound is far t = 1 and the
    step is the method's. All groups should have the same momentum; AdamW groups have a part of their own in D.

    lower_bound: of the loss, a number or a 0-d tensor, which may be changed between steps; None: no truncation.
    stale_dual: takes <M, D> of the spectral and Schatten directions from the previous step, so that no direction is
        kept or computed twice; otherwise those of all matrices are held at once, as large as the matrices. A matrix
        that has not moved yet is measured anew; if its first gradient was not finite it counts as 0 in the next step.
    reduce_loss: where torch.distributed is initialised, the loss is averaged over all processes of the default group,
        so that ranks with a batch each agree; with False it must be the same on all of them.

    The loss is that of the step's gradients, not scaled by a GradScaler. One that is not finite, and a step in which no
    gradient is, leave the average as it was. Nothing waits for the device; a loss that is a tensor stays one. The
    averages are in the state, the loss's in that of the first parameter. Parameters are on one device. Costs two passes
    over weights and momenta for the inner products, and a step by torch operations, which torch.compile leaves alone.
    Source: arXiv:2510.09827, whose code this follows but for (.)_+, without which a step may ascend.
    """

    lower_bound: Number | None = None
    _loss: Number | None = None

    def __init__(
        self,
        *args: Any,
        lower_bound: Number | None = 0.0,
        stale_dual: bool = True,
        reduce_loss: bool = True,
        **kwargs: Any,
    ) -> None:
        one = isinstance(lower_bound, (int, float)) or (isinstance(lower_bound, Tensor) and lower_bound.numel() == 1)
        if lower_bound is not None and not one:
            raise TypeError(f"lower_bound should be one number or None but is: {lower_bound!r}")
        self.lower_bound, self.stale_dual, self.reduce_loss = lower_bound, stale_dual, reduce_loss
        super().__init__(*args, **kwargs)

    # ---- the step -------------------------------------------------------------------------------------------------

    @overload  # type: ignore[override]
    def step(self, closure: None = None, *, loss: Number | None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float], *, loss: Number | None = None) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, *, loss: Number | None = None) -> float | None:
        """One step. loss: of the gradients there are, a number or a tensor of one element; by default the closure's.

        Without a lower bound the loss is not looked at.
        RuntimeError where there is a lower bound and no loss, unless every lr is 0: such a step only makes the state.
        """
        if closure is None and loss is None and self.lower_bound is not None:
            if any(float(group["lr"]) != 0 for group in self.param_groups):
                raise RuntimeError(
                    f"{type(self).__name__} has a lower bound and needs the loss: step(loss=loss), step(closure), or "
                    "lower_bound=None"
                )
            loss = math.nan
        if isinstance(loss, Tensor) and loss.numel() != 1:
            raise ValueError(f"the loss should have one element but has {loss.numel()}: give its mean")
        self._loss = loss
        try:
            return super().step(closure)
        finally:
            self._loss = None

    def _couples(self) -> bool:
        """Whether layers depend on one another."""
        return self.lower_bound is not None

    def _factors(self, layers: Sequence[Layers]) -> list[Number]:
        """What each group's step is multiplied by, but for the truncation."""
        return [1.0 for _ in layers]

    def _stale(self, recipe: Recipe) -> bool:
        """Whether <M, U> may be that of the previous step."""
        return self.stale_dual and recipe.direction.batched

    @torch._disable_dynamo
    def _take_step(self, scaling: Scaling, loss: Number | None) -> None:
        if not self._couples():
            return super()._take_step(scaling, loss)
        loss = loss if self._loss is None else self._loss
        if loss is None and self.lower_bound is not None:
            raise RuntimeError("the closure returned None: let it return the loss")
        self._ready_plan()
        if not any(p.grad is not None for group in self.param_groups for p in group["params"]):
            return None
        layers = [self._measure(each) for each in self._observe(scaling)]
        factors = self._factors(layers)
        if self.lower_bound is not None:
            assert loss is not None
            t = self._share(layers, factors, self._loss_on_device(loss))
            factors = [factor * t for factor in factors]
        for each, factor in zip(layers, factors, strict=True):
            self._move(each, factor)
        return self._finish([each.observed for each in layers])

    def _measure(self, observed: Observed) -> Layers:
        recipe, chunks = observed.recipe, []
        inner = [torch.zeros(0, dtype=torch.float64, device=self._device)]
        for members in observed.chunks():
            held = [self._held(recipe, member) for member in members] if self._stale(recipe) else [None]
            if all(values is not None for values in held):
                chunk = Chunk(members, None, [values for values in held if values is not None])
            else:
                d, values = observed.measured(members)
                # Directions that are not batched are cheaper made twice than kept.
                chunk = Chunk(members, d if recipe.direction.batched else None, values)
            chunks.append(chunk)
            for member, own in zip(members, chunk.inner, strict=True):
                ratio = shape_ratio(recipe.adjust_lr, member.piece.rows, member.piece.cols)
                inner.append(torch.where(member.finite, own.double() * ratio, 0))
        return Layers(observed, chunks, torch.cat(inner))

    def _move(self, layers: Layers, factor: Number) -> None:
        observed = layers.observed
        recipe, hyper = observed.recipe, replace(observed.hyper, scale=factor)
        for chunk in layers.chunks:
            d, inner = chunk.d, chunk.inner
            if d is None and self._stale(recipe):
                d, inner = observed.measured(chunk.members)
            elif d is None:
                d = observed.towards(chunk.members)
            if self._stale(recipe):
                for member, values in zip(chunk.members, inner, strict=True):
                    held = self._held(recipe, member, create=True)
                    assert held is not None
                    torch.where(member.finite, values.to(held.dtype), held, out=held)
            observed.move(hyper, chunk.members, d)

    def _held(self, recipe: Recipe, member: Any, *, create: bool = False) -> Tensor | None:
        """A view of <M, U> of the member's matrices in the state of its parameter."""
        at, i, piece = member.place
        group = self.param_groups[at]
        p = group["params"][i]
        state, counts = self.state[p], [recipe.input_shape(own.shape)[0] for own in self._pieces(p, group)]
        if create and DESCENT not in state:
            state[DESCENT] = torch.zeros(sum(counts), dtype=torch.float64, device=p.device)
        first = sum(counts[:piece])
        return state[DESCENT][first : first + counts[piece]] if DESCENT in state else None

    # ---- the model of the loss ------------------------------------------------------------------------------------

    def _share(self, layers: Sequence[Layers], factors: Sequence[Number], loss: Tensor) -> Tensor:
        """Momo's t of this step, 0-d; the averages take the loss and <W, G>."""
        decrease = torch.zeros_like(loss)
        for each, factor in zip(layers, factors, strict=True):
            decrease = decrease + each.inner.sum() * each.observed.hyper.lr * factor
        value, weight, known = self._average_loss(layers, loss)
        for each in layers:
            value = value + self._linear_part(each.observed)
        assert self.lower_bound is not None
        return torch.where(known, truncation(value - weight * number(self.lower_bound), decrease), 1.0)

    def _average_loss(self, layers: Sequence[Layers], loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(average loss, sum of its weights, whether there has been a loss), all 0-d, with this one."""
        observed = next(each.observed for each in layers if each.observed.batch.params)
        momentum, hyper = observed.recipe.momentum, observed.hyper
        state = self._shared_state()
        average, count = state[LOSS], state[LOSSES]
        taken = torch.stack([flag for each in layers for flag in each.observed.finite]).any() & loss.isfinite()
        given = torch.where(taken, torch.stack([loss, torch.ones_like(loss)]), average)
        begun = hyper.beginning(count) if momentum.start == "first" else hyper
        average.copy_(torch.where(taken, momentum.observe(average, given, begun.beta1), average))
        count.add_(taken)
        value, weight = momentum.read(average, given, hyper.beta1, count).unbind()
        return value, weight, count > 0

    def _linear_part(self, observed: Observed) -> Tensor:
        """Sum of <W, M> - (average of <W, G>) over the group's parameters whose gradients are finite."""
        recipe, hyper, batch = observed.recipe, observed.hyper, observed.batch
        momentum, found = recipe.momentum, torch.zeros((), dtype=torch.float64, device=self._device)
        for p, g, state, finite, place in zip(
            batch.params, observed.grads, batch.states, observed.finite, batch.places, strict=True
        ):
            w, step = recipe.rounding.value(p, state), state.get("step")
            average, now = self._state_at(place)[INNER], dot(w, g)
            begun = hyper
            if momentum.start == "first":
                assert step is not None
                begun = hyper.beginning(step - 1)
            torch.where(finite, momentum.observe(average, now, begun.beta1), average, out=average)
            part = dot(w, recipe.momentum_of(state, g, hyper)) - momentum.read(average, now, hyper.beta1, step)
            found = found + torch.where(finite, part, 0)
        return found

    def _loss_on_device(self, loss: Number) -> Tensor:
        """0-d fp64, the mean over processes."""
        device = self._device
        if not isinstance(loss, Tensor):
            found = torch.full((), loss, dtype=torch.float64, device=device)
        else:
            found = loss.detach().reshape(()).to(device, torch.float64, non_blocking=device.type == "cuda", copy=True)
        if self.reduce_loss and dist.is_available() and dist.is_initialized():
            dist.all_reduce(found)
            found /= dist.get_world_size()
        return found

    # ---- state ----------------------------------------------------------------------------------------------------

    def _state_at(self, place: tuple[int, int]) -> State:
        """Of a parameter: a step's own view of it has the recipe's keys only."""
        group, i = place
        state: State = self.state[self.param_groups[group]["params"][i]]
        return state

    @property
    def _device(self) -> torch.device:
        return self._first.device

    @property
    def _first(self) -> Tensor:
        return next(p for group in self.param_groups for p in group["params"])

    def _shared_state(self) -> State:
        """What belongs to all parameters, in the state of the first one."""
        state: State = self.state[self._first]
        for key, value in self._fresh_shared_state().items():
            state.setdefault(key, value)
        return state

    def _fresh_shared_state(self) -> State:
        if self.lower_bound is None:
            return {}
        device = self._device
        return {LOSS: torch.zeros(2, dtype=torch.float64, device=device), LOSSES: torch.zeros((), device=device)}

    def _own_state(self, p: Tensor, group: Group) -> State:
        """What a parameter's state has besides its recipe's, when it begins; its momentum may have begun before."""
        if self.lower_bound is None or INNER in self.state[p]:
            return {}
        return {INNER: dot(p.detach(), self.state[p][self._recipe(group).momentum.key])}

    def _init_state(self, p: Tensor, dtype: torch.dtype, group: Group) -> bool:
        added = super()._init_state(p, dtype, group)
        own = self._own_state(p, group)
        self.state[p].update(own)
        if p is self._first:
            self._shared_state()
        return added or bool(own)

    def _check_devices(self, group: Group) -> None:
        super()._check_devices(group)
        devices = list(dict.fromkeys(p.device for each in self.param_groups for p in each["params"]))
        if len(devices) > 1:
            raise ValueError(
                f"{type(self).__name__} couples all layers by numbers on one device, but parameters are on "
                f"{' and '.join(map(str, devices))}: make one optimizer for each device"
            )

    def _new_recipe(self, group: Group) -> Recipe:
        return replace(super()._new_recipe(group), coupled=self._couples())

    def _check_values(self, group: Group) -> None:
        super()._check_values(group)
        if group["maximize"] and self.lower_bound is not None:
            raise ValueError("maximize=True has no lower bound: minimize the negative loss")
        recipe = self.recipe(group)
        if recipe.graft is not None or recipe.decay.inside or recipe.momentum.of == "updates":
            raise ValueError(
                f"{type(self).__name__} couples steps along a direction of the momentum, and grafts, momentum of "
                "updates and decay inside the model take other ones"
            )

    def _traced_step(self, scaling: Scaling) -> None:
        if self._couples():
            raise RuntimeError(
                f"{type(self).__name__} cannot be part of one graph of torch.compile, its layers wait for one another: "
                "call its step outside of the compiled function"
            )
        super()._traced_step(scaling)

    def __getstate__(self) -> dict[str, Any]:
        own = ("lower_bound", "stale_dual", "reduce_loss")
        return {**super().__getstate__(), **{key: getattr(self, key) for key in own}}


def dot(a: Tensor, b: Tensor) -> Tensor:
    """<a, b>, 0-d fp64, of products in fp32 or fp64."""
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return (a.to(wide) * b.to(wide)).sum(dtype=torch.float64)
