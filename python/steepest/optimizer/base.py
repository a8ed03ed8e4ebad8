"""The `torch.optim` shell: groups, state, closures and checkpoints around `steepest.step.Plan`.

A `MatrixOptimizer` holds two kinds of group: those with use_muon=True take the class's own recipe, those with
use_muon=False take AdamW. One object, one `step`, one learning-rate scheduler for a whole model.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from types import MappingProxyType
from typing import Any, ClassVar, cast, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils.hooks import RemovableHandle

from ..chunking import default_workspace
from ..matrices import Piece
from ..ops.backend import requested
from ..ops.multi_tensor import Scaling
from ..parts import Number
from ..parts.blockwise import scale_key
from ..recipe import Recipe, State
from ..step import Parameter, Plan, StepOptions
from ..step.checks import check_gradient, check_state, refuse_capture
from ..step.executor import Executor
from ..step.modes import in_default_modes
from ..step.plan import route
from ..step.state_storage import stack
from ..step.working_state import WorkingState
from .constraints import RADIUS, Constraints
from .group_options import Group, parameter_name, refuse_option
from .groups import Params
from .missing_gradients import AgreedStep, layouts_of
from .plan_key import entries
from .repeated import RepeatedStep
from .reports import Reports
from .shards import SAME_STEP
from .stale import StaleParameters, level_of_caller
from .step_hooks import hooked
from .weights import Weights
from .wrappers import asking_scaler, is_asked_for_state
from .zero import check_zero

__all__ = ["MatrixOptimizer"]

# What a method may override that has a say in a step of AdamW's groups.
IN_A_STEP = ("take_step", "check_numbers", "couples", "coupling", "plan_depends_on", "hyper_of_others")


class MatrixOptimizer(Reports, Constraints):
    """Base of the named optimizers: a subclass gives `recipe(group)` and `hyper(group)` for its matrices.

    params: a module or named parameters (routed by `steepest.param_groups`), an iterable of tensors (routed by shape),
        or an iterable of groups, where use_muon=False sends a group to AdamW.
    defaults: group values of the matrix method.   adamw: group values of AdamW groups (lr, betas, eps, weight_decay).
    """

    carried: ClassVar[tuple[str, ...]] = ("_adamw_defaults", "_reasons", "_skipped")
    _plan_key: Sequence[object] = ()
    #: where steps with this plan are one call
    _repeated: RepeatedStep | None = None
    #: what ranks have last agreed to step, where they do not agree in every step
    _agreed: AgreedStep | None = None
    #: of the executors of this step the parameters that a rank has no gradient of
    _lacking: Mapping[Executor, Tensor] | None = None
    #: gradients that this step is taken without, or None where it is taken with zeros
    _put_aside: Mapping[Tensor, Tensor | None] = MappingProxyType({})
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

    def _loss_of_all(self, closure: Callable[[], float]) -> float:
        """The closure's loss; where it raises, the others, which are about to wait for this rank, are told, unless it
        was a collective that failed.
        """
        try:
            return closure()
        except Exception as error:
            if not isinstance(error, dist.DistError):
                self.refuse_together(error)
            raise

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

    def _check_state_bits(self, group: Group) -> None:
        if self.couples():
            why = "layers wait for one another, and all state would be decoded at once: momentum_dtype=torch.bfloat16"
            refuse_option(group, "state_bits", why)

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

    def _agreed_plan(self) -> Plan:
        """`_ready_plan` of sharded parameters: no rank goes on where one cannot, or is about to do something else.

        On the host in every step; on a device, which would have to be waited for, when no rank goes on with its plan.
        """
        refuse_capture("its parameters are sharded, and ranks agree on the host")
        self._return_gradients()
        self._name_collectives("the step")
        return self._plan_of_all() if self._agrees_on_host else self._plan_on_device()

    def _plan_of_all(self) -> Plan:
        """The plan of this step, once all ranks have found theirs to be the same."""
        before = self._plan
        self._sum_partial_gradients(compare=True)
        try:
            plan = self._ready_plan()
        except Exception as error:
            self._check_agreement(None, error)
            raise
        self._check_agreement(self._gradients_there() if plan is before else self._sharded_rows())
        return plan

    def _plan_on_device(self) -> Plan:
        """The plan of this step without a wait where it serves; see `steepest.optimizer.missing_gradients`."""
        error, serves = None, False
        try:
            self._ready_numbers()
            serves = self._plan_serves()
        except Exception as raised:
            error = raised
        agreed = self._agreed
        goes_on, lacking = self._agreement.any(serves, {} if agreed is None else agreed.lacked())
        if not serves and (goes_on is None or not goes_on):
            return self._newly_agreed_plan()
        if error is not None:
            raise error
        assert agreed is not None
        if not serves:
            self._put_aside = agreed.lend(self._shared_names(), type(self).__name__)
        try:
            self._sum_partial_gradients(compare=False)
            plan = cast(Plan, self._plan) if serves else self._ready_plan()
            if not serves and not agreed.is_step_of(plan):
                self._plan = None
                raise RuntimeError(
                    f"{type(self).__name__}: what this rank steps has changed, and what another rank steps has not: "
                    f"{SAME_STEP}"
                )
        except Exception:
            self._return_gradients()
            raise
        self._lacking = agreed.of_executors(plan, lacking)
        return plan

    def _newly_agreed_plan(self) -> Plan:
        """`_plan_of_all`, which is remembered as what ranks have agreed on."""
        names = self._shared_names()
        layouts = layouts_of(list(names))
        self._lacking = None
        try:
            plan = self._plan_of_all()
        except Exception:
            self._plan = None  # which is not the others'
            raise
        self._agreed = AgreedStep(plan, layouts, {p: self._peers_of(p) for p in names})
        return plan

    def _return_gradients(self) -> None:
        """Gives parameters the gradients again that the step was taken without."""
        for p, g in self._put_aside.items():
            p.grad = g
        self._put_aside = MappingProxyType({})

    def _sharded_rows(self) -> list[tuple[str, ...]]:
        """The rows of parameters and options, and of a plan what steps each parameter: collectives follow that."""
        chosen = (
            [] if self._plan is None else [(p, each.backend) for each in self._plan.executors for p in each.parameters]
        )
        return super()._sharded_rows() + [
            (f"{parameter_name(self.param_groups[p.group], p.index)} (group {p.group})", f"stepped by {backend}")
            for p, backend in sorted(chosen, key=lambda each: (each[0].group, each[0].index))
            if p.sharding is not None
        ]

    def _ready_plan(self) -> Plan:
        """The plan of this step; every check is made, before the first write, when there is none for it yet, and that
        of numbers whenever they have changed.
        """
        self._ready_numbers()
        if not self._plan_serves():
            refuse_capture("what it steps has changed since the last step: take one with these gradients first")
            self._plan = self._repeated = None
            self._staleness.compare(self.param_groups)
            for number, group in enumerate(self.param_groups):
                self._check_step(number, group)
            self._plan = self._new_plan()
            self._plan_key = list(self._key())
            if all(getattr(type(self), name) is getattr(MatrixOptimizer, name) for name in IN_A_STEP):
                self._repeated = RepeatedStep.of(self, self._plan)
        assert self._plan is not None
        if any(recipe.kronecker is not None for recipe in self._plan.recipes):
            refuse_capture("the host decides when its bases are refreshed")
        return self._plan

    def _ready_numbers(self) -> None:
        """Checks the numbers of groups that have changed, and brings them to where they are read."""
        self.check_numbers()
        if not all(group["capturable"] for group in self.param_groups if group["params"]):
            refuse_capture(
                "its learning rate is a number, which the graph would repeat for ever: make the optimizer with "
                "capturable=True, or use steepest.graphed(optimizer)"
            )
        for group in self.param_groups:
            self._numbers_on_device(group)

    def _plan_serves(self) -> bool:
        """Whether the last step's plan is that of this one."""
        return self._plan is not None and all(map(operator.eq, self._plan_key, self._key()))

    def _key(self) -> Iterator[object]:
        """What a plan is made for: its tensors' layouts, and where the state lies, whose views it holds."""
        groups = [
            chain((id(group), self._known_recipe(group)[1]), entries(group["params"], self.state))
            for group in self.param_groups
        ]
        return chain((self.couples(), *self.plan_depends_on(), len(groups)), *groups)

    def _new_plan(self) -> Plan:
        stepping = [
            (number, i, p)
            for number, group in enumerate(self.param_groups)
            for i, p in enumerate(group["params"])
            if p.grad is not None
        ]
        self._init_states([(p, p.grad.dtype, self.param_groups[number]) for number, _, p in stepping])
        parameters = [self._parameter(number, i, p, self._state_here(p)) for number, i, p in stepping]
        return self._plan_of(parameters, traced=False)

    def _plan_of(self, parameters: Sequence[Parameter], *, traced: bool) -> Plan:
        for p in parameters:
            self._counter(p.tensor.device)
        return Plan(
            parameters,
            self._skipped,
            coupled=self.couples(),
            traced=traced,
        )

    def _parameter(self, number: int, index: int, p: Tensor, state: State) -> Parameter:
        """Parameter `index` of group `number` as a step sees it."""
        group, sharding = self.param_groups[number], self._sharding(p)
        room = group["max_workspace_bytes"]
        if room is None:
            room = default_workspace(p.device, shared=sharding is not None)
        options = StepOptions(
            maximize=group["maximize"],
            backend=group["backend"],
            max_workspace_bytes=room,
            # Where layers wait for one another a factor is yet to come; of shared matrices directions travel back.
            fuse_update=group["use_muon"] and group["fuse_update"] and sharding is None and not self.couples(),
        )
        recipe, pieces = self._recipe(group), self._pieces(p, group)
        coded = {name: kind for name, kind in recipe.coded(p.shape, len(pieces)).items() if scale_key(name) in state}
        if recipe.storage is not None and coded:
            state = cast(State, WorkingState(state, recipe.storage, coded))
            # What is decoded at once has one half, the rest of a step the other.
            options = replace(options, max_workspace_bytes=max(options.max_workspace_bytes // 2, 1))
        return Parameter(
            p,
            state,
            recipe,
            pieces,
            group=number,
            index=index,
            options=options,
            sharding=sharding,
            owners=() if sharding is None else self._owners_of(p, group),
        )

    def _check_step(self, number: int, group: Group) -> None:
        """Raises for what a step of this group would stumble over: its values may have changed since it was added."""
        name = type(self).__name__
        if torch.compiler.is_compiling():
            self._check_layout(group)
        else:
            self._check_taken(number, group)
        for i, p in enumerate(group["params"]):
            if p.grad is None:
                continue
            what = f"{parameter_name(group, i)} (group {number}, shape {tuple(p.shape)})"
            check_gradient(name, what, p)
            if isinstance(p, FakeTensor) and self._recipe(group).kronecker is not None:
                raise RuntimeError(
                    f"{name} does not step fake tensors, and {what} is one: the host reads when its bases are "
                    "refreshed; take the step with real tensors, for its state alone init_state() will do"
                )
            if self.state.get(p):
                check_state(self._recipe(group), what, p, self._state_here(p), self._shapes_here(p, group))
            if requested(group["backend"]) != "auto":
                self._backend(p, group)

    def _check_taken(self, number: int, group: Group) -> None:
        """TypeError or ValueError, which names the group, for values that are no values of this method together, or of
        its parameters.
        """
        try:
            self._check_values(group)
            self._check_layout(group)
        except (TypeError, ValueError) as error:
            raise type(error)(f"group {number}: {error}") from error

    def _check_layout(self, group: Group) -> None:
        """ValueError for values that do not go with the parameters of a group that have gradients."""
        requested(group["backend"])
        self._check_devices(group)
        self._check_state_bits(group)
        self.check_parameters(group)
        for p in group["params"]:
            if p.grad is not None:
                self._pieces(p, group)

    def _traced_step(self, scaling: Scaling) -> None:
        """The step as torch.compile sees it: tensor operations and no plan."""
        if self.couples():
            raise RuntimeError(
                f"{type(self).__name__} cannot be part of one graph of torch.compile, its layers wait for one another: "
                "call its step outside of the compiled function"
            )
        if self.extrapolates:
            raise RuntimeError(
                f"{type(self).__name__} cannot be traced by torch.compile: call its step outside of the compiled "
                "function"
            )
        if self._has_shards:
            raise RuntimeError(
                f"{type(self).__name__} cannot be traced by torch.compile with sharded parameters, whose parts travel: "
                "call its step outside of the compiled function"
            )
        for number, group in enumerate(self.param_groups):
            if self._recipe(group).kronecker is not None:
                raise RuntimeError(
                    f"{type(self).__name__} cannot be traced by torch.compile: the host decides when it refreshes its "
                    "bases; call its step outside of the compiled function"
                )
            self._check_traced(group)
            self._check_step(number, group)
        parameters = [p for number in range(len(self.param_groups)) for p in self._traced_parameters(number)]
        plan, hypers = self._plan_of(parameters, traced=True), [self._hyper(group) for group in self.param_groups]
        plan.step(hypers, scaling)
        self._run_weight_hooks(parameters)
        plan.take_averages(hypers)

    def _traced_parameters(self, number: int) -> list[Parameter]:
        group = self.param_groups[number]
        params: list[Tensor] = []
        states: list[Tensor] = []
        self._init_group(group, params, [], states, [])
        indices = [i for i, p in enumerate(group["params"]) if p.grad is not None]
        parameters, first = [], 0
        for i, p in zip(indices, params, strict=True):
            keys = self._state_keys(p, group)
            state = dict(zip(keys, states[first : first + len(keys)], strict=True))
            parameters.append(self._parameter(number, i, p, state))
            first += len(keys)
        return parameters

    def _init_group(
        self, group: Group, params: list[Tensor], grads: list[Tensor], states: list[Tensor], skipped: list[Tensor]
    ) -> bool:
        """Appends what a step of this group touches; `states` is flat, the tensors of `_state_keys` of each parameter.

        Lists of tensors and this name are what lets torch.compile map the optimizer's tensors to its graph.
        """
        for p in group["params"]:
            if p.grad is None:
                continue
            self._init_state(p, p.grad.dtype, group)
            params.append(p)
            grads.append(p.grad)
            states.extend(self.state[p][key] for key in self._state_keys(p, group))
            skipped.append(self._counter(p.device))
        return False

    def _state_keys(self, p: Tensor, group: Group) -> list[str]:
        """The state that a step of this parameter reads and writes."""
        recipe = self._recipe(group)
        scales = [scale_key(name) for name in self._coded(p, group)]
        return [*recipe.layouts, *scales, *([RADIUS] if recipe.constraint is not None else [])]

    def _init_states(self, params: Iterable[tuple[Tensor, torch.dtype, Group]]) -> None:
        """State for those that have none yet, in stacks; each with the dtype of its gradient and its group."""
        fresh = [self.state[p] for p, dtype, group in params if self._init_state(p, dtype, group)]
        stack(fresh)

    def _init_state(self, p: Tensor, dtype: torch.dtype, group: Group) -> bool:
        """Completes a parameter's state; whether there was something to add."""
        state, keys = self.state[p], self._recipe(group).layouts
        added: State = {}
        if not all(key in state for key in keys):
            fresh = self.fresh_state(p, dtype, group)  # of a sharded parameter some may be elsewhere
            added = {key: fresh[key] for key in fresh if key not in state}
        state.update(added)
        try:
            radii = self._fresh_radii(p, group)
        except ValueError:
            for key in added:
                del state[key]
            raise
        state.update(radii)
        recoded = self._recode(p, group, state)
        state.update(extra := self.extra_state(p, group))
        return recoded or bool(added or radii or extra)

    def _counter(self, device: torch.device) -> Tensor:
        if device not in self._skipped:
            self._skipped[device] = torch.zeros((), dtype=torch.int64, device=device)
        return self._skipped[device]

    def _backend(self, p: Tensor, group: Group) -> str:
        """The backend of everything elementwise in a parameter's step."""
        state = self._state_here(p) if p in self.state else {}
        return route(self._parameter(self._number(group), 0, p, state), coupled=self.couples())

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

    def refuse_together(self, error: Exception) -> None:
        """Has an error of this rank be one of all that share parameters, before the step's first collective: they wait
        for this rank, which is to raise it. On a device they do only where none goes on with its plan.
        """
        if not self._peers:
            return
        warnings.warn(
            f"{type(self).__name__}: rank {dist.get_rank()} cannot take the step, and tells the other ranks: "
            f"{type(error).__name__}: {error}",
            UserWarning,
            stacklevel=level_of_caller(),
        )
        with contextlib.suppress(RuntimeError):  # this rank's error is the one to see here
            self._name_collectives("the step")
            if not self._agrees_on_host:
                goes_on, _ = self._agreement.any(False, {} if self._agreed is None else self._agreed.lacked())
                if goes_on is not None and goes_on:
                    return
            self._check_agreement(None, error)

    def ready_plan(self) -> Plan:
        """The plan of this step, with all state; every check is made before the first write. With sharded parameters
        all ranks call this together.
        """
        return self._agreed_plan() if self._has_shards else self._ready_plan()


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
