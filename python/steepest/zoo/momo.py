"""Momo: a step of any method, cut where a model of the loss meets a lower bound.

A step has two halves: every momentum takes its gradient, then what all layers measured decides how far each one goes;
see `steepest.step.coupling`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, overload

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops.multi_tensor import Scaling
from ..optimizer import MatrixOptimizer
from ..optimizer.checkpoint_state import Kept, Missing, refuse_incomplete
from ..optimizer.group_options import (
    Group,
    as_it_is,
    number,
    refuse_cautious_update,
    refuse_decay_methods,
    refuse_option,
    refuse_schedule_free,
    same,
)
from ..optimizer.option_types import check_option, check_options
from ..parts import Momentum, Number
from ..parts.product_norm import truncation
from ..recipe import Recipe, State
from ..sharding.local import is_sharded, local_tensor
from ..step.coupling import Coupling, dot, inner_products
from ..step.executor import Directed, Executor
from ..step.parameter import Matrices, Parameter, signed_gradient
from ..step.plan import Plan

# State of every parameter: the dual norms of its matrices when they last moved; the average of <W, G>.
DESCENT, INNER = "descent", "inner_average"
# State of the first parameter, for all of them: the average of the loss and its weights' sum; how many losses.
LOSS, LOSSES = "loss_average", "losses"


@dataclass(frozen=True)
class Layers:
    """What the matrices of a group say before they move.

    dual_norms: (k,) fp64, of every matrix in the norm in which its step is as the recipe says with the shape's ratio of
    the learning rate; 0 where the step is not taken.   tangents: <W, G> of every parameter, 0-d fp64, where there is a
    lower bound.
    """

    recipe: Recipe | None
    parameters: Sequence[Parameter]
    dual_norms: Tensor
    tangents: Sequence[Tensor] = ()

    def decrease(self, factor: Number) -> Tensor:
        """Sum of <M, U> over the matrices, U the step of each times factor: 0-d."""
        if self.recipe is None or self.recipe.scale == "lmo":
            return self.dual_norms.sum() * factor
        return (self.dual_norms * factor * self.dual_norms).sum()  # a square may be no number


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
        None is True, as the authors have it, but for `ProductNormDescent` and `Schattor`.
    reduce_loss: where torch.distributed is initialised, the loss is averaged over all processes of the default group,
        so that ranks with a batch each agree; with False it must be the same on all of them.

    The loss is that of the step's gradients, not scaled by a GradScaler. One that is not finite, and a step in which no
    gradient is, leave the average as it was. Nothing waits for the device; a loss that is a tensor stays one. The
    averages are in the state, the loss's in that of the first parameter. Parameters are on one device. Costs two passes
    over weights and momenta for the inner products; torch.compile leaves the step alone. Source: arXiv:2510.09827,
    whose code this follows but for (.)_+, without which a step may ascend.
    """

    carried: ClassVar[tuple[str, ...]] = ("lower_bound", "stale_dual", "reduce_loss", "_told")
    common_state: ClassVar[tuple[str, ...]] = (LOSS, LOSSES)
    lower_bound: Number | None = None
    #: what stale_dual=None means for a class
    stale_dual: bool = True
    _loss: Number | None = None
    #: the bound that was last checked
    _checked: Any = None
    argument_lines: ClassVar[dict[str, str]] = {
        "args": "of the method that stands beside this class",
        "kwargs": "of the method that stands beside this class",
    }

    def __init__(
        self,
        *args: Any,
        lower_bound: Number | None = 0.0,
        stale_dual: bool | None = None,
        reduce_loss: bool = True,
        **kwargs: Any,
    ) -> None:
        self.lower_bound = check_option("lower_bound", lower_bound)
        self._checked = as_it_is(self.lower_bound)
        stale_dual = type(self).stale_dual if stale_dual is None else stale_dual
        self.stale_dual = check_option("stale_dual", stale_dual)
        self.reduce_loss = check_option("reduce_loss", reduce_loss)
        self._moved: set[Tensor] = set()
        self._told: list[Number] = []
        super().__init__(*args, **kwargs)

    # ---- the step -------------------------------------------------------------------------------------------------

    @overload  # type: ignore[override]
    def step(self, closure: None = None, *, loss: Number | None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float], *, loss: Number | None = None) -> float: ...
    @torch._disable_dynamo
    def step(self, closure: Callable[[], float] | None = None, *, loss: Number | None = None) -> float | None:
        """One step. loss: of the gradients there are, a number or a tensor of one element; by default the closure's.

        Without a lower bound the loss is not looked at.
        RuntimeError where there is a lower bound and no loss, unless every lr is 0: such a step only makes the state.
        """
        if closure is None and loss is None and self._told:
            loss = sum(self._told) / len(self._told)
        self._told.clear()
        if (error := self._wrong(loss, closure)) is not None:
            self.refuse_together(error)
            raise error
        if closure is None and loss is None and self.lower_bound is not None:
            loss = math.nan
        self._loss = loss
        try:
            return self.step_without_hooks(closure)
        finally:
            self._loss = None

    def _wrong(self, loss: Number | None, closure: Callable[[], float] | None) -> Exception | None:
        """What is wrong with the loss that a step is given."""
        if isinstance(loss, Tensor) and loss.numel() != 1:
            return ValueError(f"the loss should have one element but has {loss.numel()}: give its mean")
        if closure is not None or loss is not None or self.lower_bound is None:
            return None
        try:
            self.check_numbers()
        except (TypeError, ValueError) as error:
            return error
        if all(float(group["lr"]) == 0 for group in self.param_groups):
            return None
        return RuntimeError(
            f"{type(self).__name__} has a lower bound and needs the loss: step(loss=loss), step(closure), "
            "tell_loss(loss) before the step, or lower_bound=None"
        )

    def tell_loss(self, loss: Number) -> None:
        """Has the next step take this loss, where a wrapper's step takes none; of several micro-batches, their mean."""
        self._told.append(loss.detach() if isinstance(loss, Tensor) else loss)

    def couples(self) -> bool:
        return self.lower_bound is not None

    def check_numbers(self) -> None:
        super().check_numbers()
        if not same(as_it_is(self.lower_bound), self._checked):
            values = {"lower_bound": self.lower_bound}
            check_options(values, on_host=True)
            self.lower_bound = values["lower_bound"]
            self._checked = as_it_is(self.lower_bound)

    def _factors(self, layers: Sequence[Layers]) -> list[Number]:
        """What each group's step is multiplied by, but for the truncation."""
        return [1.0 for _ in layers]

    def _stale(self, recipe: Recipe) -> bool:
        """Whether dual norms may be those of the previous step."""
        return self.stale_dual and recipe.direction.batched

    def take_step(self, scaling: Scaling, loss: Number | None) -> None:
        if self.couples():
            loss = loss if self._loss is None else self._loss
            if loss is None and self.lower_bound is not None:
                error = RuntimeError("the closure returned None: let it return the loss")
                self.refuse_together(error)
                raise error
        return super().take_step(scaling, loss)

    def plan_depends_on(self) -> Sequence[object]:
        return [*super().plan_depends_on(), self.lower_bound is None]

    def coupling(self, plan: Plan, loss: Number | None) -> Coupling | None:
        return Truncated(self, plan, loss) if self.couples() and plan.parameters else None

    def _share_of(self, layers: Sequence[Layers], loss: Number | None) -> list[Number]:
        """What each group's step is multiplied by."""
        factors = self._factors(layers)
        if self.lower_bound is None:
            return factors
        assert loss is not None
        t = self._truncation(layers, factors, self._loss_on_device(loss))
        return [factor * t for factor in factors]

    def _descent(self, item: Matrices) -> Tensor:
        """A view of the dual norms of an item's matrices in the state of its parameter."""
        p = item.parameter
        sizes = [p.recipe.input_shape(piece.shape)[0] for piece in p.pieces]
        if DESCENT not in p.state:
            p.state[DESCENT] = _unknown(sum(sizes), p.source)
        first = sum(sizes[: item.number])
        return p.state[DESCENT][first : first + sizes[item.number]]

    def _has_moved(self, p: Parameter) -> bool:
        """Whether the dual norms of a step before are known. Sharded parameters have them from the beginning on,
        negative until they are known; that is read from the device.
        """
        if DESCENT not in p.state:
            self._moved.discard(p.source)  # whose state somebody has cleared
        elif p.source not in self._moved:
            known = p.sharding is None or not bool((p.state[DESCENT] < 0).any())
            self._moved.update([p.source] if known else [])
        return p.source in self._moved

    # ---- the model of the loss ------------------------------------------------------------------------------------

    def _truncation(self, layers: Sequence[Layers], factors: Sequence[Number], loss: Tensor) -> Tensor:
        """Momo's t of this step, 0-d; the averages take the loss and <W, G>."""
        decrease = torch.zeros_like(loss)
        for each, factor in zip(layers, factors, strict=True):
            for p in each.parameters[:1]:
                decrease = decrease + each.decrease(factor) * p.step_values.hyper.lr
        parameters = [p for each in layers for p in each.parameters]
        value, weight, known = self._average_loss(parameters, loss)
        for each in layers:
            value = value + self._linear_part(each.parameters, each.tangents)
        assert self.lower_bound is not None
        above = value - weight * number(self.lower_bound)
        return torch.where(known & above.isfinite(), truncation(above, decrease), 1.0)

    def _average_loss(self, parameters: Sequence[Parameter], loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(average loss, sum of its weights, whether there has been a loss), all 0-d, with this one."""
        momentum, hyper = _momentum(parameters[0]), parameters[0].step_values.hyper
        state = self._shared_state()
        average, count = state[LOSS], state[LOSSES]
        taken = torch.stack([p.step_values.finite for p in parameters]).any() & loss.isfinite()
        given = torch.where(taken, torch.stack([loss, torch.ones_like(loss)]), average)
        begun = hyper.beginning(count) if momentum.start == "first" else hyper
        average.copy_(torch.where(taken, momentum.observe(average, given, begun.beta1), average))
        count.add_(taken)
        value, weight = momentum.read(average, given, hyper.beta1, count).unbind()
        return value, weight, count > 0

    def _linear_part(self, parameters: Sequence[Parameter], tangents: Sequence[Tensor]) -> Tensor:
        """Sum of <W, M> - (average of <W, G>) over the parameters that step. tangents: <W, G> of each."""
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        pairs = []
        for p in parameters:
            g, hyper = p.step_values.grad, p.step_values.hyper
            pairs.append((p, p.value(), p.recipe.momentum_of(p.state, g, hyper)))
        for p, now, of_momentum in zip(parameters, tangents, inner_products(pairs), strict=True):
            momentum, hyper, finite, step = _momentum(p), p.step_values.hyper, p.step_values.finite, p.state.get("step")
            average, begun = p.state[INNER], hyper
            if momentum.start == "first":
                assert step is not None
                begun = hyper.beginning(step - 1)
            average.copy_(torch.where(finite, momentum.observe(average, now, begun.beta1), average))
            part = of_momentum - momentum.read(average, now, hyper.beta1, step)
            total = total + torch.where(finite, part, 0)
        return total

    def _loss_on_device(self, loss: Number) -> Tensor:
        """0-d fp64, the mean over processes."""
        device = self._device
        if not isinstance(loss, Tensor):
            mean = torch.full((), loss, dtype=torch.float64, device=device)
        else:
            mean = loss.detach().reshape(()).to(device, torch.float64, non_blocking=device.type == "cuda", copy=True)
        if self.reduce_loss and dist.is_available() and dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        return mean

    # ---- state ----------------------------------------------------------------------------------------------------

    @property
    def _device(self) -> torch.device:
        return self._first.device

    @property
    def _first(self) -> Tensor:
        return next(p for group in self.param_groups for p in group["params"])

    def kept_state(self, p: Tensor, group: Group) -> dict[str, Kept]:
        """What the model of the loss and the coupling keep; both may have been turned on since the checkpoint."""
        recipe = self.recipe_of(group)
        count = sum(recipe.input_shape(piece.shape)[0] for piece in self.pieces_of(p, group))
        bounded: Missing = "leave" if self.lower_bound is None else "begin"
        stale: Missing = "begin" if self.couples() and self._stale(recipe) else "leave"
        return {
            **super().kept_state(p, group),
            DESCENT: Kept((count,), missing=stale, later=True),
            INNER: Kept((), missing=bounded),
            LOSS: Kept((2,), missing=bounded),
            LOSSES: Kept((), ">= 0", whole=True, missing=bounded),
        }

    def check_loaded(self, state: Mapping[Any, Mapping[str, Any]]) -> None:
        """ValueError for a part of the model of the loss."""
        there = {key for tensors in state.values() for key in (LOSS, LOSSES, INNER) if key in tensors}
        lacking = [key for key in (LOSS, LOSSES) if there and key not in there]
        refuse_incomplete(dict.fromkeys(sorted(there)), "all parameters", lacking, type(self).__name__)
        super().check_loaded(state)

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

    def _new_state(self, p: Tensor, group: Group) -> State:
        """What a parameter's state has besides its recipe's, when it begins; its momentum may have begun before."""
        if self.lower_bound is None or INNER in self.state[p]:
            return {}
        inner = dot(local_tensor(p.detach()), self.state_here(p)[self.recipe_of(group).keys[0]])
        self.sum_over_parts(p, inner)
        return {INNER: inner}

    def extra_state(self, p: Tensor, group: Group) -> State:
        fresh, recipe = self._new_state(p, group), self.recipe_of(group)
        if is_sharded(p) and self.couples() and self._stale(recipe) and DESCENT not in self.state[p]:
            count = sum(recipe.input_shape(piece.shape)[0] for piece in self.pieces_of(p, group))
            fresh[DESCENT] = _unknown(count, p)
        if p is self._first:
            return {**fresh, **{key: t for key, t in self._fresh_shared_state().items() if key not in self.state[p]}}
        if fresh:
            self._shared_state()
        return fresh

    def check_parameters(self, group: Group) -> None:
        super().check_parameters(group)
        devices = list(dict.fromkeys(p.device for each in self.param_groups for p in each["params"]))
        if len(devices) > 1:
            raise ValueError(
                f"{type(self).__name__} couples all layers by numbers on one device, but parameters are on "
                f"{' and '.join(map(str, devices))}: make one optimizer for each device"
            )

    def check_values(self, group: Group) -> None:
        super().check_values(group)
        self.check_values_of_others(group)
        if group["maximize"] and self.lower_bound is not None:
            raise ValueError("maximize=True has no lower bound: minimize the negative loss")
        recipe = self.recipe(group)
        reads = recipe.momentum is not None and recipe.momentum.interpolated
        if recipe.transforms or recipe.submatrix is not None or recipe.reads_weight or reads:
            raise ValueError(
                f"{type(self).__name__} couples steps along a direction of the momentum, and grafts, normalized "
                "updates, steps of a submatrix, momentum of updates, Lion's reading of it and decay inside the model "
                "take other ones"
            )

    def check_values_of_others(self, group: Group) -> None:
        super().check_values_of_others(group)
        refuse_cautious_update(group, "it couples layers by steps along their whole directions")
        if self.lower_bound is not None:
            refuse_schedule_free(group, "Momo's model of the loss is of steps from the weights themselves")
            refuse_option(group, "variance_reduction", "Momo's model of the loss is of its gradients")
            refuse_decay_methods(group, "Momo's model of the loss knows no penalty", "l2")

    def forget(self) -> None:
        super().forget()
        self._moved = set()


class Truncated:
    """The coupling of a step: it measures layers, keeps directions that are dear, and tells how far each group goes."""

    def __init__(self, optimizer: Momo, plan: Plan, loss: Number | None) -> None:
        self._optimizer, self._plan, self._loss = optimizer, plan, loss
        self._kept: dict[tuple[int, int], Directed] = {}
        self._tangents: dict[Tensor, Tensor] = {}

    def allowed(self, parameters: Sequence[Parameter], scaling: dict[torch.device, Scaling]) -> Sequence[Tensor] | None:
        """Whether <W, G>, which is averaged, is finite."""
        if self._optimizer.lower_bound is None:
            return None
        pairs = []
        for p in parameters:
            g = signed_gradient(p.grad, p.options.maximize, scaling[p.source.device].grad_scale)
            pairs.append((p, p.value(), g))
        products = inner_products(pairs)
        self._tangents = {p.source: product for p, product in zip(parameters, products, strict=True)}
        return [product.isfinite() for product in products]

    def factors(self, executors: Sequence[Executor]) -> list[Number]:
        norms: list[list[Tensor]] = [[] for _ in self._optimizer.param_groups]
        for executor in executors:
            for batch in executor.batches():
                for item, norm in self._measured(executor, batch):
                    wide = norm.double() * (item.ratio if item.recipe.scale == "lmo" else math.sqrt(item.ratio))
                    norms[item.parameter.group].append(torch.where(item.finite, wide, 0))
        none = torch.zeros(0, dtype=torch.float64, device=self._optimizer._device)
        layers = []
        for at, parts in enumerate(norms):
            parameters = [p for executor in executors for p in executor.parameters if p.group == at]
            recipe = parameters[0].recipe if parameters else None
            tangents = [self._tangents[p.source] for p in parameters if self._tangents]
            layers.append(Layers(recipe, parameters, torch.cat([none, *parts]), tangents))
        return self._optimizer._share_of(layers, self._loss)

    def _measured(self, executor: Executor, batch: Any) -> list[tuple[Matrices, Tensor]]:
        """Every item of a batch with its dual norms: of the step before where those are there and will do."""
        items = _items(executor, batch)
        optimizer = self._optimizer
        stale = [
            optimizer._descent(item) if optimizer._stale(item.recipe) and optimizer._has_moved(item.parameter) else None
            for item in items
        ]
        known = [(item, norm) for item, norm in zip(items, stale, strict=True) if norm is not None]
        if len(known) == len(items):
            return known
        directed = self._plan.directed(executor, batch)
        assert directed.norms is not None
        # Directions that are not batched are cheaper made twice than kept.
        if any(item.recipe.direction.batched for item in items):
            self._kept[id(executor), id(batch)] = directed
        return [
            (item, new if old is None else old) for item, old, new in zip(items, stale, directed.norms, strict=True)
        ]

    def directed(self, executor: Executor, batch: Any) -> Directed | None:
        return self._kept.pop((id(executor), id(batch)), None)

    def moving(self, executor: Executor, batch: Any, directed: Directed) -> None:
        assert directed.norms is not None
        for item, norm in zip(_items(executor, batch), directed.norms, strict=True):
            if self._optimizer._stale(item.recipe):
                stored = self._optimizer._descent(item)
                before = stored if item.parameter.source in self._optimizer._moved else torch.zeros_like(stored)
                stored.copy_(torch.where(item.finite, norm.to(stored.dtype), before))


def _items(executor: Executor, batch: Any) -> list[Matrices]:
    return [item for some in executor.items(batch) for item in some]


def _momentum(p: Parameter) -> Momentum:
    assert p.recipe.momentum is not None
    return p.recipe.momentum


def _unknown(count: int, p: Tensor) -> Tensor:
    return torch.full((count,), -1.0, dtype=torch.float64, device=p.device)
