"""Plans that ranks share: none goes on where one cannot, or is about to do something else."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import cast

import torch.distributed as dist
from torch import Tensor

from ..step import Plan
from ..step.checks import refuse_capture
from ..step.executor import Executor
from .group_options import parameter_name
from .missing_gradients import AgreedStep, layouts_of
from .plans import Plans
from .shards import SAME_STEP
from .stale import level_of_caller

__all__ = ["AgreedPlans"]


class AgreedPlans(Plans):
    """`Plans` of which those with sharded parameters are what all ranks have found theirs to be."""

    #: what ranks have last agreed to step, where they do not agree in every step
    _agreed: AgreedStep | None = None
    #: of the executors of this step the parameters that a rank has no gradient of
    _lacking: Mapping[Executor, Tensor] | None = None
    #: gradients that this step is taken without, or None where it is taken with zeros
    _put_aside: Mapping[Tensor, Tensor | None] = MappingProxyType({})

    def ready_plan(self) -> Plan:
        """The plan of this step, with all state; every check is made before the first write. With sharded parameters
        all ranks call this together.
        """
        return self._agreed_plan() if self._has_shards else self._ready_plan()

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
