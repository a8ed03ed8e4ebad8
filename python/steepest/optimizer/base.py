"""The `torch.optim` shell: groups, state, closures and checkpoints around `steepest.step.Plan`.

A `MatrixOptimizer` holds two kinds of group: those with use_muon=True take the class's own recipe, those with
use_muon=False take AdamW. One object, one `step`, one learning-rate scheduler for a whole model.
"""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..matrices import Piece
from ..ops.multi_tensor import Scaling
from ..parts import Number
from ..recipe import Recipe, State
from ..step import Parameter
from ..step.modes import in_default_modes
from .group_options import Group
from .groups import Params
from .stale import StaleParameters
from .step_hooks import hooked
from .traced_plans import TracedPlans
from .weights import Weights
from .wrappers import asking_scaler, is_asked_for_state
from .zero import check_zero

__all__ = ["MatrixOptimizer"]

# What a method may override that has a say in a step between its plan and the next.
IN_A_STEP = ("take_step", "check_numbers", "couples", "coupling", "plan_depends_on", "hyper_of_others")


class MatrixOptimizer(TracedPlans):
    """Base of the named optimizers: a subclass gives `recipe(group)` and `hyper(group)` for its matrices.

    params: a module or named parameters (routed by `steepest.param_groups`), an iterable of tensors (routed by shape),
        or an iterable of groups, where use_muon=False sends a group to AdamW.
    defaults: group values of the matrix method.   adamw: group values of AdamW groups (lr, betas, eps, weight_decay).
    """

    carried: ClassVar[tuple[str, ...]] = ("_adamw_defaults", "_reasons", "_skipped")
    #: whether the constructor has come as far as to tell other ranks of its errors
    _is_begun = False
    #: whether all groups are there that it was made with
    _is_made = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            cls.__init__ = _refusing_together(cls.__init__)  # type: ignore[method-assign]

    def __init__(self, params: Params, defaults: Group, adamw: Group) -> None:
        if isinstance(params, Iterator):
            params = list(params)
        self._adamw_defaults = dict(adamw)
        self._reasons: dict[Tensor, str] = {}
        self._skipped: dict[torch.device, Tensor] = {}
        self._recipes, self._numbers = {}, {}
        self._staleness = StaleParameters(type(self).__name__, params)
        self._begin_shards()
        self._weight_hooks: OrderedDict[int, Callable[[Weights], None]] = OrderedDict()
        self._is_made, self._is_begun = False, True
        with self._telling("the constructor", params, defaults.get("share_work")):
            check_zero(type(self).__name__, self.split_group)
            self._check_options(defaults)
            self._check_options(self._adamw_defaults, prefix="adamw_")
            self._check_values({**defaults, "use_muon": True})
            super().__init__(self._groups(params), {**defaults, "use_muon": True})
        self._is_made = True
        self._begin_state("the constructor")

    def add_param_group(self, param_group: Group) -> None:
        if not self._is_made:
            super().add_param_group(param_group)
            return
        before = len(self.param_groups)
        with self._telling("add_param_group()", param_group):
            super().add_param_group(param_group)
        try:
            self._begin_state("add_param_group()")
        except Exception:
            del self.param_groups[before:]
            raise

    def _tell_before_it_is_made(self, error: Exception, params: Any, options: Mapping[str, Any]) -> None:
        """Tells the ranks that share these parameters, and are making the optimizer, why this one does not."""
        self._begin_shards()
        params = list(params) if isinstance(params, Iterator) else params
        with contextlib.suppress(Exception), self._telling("the constructor", params, options.get("share_work")):
            raise error

    def _begin_state(self, call: str) -> None:
        """Makes the state of sharded parameters, so that every rank has, and names, the same in a checkpoint."""
        if self._has_shards:
            self._name_collectives(call)
            self._check_agreement(self._sharded_rows())
            self.init_state()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether unscaling and skipping are left to the step, which does both on the device: by a GradScaler."""
        return asking_scaler() is not None

    # ---- the step -------------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @hooked
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step. closure: re-evaluates the model and returns the loss, which is returned."""
        return self.step_without_hooks(closure)

    def step_without_hooks(self, closure: Callable[[], float] | None) -> float | None:
        """`step` for a subclass whose `step` takes more: torch puts hooks around every `step` of a class or a base."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = self._loss_of_all(closure) if self._has_shards else closure()
        if self._repeated is None or self._weight_hooks or not self._repeated.take(self):
            self._step(loss)
        return loss

    @in_default_modes
    def _step(self, loss: Number | None) -> None:
        self._refuse_averages()
        scaling = Scaling(getattr(self, "found_inf", None), getattr(self, "grad_scale", None))
        if torch.compiler.is_compiling():
            self._traced_step(scaling)
        elif not self.state and is_asked_for_state():
            self._init_states(
                [(p, p.dtype, group) for group in self.param_groups for p in group["params"] if p.requires_grad]
            )
        else:
            self.take_step(scaling, loss)

    def _traced_step(self, scaling: Scaling) -> None:
        """The step as torch.compile sees it."""
        plan, hypers = self._traced_plan(), [self._hyper(group) for group in self.param_groups]
        plan.step(hypers, scaling)
        self._run_weight_hooks(plan.parameters)
        plan.take_averages(hypers)

    def _steps_by_plan_alone(self) -> bool:
        return all(getattr(type(self), name) is getattr(MatrixOptimizer, name) for name in IN_A_STEP)

    @torch._disable_dynamo  # of sharded parameters, which `_traced_step` refuses: their step is not compiled piecemeal
    def take_step(self, scaling: Scaling, loss: Number | None) -> None:
        plan = self.ready_plan()
        try:
            hypers = [self._hyper(group) for group in self.param_groups]
            plan.step(hypers, scaling, self.coupling(plan, loss), self._lacking)
            self._run_weight_hooks(plan.parameters)
            plan.take_averages(hypers)
        finally:
            self._return_gradients()
        self._staleness.count(bool(plan.parameters), self.param_groups)

    def register_weight_hook(self, hook: Callable[[Weights], None]) -> RemovableHandle:
        """Has hook(weights) called at the end of every step, after all weights have moved, inside a captured or a
        compiled step too; see `Weights`. The handle's remove() ends it.
        """
        handle = RemovableHandle(self._weight_hooks)
        self._weight_hooks[handle.id] = hook
        return handle

    def _run_weight_hooks(self, parameters: Sequence[Parameter]) -> None:
        if self._weight_hooks:
            weights = Weights({p.source: p for p in parameters})
            for hook in list(self._weight_hooks.values()):
                hook(weights)

    @in_default_modes
    def init_state(self) -> None:
        """Creates the state of every parameter now, as if each had a zero gradient, without a step."""
        self._init_states([(p, p.dtype, group) for group in self.param_groups for p in group["params"]])

    @in_default_modes
    def prepare(self) -> set[str]:
        """Makes state and plan for the gradients there are, without a step; the backends it will run on. With sharded
        parameters all ranks call this together.
        """
        try:
            return self.ready_plan().backends
        finally:
            self._return_gradients()

    def forget(self) -> None:
        self._recipes, self._numbers, self._plan, self._agreed, self._lacking = {}, {}, None, None, None
        self._repeated = None
        self._begin_shards()
        # Of a copy: hooks stay with the original, as torch's do.
        self.__dict__.setdefault("_weight_hooks", OrderedDict())
        self.__dict__.setdefault("_staleness", StaleParameters(type(self).__name__))

    def make_capturable(self) -> None:
        """Sets capturable in every group and puts its numbers on the device, as the argument of that name does.

        RuntimeError, with the reason, for a group whose step a CUDA graph cannot hold.
        """
        self.check_numbers()
        for number, group in enumerate(self.param_groups):
            direction, why = self._recipe(group).direction, None
            if self._has_shards:
                why = "ranks share its parameters and agree on the host; call its step outside of the graph"
            if self._recipe(group).kronecker is not None:
                why = "the host decides when its bases are refreshed; call its step outside of the graph"
            if not all(direction.capturable(p.dtype, p.device) for p in group["params"]):
                why = (
                    f"{direction} reads from the device; choose products: polar='auto', or method='matmul' in Schattor"
                )
            device = group["params"][0].device if group["params"] else None
            others = [key for key in ("momentum", "betas", "eps") if _elsewhere(group.get(key), device)]
            if others:
                why = f"{others[0]} is a tensor on another device than {device}; move it there or make it a number"
            if group["params"] and why is not None:
                raise RuntimeError(f"group {number} cannot be captured in a CUDA graph: {why}")
        for group in self.param_groups:
            group["capturable"] = True
            self._numbers_on_device(group)

    # ---- what a method may ask for ----------------------------------------------------------------------------------

    def recipe_of(self, group: Group) -> Recipe:
        """The recipe of a group of any rule, the same object until a value it may depend on changes."""
        return self._recipe(group)

    def pieces_of(self, p: Tensor, group: Group) -> tuple[Piece, ...]:
        """The pieces that a parameter is read as; a matrix that is not cut is one."""
        return self._pieces(p, group)

    def state_here(self, p: Tensor) -> State:
        """A parameter's state as its step sees it: of a sharded one what of it lies here."""
        return self._state_here(p)

    def state_like(self, p: Tensor, here: Tensor) -> Tensor:
        """State of a parameter's shape from what of it lies here: of a sharded parameter a DTensor."""
        return self._like(p, here)

    def sum_over_parts(self, p: Tensor, t: Tensor) -> None:
        """Adds up, in place, what ranks have found of their parts of a parameter; collective if it is sharded."""
        sharding = self._sharding(p)
        if sharding is not None:
            sharding.ranks.sum_parts(t)

    def init_state_of(self, p: Tensor, group: Group) -> None:
        """Creates the state of a parameter now, if it has none yet."""
        self._init_states([(p, p.dtype, group)])


def _refusing_together(init: Callable[..., None]) -> Callable[..., None]:
    """A constructor of which an error is one of all ranks that share parameters, also where it comes before that of
    `MatrixOptimizer`, as for an argument that the class does not have.
    """

    @functools.wraps(init)
    def __init__(self: MatrixOptimizer, *args: Any, **kwargs: Any) -> None:  # noqa: N807  # `check_zero` looks for it
        try:
            init(self, *args, **kwargs)
        except Exception as error:
            if type(self).__init__ is __init__ and not self._is_begun:  # the outermost, which has what was given
                self._tell_before_it_is_made(error, args[0] if args else kwargs.get("params"), kwargs)
            raise

    return __init__


def _elsewhere(value: Any, device: torch.device | None) -> bool:
    values = value if isinstance(value, (tuple, list)) else (value,)
    return any(isinstance(each, Tensor) and each.device != device for each in values)
