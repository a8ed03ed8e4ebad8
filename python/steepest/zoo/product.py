"""Rules that couple all layers of a model: steepest descent in a product norm, Momo's truncation, Prodigy's step size.

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
from ..optimizer import MatrixOptimizer, Params
from ..parts import Diagonal, Direction, Frobenius, Hyper, Identity, Momentum, Number, Precondition, Sign, shape_ratio
from ..parts.product_norm import Box, ProductNorm, escalated, truncation
from ..recipe import Recipe, State
from ..unfused import Observed
from ..values import Group, adam_hyper, check_at_least_zero, check_betas, finish, number
from .shared import Extras, Polar, defaults_of, polar_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

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
        layers = [self._measure(i, each) for i, each in enumerate(self._observe(scaling))]
        factors = self._factors(layers)
        if self.lower_bound is not None:
            assert loss is not None
            t = self._share(layers, factors, self._loss_on_device(loss))
            factors = [factor * t for factor in factors]
        for each, factor in zip(layers, factors, strict=True):
            self._move(each, factor)
        return self._finish([each.observed for each in layers])

    def _measure(self, group: int, observed: Observed) -> Layers:
        recipe, chunks = observed.recipe, []
        inner = [torch.zeros(0, dtype=torch.float64, device=self._device)]
        for members in observed.chunks(self.param_groups[group]["max_workspace_bytes"]):
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
            average, now = self._state_at(place)[INNER], _dot(w, g)
            begun = hyper
            if momentum.start == "first":
                assert step is not None
                begun = hyper.beginning(step - 1)
            torch.where(finite, momentum.observe(average, now, begun.beta1), average, out=average)
            part = _dot(w, recipe.momentum_of(state, g, hyper)) - momentum.read(average, now, hyper.beta1, step)
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
        return {INNER: _dot(p.detach(), self.state[p][self._recipe(group).momentum.key])}

    def _init_state(self, p: Tensor, dtype: torch.dtype, group: Group) -> bool:
        added = super()._init_state(p, dtype, group)
        own = self._own_state(p, group)
        self.state[p].update(own)
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


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """<a, b>, 0-d fp64, of products in fp32 or fp64."""
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return (a.to(wide) * b.to(wide)).sum(dtype=torch.float64)


_COUPLING = ("lower_bound", "stale_dual", "reduce_loss")


def _without(extra: Coupling, keys: Sequence[str]) -> Any:
    return {key: value for key, value in extra.items() if key not in keys}


# ---- steepest descent in a product norm ---------------------------------------------------------------------------

_ADAM = Diagonal(bias_correction=False, eps_inside=False)
#: Norms of parameters that are not matrices: (preconditioner, direction), one layer a tensor.
OTHERS: dict[str, tuple[Precondition, Direction]] = {
    "adam_2": (_ADAM, Frobenius()),
    "adam_infty": (_ADAM, Box()),
    "sign": (Identity(), Sign()),
    "euclidean": (Identity(), Frobenius()),
}


class Coupling(Extras, total=False):
    """Keyword arguments of every method here; the first three are the optimizer's, not of a group.

    lower_bound, stale_dual, reduce_loss: see `Momo`; lower_bound=None, the default: no truncation.
    adamw_weight_decay: of the parameters that are not matrices; by default weight_decay. A module's gains and biases
        are not decayed.
    adamw_lr, adamw_betas, adamw_eps are not taken: such parameters belong to the same rule.
    """

    lower_bound: Number | None
    stale_dual: bool
    reduce_loss: bool


class ProductNormOptimizer(Momo):
    """Base of the methods here: a subclass gives its group values `own` and says which rule it is.

    A matrix is a layer with a spectral norm, any other parameter one in the norm `others`; its group's lr multiplies
    the same kind of step. ValueError for an unknown rule, TypeError for AdamW's own numbers.
    """

    def __init__(
        self,
        params: Params,
        own: Group,
        extra: Coupling,
        *,
        product: ProductNorm,
        scale: Scale,
        others: str,
    ) -> None:
        if scale not in ("lmo", "dual"):
            raise ValueError(f"scale {scale!r} is not known; use 'lmo' (length lr in the norm) or 'dual'")
        if others not in OTHERS:
            raise ValueError(f"norm {others!r} of the other parameters is not known; use one of {', '.join(OTHERS)}")
        name = type(self).__name__
        for key in ("adamw_lr", "adamw_betas", "adamw_eps"):
            if key in extra:
                raise TypeError(
                    f"{name} does not take {key}: parameters that are not matrices belong to the same rule; give "
                    "their group a value of its own instead"
                )
        coupling = {key: extra[key] for key in _COUPLING if key in extra}  # type: ignore[literal-required]
        values, adamw = defaults_of(name, own, _without(extra, _COUPLING))
        adamw = {**adamw, **{key: own[key] for key in ("lr", "betas", "eps") if key in own}}
        adamw["weight_decay"] = extra.get("adamw_weight_decay", own["weight_decay"])
        self.product, self.scale, self.others = product, scale, others
        super().__init__(params, values, adamw, **{"lower_bound": None, **coupling})

    # ---- parts ----------------------------------------------------------------------------------------------------

    def direction(self, group: Group) -> Direction:
        """Of the matrices of a group."""
        return polar_of(group)

    def momentum(self, group: Group) -> Momentum:
        return Momentum(start="first", dtype=group["momentum_dtype"])

    def recipe(self, group: Group) -> Recipe:
        ratio = group["adjust_lr_fn"] or "none"
        return self._recipe_of(group, self.product.follows(True), Identity(), self.direction(group), ratio)

    def _recipe_of(
        self, group: Group, follows: bool, precondition: Precondition, direction: Direction, ratio: str = "none"
    ) -> Recipe:
        scale: Scale = "dual" if follows else "lmo"
        momentum = self.momentum(group)
        return Recipe(momentum, precondition, direction, scale, ratio, coupled=self._couples(), **finish(group))

    def hyper(self, group: Group) -> Hyper:
        return adam_hyper(group)

    def _hyper(self, group: Group) -> Hyper:
        return self.hyper(group)

    def _others(self, group: Group) -> str:
        return self.others

    def _new_recipe(self, group: Group) -> Recipe:
        if group["use_muon"]:
            return self.recipe(group)
        return self._recipe_of(group, self.product.follows(False), *OTHERS[self.others])

    # ---- the rule -------------------------------------------------------------------------------------------------

    def _couples(self) -> bool:
        return self.lower_bound is not None or self.product.couples(self.scale)

    def _stale(self, recipe: Recipe) -> bool:
        return super()._stale(recipe) and (self.product.kind, self.scale) != ("l2", "lmo")

    def _factors(self, layers: Sequence[Layers]) -> list[Number]:
        matrices, others = self._dual_norms(layers)
        own = self.product.factors(matrices, others, self.scale)
        return [own[0] if group["use_muon"] else own[1] for group in self.param_groups]

    def _dual_norms(self, layers: Sequence[Layers]) -> tuple[Tensor, Tensor]:
        """Of all matrices and of all other layers."""
        found: dict[bool, list[Tensor]] = {True: [layers[0].inner[:0]], False: [layers[0].inner[:0]]}
        for group, each in zip(self.param_groups, layers, strict=True):
            found[group["use_muon"]].append(each.dual_norms)
        return torch.cat(found[True]), torch.cat(found[False])

    def _check_values(self, group: Group) -> None:
        if "betas" in group:
            check_betas(group["betas"])
            check_at_least_zero("eps", group["eps"])
        super()._check_values(group)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{key: getattr(self, key) for key in ("product", "scale", "others")}}


class ProductNormDescent(ProductNormOptimizer):
    """Steepest descent in a product norm: every layer has its own norm, and one norm of those couples the layers.

        M <- beta M + (1 - beta) G,  V likewise of G o G, with the other beta;  first gradients start both
        W_l <- (1 - lr weight_decay) W_l - lr t w_l dz_l(M_l)

    Matrices: spectral norm, dz = ratio(rows, cols) polar(M). Every other parameter is one layer:

        others        norm                                 dz(M)
        adam_2        sqrt(sum (sqrt(V) + eps) x^2)        M / (sqrt(V) + eps) / dual norm
        adam_infty    max (sqrt(V) + eps) |x| / |M|        M / (sqrt(V) + eps)
        sign          max |x|                              sign(M)
        euclidean     ||x||_2                              M / dual norm

    product, scale: the product norm, "max", "l2" or "hybrid", and the kind of step, "lmo" (length lr) or "dual"
        (regularized); they say what w_l is, see the table in `steepest.parts.product_norm`. "l2" with "dual" and
        "adam_2" is PolarGrad, "max" with "lmo" and "sign" is like Scion.
    matrix_scale: s of product="hybrid".
    lr, weight_decay, betas, eps: of all groups, those of other parameters included, which may have values of their own.
    adjust_lr_fn: as in `steepest.Muon`, None is "none". A ratio makes steps longer: the norm of the matrix is the
        spectral one divided by ratio, or where w_l follows d_l (product="l2") by its root.
    polar: as in `steepest.MuAdam`.   extra: see `Coupling`; with a lower_bound t is Momo's, else 1.

    "max" with "lmo" and "l2" with "dual" do not couple layers without a lower bound. The steps of "l2" with "lmo" have
    length lr because their dual norms are never stale. Besides the directions a coupled step costs passes over momenta,
    those of `Momo` with a lower bound, and the memory that stale_dual=False takes. Source: arXiv:2510.09827.
    """

    def __init__(
        self,
        params: Params,
        lr: Number = 1e-3,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        adjust_lr_fn: str | None = None,
        *,
        product: Literal["max", "l2", "hybrid"] = "hybrid",
        scale: Scale = "dual",
        matrix_scale: float = 10.0,
        others: str = "adam_2",
        polar: Polar = "auto",
        **extra: Unpack[Coupling],
    ) -> None:
        own = _own(lr, weight_decay, betas, eps, adjust_lr_fn, polar)
        rule = ProductNorm(product, matrix_scale if product == "hybrid" else 1.0)
        super().__init__(params, own, extra, product=rule, scale=scale, others=others)


class MuonMax(ProductNormOptimizer):
    """Regularized steepest descent where the matrices share one spectral norm; with lower_bound MuonMax-Momo.

        S = sum over matrices of ratio(rows, cols) ||M||_nuc
        matrices   W <- (1 - lr weight_decay) W - lr t matrix_scale S ratio(rows, cols) polar(M)
        others     W <- (1 - lr weight_decay) W - lr t M / (sqrt(V) + eps)
        t = min(1, (model - lower_bound)_+ / (lr (matrix_scale S^2 + sum M^2 / (sqrt(V) + eps))))

    with M and V as in `ProductNormDescent`, whose product="hybrid", scale="dual", others="adam_2" this is. All matrices
    share one adaptive factor. With stale_dual=True S is that of the previous step, so that a direction is made once.
    With one matrix and matrix_scale=1 it is regularized Muon, W - lr ||M||_nuc polar(M).

    lower_bound: of the loss; None: MuonMax without Momo, t = 1. The authors use 0, and up to 3.2 for language models.
    matrix_scale: s, 10 in the authors' MuonMax-Momo; their more general code has spectral_scale=4, which is s = 16.
    Other arguments as in `ProductNormDescent`, `Coupling`.

    Source: arXiv:2510.09827 and its authors' code, with whose defaults; betas[0] is the momentum of all parameters.
    """

    def __init__(
        self,
        params: Params,
        lr: Number = 1e-3,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        adjust_lr_fn: str | None = None,
        *,
        matrix_scale: float = 10.0,
        polar: Polar = "auto",
        **extra: Unpack[Coupling],
    ) -> None:
        own = _own(lr, weight_decay, betas, eps, adjust_lr_fn, polar)
        rule = ProductNorm("hybrid", matrix_scale)
        super().__init__(params, own, extra, product=rule, scale="dual", others="adam_2")


class MuonAdam(ProductNormOptimizer):
    """Muon for matrices and Adam for the rest as one constrained step; with lower_bound MuonAdam-Momo.

        matrices   W <- (1 - lr weight_decay) W - lr t ratio(rows, cols) polar(M)
        others     W <- (1 - lr weight_decay) W - lr t M / (sqrt(V) + eps)
        t = min(1, (model - lower_bound)_+ / (lr (sum ratio ||M||_nuc + sum M^2 / (sqrt(V) + eps))))

    with M and V as in `ProductNormDescent`, whose product="max", scale="lmo", others="adam_infty" this is. Without a
    lower bound it is Muon beside Adam, whose averages begin with the first gradient instead of being corrected. One lr
    for all, though a group of other parameters may have a value of its own.

    Arguments as in `ProductNormDescent`, `Coupling`. Source: arXiv:2510.09827.
    """

    def __init__(
        self,
        params: Params,
        lr: Number = 1e-3,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        adjust_lr_fn: str | None = None,
        *,
        polar: Polar = "auto",
        **extra: Unpack[Coupling],
    ) -> None:
        own = _own(lr, weight_decay, betas, eps, adjust_lr_fn, polar)
        super().__init__(params, own, extra, product=ProductNorm("max"), scale="lmo", others="adam_infty")


def _own(
    lr: Number,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    adjust_lr_fn: str | None,
    polar: Polar,
) -> Group:
    return {
        "lr": lr,
        "weight_decay": weight_decay,
        "betas": betas,
        "eps": eps,
        "adjust_lr_fn": adjust_lr_fn,
        "polar": polar,
    }


# ---- a step size that grows ---------------------------------------------------------------------------------------

# State of every parameter: where it began. Of the first one: the step size.
START, STEP_SIZE = "start", "step_size"


class ProdigyMuon(ProductNormOptimizer):
    """Spectral and sign descent whose step size is found: Prodigy without averages, in the norm of the largest layer.

        eta <- max(eta, <M, W_0 - W> / d),  d = sum over layers of the dual norm of M_l
        W_l <- (1 - lr weight_decay) W_l - lr eta dz_l(M_l)

    dz is polar(M) for matrices (norm="spectral") and sign(M) for all else; with norm="sign" for matrices too, which is
    the rule of arXiv:2409.20325: Prodigy (arXiv:2306.06101) with all averages switched off, eta being updated before
    it is used, as in Prodigy's code. With exact gradients of a convex loss and momentum=0, eta never exceeds the larger
    of initial_step and the distance from W_0 to a minimizer, in the norm of the largest layer.

    initial_step: the first eta > 0, far too small.   lr: a factor on eta, for schedules.
    momentum: with 0 M is the gradient and the rule the paper's; more is a variant of it.
    Other arguments as in `ProductNormDescent`, `Coupling`. Keeps W_0, as large as the parameters, and all directions
    of a step at once. This is not all of Prodigy, whose averages weight gradients by eta.
    """

    def __init__(
        self,
        params: Params,
        lr: Number = 1.0,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        initial_step: float = 1e-6,
        norm: Literal["spectral", "sign"] = "spectral",
        adjust_lr_fn: str | None = None,
        *,
        polar: Polar = "auto",
        **extra: Unpack[Coupling],
    ) -> None:
        if norm not in ("spectral", "sign"):
            raise ValueError(f"norm {norm!r} is not known; use 'spectral' or 'sign'")
        if not initial_step > 0:
            raise ValueError(f"initial_step should be > 0, far below any good step, but is: {initial_step}")
        self.norm, self.initial_step = norm, initial_step
        own = _own(lr, weight_decay, (momentum, 0.0), 0.0, adjust_lr_fn, polar)
        super().__init__(params, own, extra, product=ProductNorm("max"), scale="lmo", others="sign")

    def direction(self, group: Group) -> Direction:
        return polar_of(group) if self.norm == "spectral" else Sign()

    def _couples(self) -> bool:
        return True

    def _stale(self, recipe: Recipe) -> bool:
        return False

    def _factors(self, layers: Sequence[Layers]) -> list[Number]:
        gain = torch.zeros((), dtype=torch.float64, device=self._device)
        for each in layers:
            observed = each.observed
            recipe, batch = observed.recipe, observed.batch
            for p, g, state, finite, place in zip(
                batch.params, observed.grads, batch.states, observed.finite, batch.places, strict=True
            ):
                w, m = recipe.rounding.value(p, state), recipe.momentum_of(state, g, observed.hyper)
                start = self._state_at(place)[START].to(w.dtype)
                gain = gain + torch.where(finite, _dot(m, start - w), 0)
        eta = self._shared_state()[STEP_SIZE]
        eta.copy_(escalated(eta, gain, self.product.dual_norm(*self._dual_norms(layers))))
        return [eta for _ in layers]

    def _fresh_shared_state(self) -> State:
        size = torch.full((), self.initial_step, dtype=torch.float64, device=self._device)
        return {**super()._fresh_shared_state(), STEP_SIZE: size}

    def _own_state(self, p: Tensor, group: Group) -> State:
        start = {} if START in self.state[p] else {START: p.detach().clone()}
        return {**super()._own_state(p, group), **start}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "norm": self.norm, "initial_step": self.initial_step}
