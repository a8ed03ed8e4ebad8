"""Plans inside of a graph of torch.compile: tensor operations, and nothing that outlives a step."""

from __future__ import annotations

from torch import Tensor

from ..step import Parameter, Plan
from .agreed_plans import AgreedPlans
from .group_options import Group

__all__ = ["TracedPlans"]


class TracedPlans(AgreedPlans):
    """`Plans` that torch.compile may trace, of optimizers whose steps can be part of a graph."""

    def _traced_plan(self) -> Plan:
        """The plan of a step that is being traced."""
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
        return self._plan_of(parameters, traced=True)

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
