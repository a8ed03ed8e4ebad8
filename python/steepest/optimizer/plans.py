"""What a step of an optimizer is made of, laid out once: its state, the records of its parameters, and their plan."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import cast

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from ..chunking import default_workspace
from ..ops.backend import requested
from ..parts.blockwise import scale_key
from ..recipe import State
from ..step import Parameter, Plan, StepOptions
from ..step.checks import check_gradient, check_state, refuse_capture
from ..step.plan import route
from ..step.state_storage import stack
from ..step.working_state import WorkingState
from .constraints import RADIUS, Constraints
from .group_options import Group, parameter_name, refuse_option
from .plan_key import entries
from .repeated import RepeatedStep
from .reports import Reports
from .stale import StaleParameters

__all__ = ["Plans"]


class Plans(Reports, Constraints):
    """Groups with state and a plan, which serves as long as `plan_key` stays as it is."""

    _plan_key: Sequence[object] = ()
    #: where steps with this plan are one call
    _repeated: RepeatedStep | None = None
    _staleness: StaleParameters

    # ---- the plan ----------------------------------------------------------------------------------------------------

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
            if self._steps_by_plan_alone():
                self._repeated = RepeatedStep.of(self, self._plan)
        assert self._plan is not None
        if any(recipe.kronecker is not None for recipe in self._plan.recipes):
            refuse_capture("the host decides when its bases are refreshed")
        return self._plan

    def _steps_by_plan_alone(self) -> bool:
        """Whether the method itself has no say in a step, which is its plan's alone."""
        raise NotImplementedError

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

    # ---- its checks --------------------------------------------------------------------------------------------------

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

    def _check_state_bits(self, group: Group) -> None:
        if self.couples():
            why = "layers wait for one another, and all state would be decoded at once: momentum_dtype=torch.bfloat16"
            refuse_option(group, "state_bits", why)

    # ---- state -------------------------------------------------------------------------------------------------------

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

    def _state_keys(self, p: Tensor, group: Group) -> list[str]:
        """The state that a step of this parameter reads and writes."""
        recipe = self._recipe(group)
        scales = [scale_key(name) for name in self._coded(p, group)]
        return [*recipe.layouts, *scales, *([RADIUS] if recipe.constraint is not None else [])]

    def _counter(self, device: torch.device) -> Tensor:
        if device not in self._skipped:
            self._skipped[device] = torch.zeros((), dtype=torch.int64, device=device)
        return self._skipped[device]

    def _backend(self, p: Tensor, group: Group) -> str:
        """The backend of everything elementwise in a parameter's step."""
        state = self._state_here(p) if p in self.state else {}
        return route(self._parameter(self._number(group), 0, p, state), coupled=self.couples())
