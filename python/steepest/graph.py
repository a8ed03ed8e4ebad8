"""A whole step as one CUDA graph: one launch, and on the host only the look whether it still holds.

    step = steepest.graphed(optimizer)
    for batch in data:
        loss(batch).backward()
        step.step()
        scheduler.step()            # of the optimizer itself; fills the learning rate in place
        step.zero_grad()            # zeroes: a graph reads gradients where they were when it was captured

What a graph replays is memory addresses. Learning rate, weight decay and step counts are tensors on the device, so they
may change; what may not is checked before every replay, and the error says what has changed and what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from .optimizer import MatrixOptimizer
from .optimizer.group_options import ON_DEVICE, Group, changed, frozen
from .optimizer.option_types import check_options

WARM_UP = 2  # eager steps before the capture: they create state, kernels, tables and workspaces


def graphed(optimizer: MatrixOptimizer) -> GraphedStep:
    """Wraps an optimizer whose parameters are all on one CUDA device; its groups become capturable.

    Raises TypeError for an optimizer of another kind and RuntimeError, with the reason, for one that cannot be
    captured: parameters elsewhere or on several devices, a direction that reads from the device (polar="svd").
    """
    return GraphedStep(optimizer)


class GraphedStep:
    """`step`, `zero_grad`, `param_groups`, `state_dict` and `load_state_dict` of the optimizer it wraps.

    The first two calls of `step` are ordinary ones, the third captures, and every later one replays; all of them are
    steps. Works with torch.amp.GradScaler in the optimizer's place. Not a torch.optim.Optimizer: schedulers take
    `optimizer`, which metrics() and describe() belong to as well. Memory the step borrows stays with the graph.
    """

    #: torch.amp.GradScaler leaves unscaling and skipping to the step.
    _step_supports_amp_scaling = True

    def __init__(self, optimizer: MatrixOptimizer) -> None:
        if not isinstance(optimizer, MatrixOptimizer):
            raise TypeError(f"graphed takes an optimizer of steepest but got {type(optimizer).__name__}")
        _refuse_hooks(optimizer)
        self.optimizer = optimizer
        self._device = _device_of(optimizer)
        optimizer.make_capturable()
        self.reset()

    @property
    def param_groups(self) -> list[Group]:
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:
        return self.optimizer.state

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads, and captures anew."""
        self.optimizer.load_state_dict(state_dict)
        self.optimizer.make_capturable()
        self.reset()

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Zeroes the gradients where they are. set_to_none=True is for before the capture only."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def reset(self) -> None:
        """Forgets the graph: the next two steps are ordinary ones, the third captures anew."""
        self._steps_until_capture = WARM_UP
        self._captured: _Captured | None = None

    def step(self, closure: None = None) -> None:
        """One step. There is no closure: what a closure runs is not part of the graph, so run it before."""
        if closure is not None:
            raise RuntimeError("a graphed step takes no closure: run the model and backward() before step()")
        scaling = {name: getattr(self, name, None) for name in ("found_inf", "grad_scale")}
        if self._captured is None and self._steps_until_capture:
            self._eager(scaling)
            self._steps_until_capture -= 1
            return
        if self._captured is None:
            self._captured = _Captured(self.optimizer, self._device, scaling)
        self._captured.replay(scaling)

    def _eager(self, scaling: dict[str, Tensor | None]) -> None:
        with _Attributes(self.optimizer, scaling), _SideStream(self._device):
            self.optimizer.step()


class _Captured:
    """The graph and what it relies on."""

    def __init__(self, optimizer: MatrixOptimizer, device: torch.device, scaling: dict[str, Tensor | None]) -> None:
        self.optimizer = optimizer
        optimizer.make_capturable()
        if "triton" in optimizer.prepare():
            raise RuntimeError(
                "the Triton kernels read addresses from a table, which a graph cannot renew: build the compiled "
                "kernels (`steepest doctor` says how), or use optimizer.step() itself"
            )
        keys = {*optimizer.defaults, *optimizer._adamw_defaults}
        self.groups = [_Numbers(group, keys) for group in optimizer.param_groups]
        self.params: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
        self.grads = [p.grad for p in self.params]
        self.addresses = self._addresses()
        self.scaling = {
            name: None if given is None else given.detach().to(device, torch.float32, copy=True)
            for name, given in scaling.items()
        }
        with _Attributes(optimizer, self.scaling):
            self.run = _capture(optimizer.step, device)
        assert optimizer._plan is not None
        self.plan = optimizer._plan  # its tables, and the state it writes to, live as long as the graph
        self.state = self._state()
        self.hooks = list(optimizer._weight_hooks)

    def _addresses(self) -> list[int]:
        params = [p.data_ptr() for p in self.params]
        return params + [0 if g is None else g.data_ptr() for g in self.grads]

    def _state(self) -> list[int]:
        state = self.optimizer.state
        return [t.data_ptr() for p in self.params if p in state for t in state[p].values() if isinstance(t, Tensor)]

    def replay(self, scaling: dict[str, Tensor | None]) -> None:
        self._check(scaling)
        self.plan.notice_changes()
        for numbers in self.groups:
            numbers.renew()
        for name, captured in self.scaling.items():
            given = scaling[name]
            if captured is not None and given is not None:
                captured.copy_(given.reshape(captured.shape), non_blocking=True)
        self.run()

    def _check(self, scaling: dict[str, Tensor | None]) -> None:
        _refuse_hooks(self.optimizer)
        self.optimizer._refuse_averages()
        for name, captured in self.scaling.items():
            if (captured is None) != (scaling[name] is None):
                raise RuntimeError(
                    f"the step was captured {'without' if captured is None else 'with'} a GradScaler's {name} and is "
                    "called otherwise: call reset() to capture anew"
                )
        if self.optimizer._plan is not self.plan:
            raise RuntimeError("state was loaded or an ordinary step taken since the capture: call reset()")
        if list(self.optimizer._weight_hooks) != self.hooks:
            raise RuntimeError("weight hooks were added or removed after the capture: call reset() to capture anew")
        groups = self.optimizer.param_groups
        now = [p for group in groups for p in group["params"]]
        if len(now) != len(self.params) or not all(map(is_, now, self.params)):
            raise RuntimeError("parameters were added or removed after the capture: call reset() to capture anew")
        same = len(groups) == len(self.groups) and all(
            group is old.group and len(group["params"]) == old.size for group, old in zip(groups, self.groups)
        )
        if not same:
            raise RuntimeError("the parameter groups are others than at the capture: call reset() to capture anew")
        if not all(map(is_, (p.grad for p in self.params), self.grads)):
            i = next(i for i, p in enumerate(self.params) if p.grad is not self.grads[i])
            raise RuntimeError(
                f"the gradient of {self._name(i)} is not the tensor that was captured: zero gradients in place, with "
                "zero_grad() of the graphed step or optimizer.zero_grad(set_to_none=False), and call reset() when "
                "another set of parameters has gradients"
            )
        addresses = self._addresses()
        if addresses != self.addresses:
            i = next(i for i, at in enumerate(addresses) if at != self.addresses[i])
            what = self._name(i) if i < len(self.params) else f"the gradient of {self._name(i - len(self.params))}"
            raise RuntimeError(f"{what} has moved in memory since the capture: call reset() to capture anew")
        if self._state() != self.state:
            raise RuntimeError("the state lies elsewhere than at the capture: call reset() to capture anew")
        for number, numbers in enumerate(self.groups):
            numbers.check(f"group {number}: ")
        _check_shared(self.groups)

    def _name(self, i: int) -> str:
        for number, group in enumerate(self.optimizer.param_groups):
            names = group.get("param_names")
            if i < len(group["params"]):
                name = repr(names[i]) if names else str(i)
                return f"parameter {name} of group {number} (shape {tuple(group['params'][i].shape)})"
            i -= len(group["params"])
        raise AssertionError("not a parameter of this optimizer")


class _Numbers:
    """A group's values at the capture: those on the device take new ones, all others must stay."""

    def __init__(self, group: Group, keys: set[str]) -> None:
        self.group = group
        self.size = len(group["params"])
        self.on_device: dict[str, Tensor] = {key: group[key] for key in ON_DEVICE}
        self.keys = keys.difference(ON_DEVICE)  # what a scheduler or a user adds is not the step's
        self.fixed = frozen(group, self.keys)

    def check(self, of: str) -> None:
        """of: whose numbers they are, in messages."""
        check_options({key: self.group[key] for key in ON_DEVICE}, of=of, on_host=True)
        other = changed(self.fixed, frozen(self.group, self.keys))
        if other is not None:
            raise RuntimeError(
                f"{other} was {self.fixed.get(other)!r} when the step was captured and is {self.group.get(other)!r}: "
                f"only {' and '.join(ON_DEVICE)} may change; call reset() to capture anew"
            )

    def renew(self) -> None:
        for key, captured in self.on_device.items():
            value = self.group[key]
            if value is captured:
                continue
            if isinstance(value, Tensor):
                captured.copy_(value.reshape(()), non_blocking=True)
            else:
                captured.fill_(value)
            self.group[key] = captured


def _check_shared(groups: Sequence[_Numbers]) -> None:
    """Groups that hold one tensor for a number of theirs take one new value together, or none."""
    for key in ON_DEVICE:
        for i, numbers in enumerate(groups):
            number = numbers.on_device[key]
            for other in groups[:i]:
                if other.on_device[key] is number and not _equal(other.group[key], numbers.group[key]):
                    raise RuntimeError(
                        f"two groups share one tensor as their {key} and were given {other.group[key]!r} and "
                        f"{numbers.group[key]!r}: give each a tensor of its own before the first step"
                    )


def _equal(a: Any, b: Any) -> bool:
    return a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b)


def _refuse_hooks(optimizer: MatrixOptimizer) -> None:
    if optimizer.has_step_hooks():
        raise RuntimeError("a graph runs no step hooks: remove them, or use optimizer.step() itself")


class _Attributes:
    """Sets attributes that are not None for the length of a with block: torch.amp.GradScaler's way of telling."""

    def __init__(self, owner: object, values: dict[str, Tensor | None]) -> None:
        self.owner = owner
        self.values = {name: value for name, value in values.items() if value is not None}

    def __enter__(self) -> None:
        for name, value in self.values.items():
            setattr(self.owner, name, value)

    def __exit__(self, *_: object) -> None:
        for name in self.values:
            delattr(self.owner, name)


def _device_of(optimizer: MatrixOptimizer) -> torch.device:
    """The device all parameters are on; RuntimeError where a graph cannot hold the step."""
    devices = list(dict.fromkeys(p.device for group in optimizer.param_groups for p in group["params"]))
    if len(devices) != 1 or devices[0].type != "cuda":
        raise RuntimeError(
            f"a CUDA graph holds the work of one CUDA device and the parameters are on {', '.join(map(str, devices))}: "
            "use optimizer.step() itself, or one optimizer for each device"
        )
    return devices[0]


class _SideStream:
    """Work inside runs on a stream of its own, after what came before and before what comes after."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> None:
        self.outer = torch.cuda.current_stream(self.device)
        self.inner = torch.cuda.Stream(self.device)
        self.inner.wait_stream(self.outer)
        self.context = torch.cuda.stream(self.inner)
        self.context.__enter__()

    def __exit__(self, *_: object) -> None:
        self.context.__exit__(None, None, None)
        self.outer.wait_stream(self.inner)


def _capture(step: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """What replays `step`, which is recorded and not run."""
    graph = torch.cuda.CUDAGraph()
    # A stream of this device: torch's own default is made once, on whichever device came first. Other threads, a data
    # loader's, may use CUDA meanwhile.
    stream = torch.cuda.Stream(device)
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        step()
    return graph.replay
