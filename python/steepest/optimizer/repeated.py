"""A step that is the last one again but for gradients and numbers, of parameters that all go by addresses on a CPU.

For a few small parameters Python takes longer than arithmetic. So what a step asks and decides is asked once, and where
all of it is as it was, one function looks that up and calls the library.
"""

from __future__ import annotations

import operator
from array import array
from collections.abc import Sequence
from itertools import chain, repeat
from typing import cast

import torch
from torch import Tensor

from ..ops.program import HYPERS
from ..ops.whole_steps import by_address, numbers_of
from ..parts import Hyper
from ..step import Plan
from ..step.by_address import ByAddress
from ..step.modes import in_default_modes
from .group_options import NUMBERS, is_as_it_was, numbers_are
from .plan_key import of_gradient, of_parameter
from .reports import Reports

__all__ = ["RepeatedStep"]

_NO_STATE: dict[str, object] = {}


class RepeatedStep:
    """The steps with a plan whose executors all go by addresses.

    An optimizer whose class has a say in such a step (`_steps_by_plan_alone`) has none.
    """

    def __init__(self, optimizer: Reports, plan: Plan, executors: Sequence[ByAddress]) -> None:
        self._plan, self._executors = plan, executors
        places = {id(p): i for i, p in enumerate(plan.parameters)}
        #: where each has its gradients among those of all
        self._rows = [[places[id(p)] for p in executor.parameters] for executor in executors]
        self._groups = list(optimizer.param_groups)
        #: the values that the recipe of each was made of
        self._options = [optimizer._recipes[id(group)][0] for group in self._groups]
        self._all = [p for group in self._groups for p in group["params"]]
        self._params = [p.source for p in plan.parameters]
        self._without = [p for p in self._all if p.grad is None]
        self._of_params = list(map(of_parameter, self._params))
        self._of_gradients = list(map(of_gradient, (p.grad for p in self._params)))
        self._state = _values(optimizer, self._params)
        self._places = [t.data_ptr() for t in self._state]
        #: those of all groups, what they were made of, and whether they are the same as long as all but the learning
        #: rates of that is
        self._hypers: list[Hyper] = []
        self._numbers: array[float] = array("d")
        self._known: list[tuple[object, ...]] = []
        self._is_known = False
        #: where learning rates that are tensors are written, and up to where each group's need no check
        self._rates: list[Tensor] = []
        self._taken: list[float] = []

    @classmethod
    def of(cls, optimizer: Reports, plan: Plan) -> RepeatedStep | None:
        """The steps with a plan; None where not all go by addresses, or something comes before or after them."""
        groups = optimizer.param_groups
        executors = [executor for executor in plan.executors if isinstance(executor, ByAddress)]
        if optimizer._has_shards or not executors or len(executors) != len(plan.executors):
            return None
        if any(group.get(key) is not None for group in groups for key in ("average", "average_rate", "constraint")):
            return None
        if not by_address(_values(optimizer, [p.source for p in plan.parameters])):
            return None
        return cls(optimizer, plan, executors)

    def take(self, optimizer: Reports) -> bool:
        """Takes the step and gives True; does nothing and gives False where something is not as it was.

        Raises for numbers that the constructor refuses, before anything is written.
        """
        grads = self._gradients(optimizer)
        if grads is None:
            return False
        if not self._is_known or not (all(map(numbers_are, self._known, self._groups)) or self._takes_rates(optimizer)):
            self._take_numbers(optimizer)
        for executor, rows in zip(self._executors, self._rows, strict=True):
            if not executor.begin([grads[row] for row in rows], self._hypers):
                return False
        for executor in self._executors:
            executor.take(self._numbers)
        for executor in self._executors:
            if executor.has_rest:
                _finish(optimizer, executor)
            else:
                executor.finish()
        return True

    def _takes_rates(self, optimizer: Reports) -> bool:
        """Brings the learning rates of this step to the numbers, and gives True where nothing else has changed and
        each is one that the constructor takes.
        """
        for i, (known, group) in enumerate(zip(self._known, self._groups, strict=True)):
            before, lr = known[0], group.get("lr")
            if not all(map(operator.is_, known[1:], map(group.get, NUMBERS[1:]))):
                return False
            if type(lr) is float:
                self._known[i] = (lr, *known[1:])
                self._numbers[i * len(HYPERS)] = lr
                if group["use_muon"] and not self._takes_hyper(i, optimizer._hyper(group), lr):
                    return False
            elif group["use_muon"]:
                return False
            elif isinstance(lr, Tensor) and type(before) is tuple and lr is before[0] and not lr.ndim and lr.is_cpu:
                self._rates[i].copy_(lr.detach())
            else:
                return False
            if not 0 <= self._numbers[i * len(HYPERS)] <= self._taken[i]:
                return False
        return True

    def _takes_hyper(self, i: int, hyper: Hyper, lr: float) -> bool:
        """Brings what a method makes of this learning rate to the numbers, and gives True where that is the rate itself
        and perhaps others, such as a weight decay over it.
        """
        all_of = (hyper.lr, hyper.weight_decay, hyper.beta1, hyper.beta2, hyper.eps)
        numbers = [number for number in all_of if not isinstance(number, Tensor)]
        if hyper.lr != lr or len(numbers) < len(all_of):
            return False
        self._hypers = [*self._hypers[:i], hyper, *self._hypers[i + 1 :]]
        self._numbers[i * len(HYPERS) : (i + 1) * len(HYPERS)] = array("d", numbers)
        return True

    def _take_numbers(self, optimizer: Reports) -> None:
        """Checks and reads all numbers anew."""
        self._is_known = False
        optimizer.check_numbers()
        for group in self._groups:
            optimizer._numbers_on_device(group)
        self._known = [optimizer._numbers[id(group)] for group in self._groups]
        self._hypers = [optimizer._hyper(group) for group in self._groups]
        numbers = self._executors[0].groups(self._hypers)
        self._numbers = numbers_of(numbers)
        # A tensor whose changes are not counted stands for itself.
        places = [divmod(at, len(HYPERS)) for at in numbers.at]
        self._is_known = all(not of_group and type(self._known[i][0]) is tuple for i, of_group in places)
        if not self._is_known:
            return
        with torch.inference_mode(False):  # other steps may be outside of it
            self._rates = list(torch.frombuffer(self._numbers, dtype=torch.float64)[:: len(HYPERS)].unbind())
        rates = zip(self._groups, self._numbers[:: len(HYPERS)], strict=True)
        self._taken = [2 * lr if optimizer._takes_lr(group, 2 * lr) else lr for group, lr in rates]

    def _gradients(self, optimizer: Reports) -> list[Tensor] | None:
        """The gradients of this step; None where it is another one than the last. What is looked at is what
        `plan_key.entries` looks at, and what `ByAddress` asks of gradients.
        """
        if torch.compiler.is_compiling() or not _is_bare() or _is_scaled(optimizer):
            return None
        groups, params = optimizer.param_groups, self._params
        if optimizer._plan is not self._plan or not _are(groups, self._groups):
            return None
        if not all(map(is_as_it_was, self._options, groups)):
            return None
        if not _are([p for group in groups for p in group["params"]], self._all):
            return None
        grads = cast(list[Tensor], [p.grad for p in params])  # or None, which has a type of its own
        if not by_address(grads) or any(p.grad is not None for p in self._without):
            return None
        if list(map(of_gradient, grads)) != self._of_gradients or list(map(of_parameter, params)) != self._of_params:
            return None
        if not all(map(Tensor.is_contiguous, chain(params, grads))):
            return None
        state = _values(optimizer, params)
        return grads if _are(state, self._state) and list(map(Tensor.data_ptr, state)) == self._places else None


@in_default_modes
def _finish(optimizer: Reports, executor: ByAddress) -> None:
    """What an executor computes by torch operations."""
    executor.finish()


def _are(now: Sequence[object], before: Sequence[object]) -> bool:
    """Whether these are the same objects."""
    return len(now) == len(before) and all(map(operator.is_, now, before))


def _is_bare() -> bool:
    """Whether no mode looks at operations, no function is transformed, and no CUDA graph captured."""
    if torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack():
        return False
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return False
    return torch._C._functorch.peek_interpreter_stack() is None


def _is_scaled(optimizer: Reports) -> bool:
    """Whether a scaler has a say in a step."""
    return getattr(optimizer, "found_inf", None) is not None or getattr(optimizer, "grad_scale", None) is not None


def _values(optimizer: Reports, params: Sequence[Tensor]) -> list[Tensor]:
    return [t for of_one in map(optimizer.state.get, params, repeat(_NO_STATE)) for t in of_one.values()]
