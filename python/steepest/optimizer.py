"""The `torch.optim` shell: groups, state, closures and checkpoints around `plan.Plan`.

A `MatrixOptimizer` holds two kinds of group: those with use_muon=True take the class's own recipe, those with
use_muon=False take AdamW. One object, one `step`, one learning-rate scheduler for a whole model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from . import plan, routing, stacks, unfused
from .matrices import Piece, pieces
from .ops import streams
from .ops.backend import requested
from .ops.multi_tensor import Scaling
from .parts import ADJUST_LR, Hyper, Number, shape_ratio
from .recipe import CLOCK, Recipe, State, adamw
from .values import (
    CHANGING,
    ON_DEVICE,
    Group,
    adam_hyper,
    changed,
    check_at_least_zero,
    check_betas,
    check_lr,
    finish,
    frozen,
    name_the_rule,
    number_on,
    parameter_name,
)

Params = nn.Module | Mapping[str, Tensor] | Iterable[Any]


class MatrixOptimizer(torch.optim.Optimizer):
    """Base of the named optimizers: a subclass gives `recipe(group)` and `hyper(group)` for its matrices.

    params: a module or named parameters (routed by `steepest.param_groups`), an iterable of tensors (routed by shape),
        or an iterable of groups, where use_muon=False sends a group to AdamW.
    defaults: group values of the matrix method.   adamw: group values of AdamW groups (lr, betas, eps, weight_decay).
    """

    #: torch.amp.GradScaler leaves unscaling and skipping to the step, which does both on the device.
    _step_supports_amp_scaling = True
    _loading: dict[str, Any] | None = None
    _plan: plan.Plan | None = None
    _plan_key: list[object] | None = None

    def __init__(self, params: Params, defaults: Group, adamw: Group) -> None:
        self._adamw_defaults = dict(adamw)
        self._reasons: dict[Tensor, str] = {}
        self._skipped: dict[torch.device, Tensor] = {}
        self._recipes: dict[int, tuple[Group, Recipe, int]] = {}
        self._check_adamw({"use_muon": False, **self._adamw_defaults})
        self._check_values(defaults)
        super().__init__(self._groups(params), {**defaults, "use_muon": True})

    # ---- what a subclass says -------------------------------------------------------------------------------------

    def recipe(self, group: Group) -> Recipe:
        """The method of a matrix group."""
        raise NotImplementedError

    def hyper(self, group: Group) -> Hyper:
        """The numbers of this step for a matrix group, read from the group."""
        raise NotImplementedError

    def _check_values(self, group: Group) -> None:
        """ValueError for a value the matrix method cannot take."""
        check_lr(group["lr"])
        check_at_least_zero("weight decay", group["weight_decay"])
        if group["adjust_lr_fn"] is not None and group["adjust_lr_fn"] not in ADJUST_LR:
            raise ValueError(
                f"Adjust learning rate function {group['adjust_lr_fn']} is not supported; use one of "
                f"{', '.join(ADJUST_LR)} or None (original)"
            )
        requested(group["backend"])
        if group["max_workspace_bytes"] < 1:
            raise ValueError(f"max_workspace_bytes should be positive but is: {group['max_workspace_bytes']}")
        self.recipe(group)

    def _check_shape(self, p: Tensor, group: Group, declared: bool) -> None:
        """ValueError for a parameter that cannot be read as matrices. `declared`: the group said use_muon itself."""
        if p.ndim < 2:
            raise ValueError(
                f"a parameter of shape {tuple(p.shape)} is not a matrix: put it in a group with use_muon=False, "
                "or pass the module so that parameters are routed"
            )
        if p.ndim == 3 and group["batch_dims"] is None:
            raise ValueError(
                f"a parameter of shape {tuple(p.shape)} is either a batch of matrices or a convolution: "
                "say batch_dims=1 or batch_dims=0 in its group"
            )

    def _bare_groups(self, params: list[Any]) -> list[Any]:
        """Groups for parameters that came without names or a module."""
        return self._route(params)

    # ---- groups ---------------------------------------------------------------------------------------------------

    def _groups(self, params: Params) -> Any:
        if isinstance(params, (nn.Module, Mapping)):
            return self._route(params)
        if isinstance(params, Tensor):
            return params  # torch says what is wrong with it
        found = list(params)
        if not found or isinstance(found[0], dict):
            return found
        return self._route(found) if isinstance(found[0], tuple) else self._bare_groups(found)

    def _route(self, params: Any) -> list[Group]:
        """Routed groups; AdamW does not decay parameters with fewer than two dimensions (gains, biases)."""
        decay = self._adamw_defaults["weight_decay"]
        return routing.param_groups(params, adamw={"weight_decay": decay} if decay else None)

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group; use_muon (or algorithm="muon"/"adamw") says which method takes it, by default the matrix one.

        The group is checked whole, and an unsuitable one leaves the optimizer as it was.
        """
        if not isinstance(param_group, dict):
            return super().add_param_group(param_group)
        param_group = dict(param_group)  # the caller may use his own again
        declared = name_the_rule(param_group)
        reasons = param_group.pop("param_reasons", None)
        self._fill(param_group)
        super().add_param_group(param_group)
        try:
            self._check_group(param_group, declared=declared, routed=reasons is not None)
            self._numbers_on_device(param_group)
        except Exception:
            self.param_groups.pop()
            raise
        if reasons is not None:
            self._reasons.update(zip(param_group["params"], reasons, strict=True))
        return None

    def _fill(self, group: Group) -> None:
        if not group.setdefault("use_muon", True):
            for key, value in self._adamw_defaults.items():
                group.setdefault(key, value)

    def _check_group(self, group: Group, *, declared: bool, routed: bool) -> None:
        for p in group["params"]:
            self._check_tensor(p)
        self._check_devices(group)
        if not group["use_muon"]:
            self._check_adamw(group)
            return
        self._check_values(group)
        for p in group["params"]:
            if not routed:
                self._check_shape(p, group, declared)
            self._pieces(p, group)

    def _check_tensor(self, p: Tensor) -> None:
        if hasattr(p, "device_mesh"):
            raise RuntimeError(
                f"{type(self).__name__} does not take sharded parameters (DTensor) yet; found one of shape "
                f"{tuple(p.shape)}: use DistributedDataParallel, which keeps every matrix whole"
            )

    def _check_devices(self, group: Group) -> None:
        devices = list(dict.fromkeys(p.device for p in group["params"]))
        if len(devices) > 1:
            raise ValueError(
                f"a group has parameters on {' and '.join(map(str, devices))}: make one group per device, "
                "its numbers live where its parameters do"
            )

    @staticmethod
    def _numbers_on_device(group: Group) -> None:
        """With capturable, turns numbers that a graph must read anew into tensors where the parameters are."""
        if group["capturable"] and group["params"]:
            for key in ON_DEVICE:
                group[key] = number_on(group[key], group["params"][0].device)

    @staticmethod
    def _check_adamw(group: Group) -> None:
        check_lr(group["lr"])
        check_at_least_zero("weight decay", group["weight_decay"])
        check_at_least_zero("eps", group["eps"])
        check_betas(group["betas"])

    def _pieces(self, p: Tensor, group: Group) -> tuple[Piece, ...]:
        if not group["use_muon"]:
            return (Piece(0, p.shape[0] if p.ndim else 1, 1, 1, p.numel()),)
        return pieces(
            p.shape,
            split_sizes=group["split_sizes"],
            num_heads=group["num_heads"],
            batch_dims=group["batch_dims"] or 0,
        )

    # ---- the step -------------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step. closure: re-evaluates the model and returns the loss, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scaling = Scaling(getattr(self, "found_inf", None), getattr(self, "grad_scale", None))
        if torch.compiler.is_compiling():
            self._traced_step(scaling)
        else:
            self._take_step(scaling, loss)
        return loss

    def _take_step(self, scaling: Scaling, loss: Number | None) -> None:
        """Moves everything that has a gradient; loss: what a closure returned."""
        self._ready_plan().step([self._hyper(group) for group in self.param_groups], scaling)

    def _observe(self, scaling: Scaling) -> list[unfused.Observed]:
        """The first half of a step of every group, for a rule that looks at all of them before it moves one."""
        batches = [self._batch(number, group, scaling) for number, group in enumerate(self.param_groups)]
        return [
            unfused.observe(self._recipe(group), self._hyper(group), batch)
            for group, batch in zip(self.param_groups, batches, strict=True)
        ]

    def _finish(self, observed: list[unfused.Observed]) -> None:
        """The end of a step that began with `_observe`."""
        assert self._plan is not None
        self._plan.remember({i: each.finish() for i, each in enumerate(observed) if each.batch.params})

    def init_state(self) -> None:
        """Creates the state of every parameter now, as if each had a zero gradient, without a step."""
        self._init_states([(p, p.dtype, group) for group in self.param_groups for p in group["params"]])

    @torch.no_grad()
    def prepare(self) -> set[str]:
        """Makes state and plan for the gradients there are, without a step; the backends it will run on."""
        return self._ready_plan().backends

    def _recipe(self, group: Group) -> Recipe:
        """The group's recipe, the same object until a value it may depend on changes."""
        if torch.compiler.is_compiling():
            return self._new_recipe(group)
        return self._known_recipe(group)[0]

    def _known_recipe(self, group: Group) -> tuple[Recipe, int]:
        """A group's recipe, and a number that is another one whenever its values have changed."""
        values = frozen(group, (key for key in self.defaults if key not in CHANGING))
        known = self._recipes.get(id(group))
        if known is None or changed(known[0], values) is not None:
            version = 1 + max((version for _, _, version in self._recipes.values()), default=0)
            known = self._recipes[id(group)] = (values, self._new_recipe(group), version)
        return known[1:]

    def _new_recipe(self, group: Group) -> Recipe:
        return self.recipe(group) if group["use_muon"] else adamw(group["momentum_dtype"], **finish(group))

    def _hyper(self, group: Group) -> Hyper:
        return self.hyper(group) if group["use_muon"] else adam_hyper(group)

    def _ready_plan(self) -> plan.Plan:
        """The plan of this step; every check is made, before the first write, when there is none for it yet."""
        if not all(group["capturable"] for group in self.param_groups if group["params"]):
            _refuse_capture(
                "its learning rate is a number, which the graph would repeat for ever: make the optimizer with "
                "capturable=True, or use steepest.graphed(optimizer)"
            )
        for group in self.param_groups:
            self._numbers_on_device(group)
        key = self._key()
        if self._plan is None or self._plan_key != key:
            _refuse_capture("what it steps has changed since the last step: take one with these gradients first")
            self._plan = None
            for number, group in enumerate(self.param_groups):
                self._check_step(number, group)
            self._plan = self._new_plan()
            self._plan_key = self._key()
        if any(group.recipe.kronecker is not None for group in self._plan.groups):
            _refuse_capture("the host decides when its bases are refreshed")
        return self._plan

    def _key(self) -> list[object]:
        """What a plan is made for: its tensors' layouts, and where the state lies, whose views it holds."""
        found: list[object] = []
        for group in self.param_groups:
            found.append((id(group), self._known_recipe(group)[1]))
            for p in group["params"]:
                g = p.grad
                if g is None:
                    found.append(None)
                    continue
                own = self.state.get(p)
                state = None if own is None else tuple([_place(value) for value in own.values()])
                # Few layouts of five dimensions and more, and of Triton's tensors, can be walked.
                strides = None if g.is_contiguous() and p.is_contiguous() else (p.stride(), g.stride())
                found.append((id(p), p.shape, p.dtype, p.device, g.shape, g.dtype, g.layout, strides, state))
        return found

    def _new_plan(self) -> plan.Plan:
        stepping = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        self._init_states(
            [
                (p, p.grad.dtype, group)
                for params, group in zip(stepping, self.param_groups, strict=True)
                for p in params
                if p.grad is not None
            ]
        )
        groups = [
            plan.Group(
                self._recipe(group),
                params,
                [self.state[p] for p in params],
                [self._pieces(p, group) for p in params],
                [(number, i) for i, p in enumerate(group["params"]) if p.grad is not None],
                group["maximize"],
                group["backend"],
                group["max_workspace_bytes"],
                group["use_muon"] and group["fuse_update"],
            )
            for number, (params, group) in enumerate(zip(stepping, self.param_groups, strict=True))
        ]
        for group in groups:
            for p in group.params:
                self._counter(p.device)
        return plan.Plan(groups, self._skipped)

    def _check_step(self, number: int, group: Group) -> None:
        """Raises for what a step of this group would stumble over: its values may have changed since it was added."""
        name = type(self).__name__
        requested(group["backend"])
        self._check_devices(group)
        for i, p in enumerate(group["params"]):
            if p.grad is None:
                continue
            what = f"{parameter_name(group, i)} (group {number}, shape {tuple(p.shape)})"
            if torch.is_complex(p) or torch.is_complex(p.grad):
                raise RuntimeError(f"{name} does not support complex parameters; found {what}")
            if p.grad.layout != torch.strided:
                raise RuntimeError(f"{name} does not support sparse gradients; found one of {what}")
            if p.grad.device != p.device:
                raise RuntimeError(
                    f"{what} is on {p.device} and its gradient on {p.grad.device}: move one to the other"
                )
            if p.grad.shape != p.shape:
                raise RuntimeError(f"{what} has a gradient of shape {tuple(p.grad.shape)}: make them equal")
            self._check_tensor(p)
            self._pieces(p, group)
            self._check_state(p, group, what)
            if requested(group["backend"]) != "auto":
                self._backend(p, group)

    def _check_state(self, p: Tensor, group: Group, what: str) -> None:
        recipe, state = self._recipe(group), self.state.get(p, {})
        for key, shape in self._state_shapes(p, group).items() if state else ():
            held = state.get(key)
            if held is None:
                continue
            if not isinstance(held, Tensor):
                raise RuntimeError(f"{what} has a state {key!r} that is {held!r}: put a tensor there")
            if held.device != (torch.device("cpu") if key == CLOCK else p.device):
                where = "to the host" if key == CLOCK else "too"
                raise RuntimeError(
                    f"{what} is on {p.device} and its state {key!r} on {held.device}: move the state {where}"
                )
            if key in recipe.rounding.keys and bool(held.numel()) != (p.dtype is torch.bfloat16 and p.numel() > 0):
                del state[key]  # the parameter's dtype has changed: what was kept of the old one says nothing
            elif held.numel() and held.shape != shape:
                raise RuntimeError(
                    f"{what} has a state {key!r} of shape {tuple(held.shape)}: a parameter that was resized, or a "
                    "checkpoint of another model; delete optimizer.state[p] to start it anew"
                )

    def _state_shapes(self, p: Tensor, group: Group) -> dict[str, torch.Size]:
        """What a parameter's state holds, and in which shapes."""
        like = torch.empty(p.shape, dtype=p.dtype, device="meta")
        return {key: value.shape for key, value in self._fresh_state(like, p.dtype, group).items()}

    def _fresh_state(self, p: Tensor, dtype: torch.dtype, group: Group) -> State:
        """State before the first gradient, which has this dtype."""
        recipe, g = self._recipe(group), torch.empty_like(p, dtype=dtype, requires_grad=False)
        if recipe.kronecker is None:
            return recipe.init(p.detach(), g)
        return recipe.init(p.detach(), g, [piece.view(g).reshape(piece.shape) for piece in self._pieces(p, group)])

    def _traced_step(self, scaling: Scaling) -> None:
        """The step as torch.compile sees it: tensor operations and no plan."""
        for number, group in enumerate(self.param_groups):
            if self._recipe(group).kronecker is not None:
                raise RuntimeError(
                    f"{type(self).__name__} cannot be traced by torch.compile: the host decides when it refreshes its "
                    "bases; call its step outside of the compiled function"
                )
            self._check_step(number, group)
        batches = [self._batch(i, group, scaling) for i, group in enumerate(self.param_groups)]
        for group, batch in zip(self.param_groups, batches, strict=True):
            unfused.update(self._recipe(group), self._hyper(group), batch)

    def _batch(self, number: int, group: Group, scaling: Scaling) -> unfused.Batch:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        states: list[Tensor] = []
        skipped: list[Tensor] = []
        self._init_group(group, params, grads, states, skipped)
        keys = self._recipe(group).keys
        return unfused.Batch(
            params=params,
            grads=grads,
            states=[dict(zip(keys, states[i : i + len(keys)], strict=True)) for i in range(0, len(states), len(keys))],
            skipped=skipped,
            pieces=[self._pieces(p, group) for p in params],
            places=[(number, i) for i, p in enumerate(group["params"]) if p.grad is not None],
            maximize=group["maximize"],
            scaling=plan.scaling_on(scaling, params[0].device) if params else scaling,
            max_workspace_bytes=group["max_workspace_bytes"],
        )

    def _init_group(
        self, group: Group, params: list[Tensor], grads: list[Tensor], states: list[Tensor], skipped: list[Tensor]
    ) -> bool:
        """Appends what a step of this group touches; `states` is flat, len(recipe.keys) tensors a parameter.

        Lists of tensors and this name are what lets torch.compile map the optimizer's tensors to its graph.
        """
        recipe = self._recipe(group)
        for p in group["params"]:
            if p.grad is None:
                continue
            self._init_state(p, p.grad.dtype, group)
            params.append(p)
            grads.append(p.grad)
            states.extend(self.state[p][key] for key in recipe.keys)
            skipped.append(self._counter(p.device))
        return False

    def _init_states(self, params: Iterable[tuple[Tensor, torch.dtype, Group]]) -> None:
        """State for those that have none yet, in stacks; each with the dtype of its gradient and its group."""
        fresh = [self.state[p] for p, dtype, group in params if self._init_state(p, dtype, group)]
        stacks.stack(fresh)

    def _init_state(self, p: Tensor, dtype: torch.dtype, group: Group) -> bool:
        """Completes a parameter's state; whether there was something to add."""
        state, keys = self.state[p], self._recipe(group).keys
        if all(key in state for key in keys):
            return False
        for key, value in self._fresh_state(p, dtype, group).items():
            state.setdefault(key, value)
        return True

    def _counter(self, device: torch.device) -> Tensor:
        if device not in self._skipped:
            self._skipped[device] = torch.zeros((), dtype=torch.int64, device=device)
        return self._skipped[device]

    def _backend(self, p: Tensor, group: Group) -> str:
        """The backend of everything elementwise in a parameter's step."""
        single = plan.Group(
            self._recipe(group),
            [p],
            [self.state.get(p, {})],
            [self._pieces(p, group)],
            [(0, 0)],
            group["maximize"],
            group["backend"],
        )
        return plan.route(single, 0)

    # ---- what a user may ask --------------------------------------------------------------------------------------

    def skipped_updates(self) -> dict[torch.device, Tensor]:
        """Per device, how many parameter updates a gradient that was not finite left out (0-d int64 tensors)."""
        return dict(self._skipped)

    def metrics(self) -> dict[str, Tensor]:
        """What the last step measured, on the device: nothing waits for it until a value is read.

        Keys are "<group>/<name>" and "skipped/<device>"; every value a new tensor, fp64 and 0-d but for polar_slack.

            grad_norm, momentum_norm, param_norm    Frobenius norms over the group's parameters; gradients unscaled
            update_norm     of lr ratio u, weight decay not included
            polar_slack     fp32, one number a matrix: how much larger its singular values were to the iteration than
                            after division by ||X||_F, see `steepest.polar`; NaN where the direction has none. Bucket
                            by bucket: matrices of one shape together, in the order of the group. Not of what
                            backend="torch" steps
            skipped         int64, parameter updates left out because of a gradient that was not finite, so far

        A parameter whose step was not taken counts with its last momentum, update and value and without a gradient. A
        step inside torch.compile leaves no metrics. Empty before the first step.
        """
        if self._plan is None:
            return {}
        groups = {f"{i}/{name}": t for i, each in enumerate(self._plan.metrics()) for name, t in each.items()}
        return groups | {f"skipped/{device}": count.clone() for device, count in self._skipped.items()}

    def has_step_hooks(self) -> bool:
        """Whether something is to run around every step: hooks of this optimizer or of all of torch's."""
        own = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
        return bool(own or _global_optimizer_pre_hooks or _global_optimizer_post_hooks)

    def make_capturable(self) -> None:
        """Sets capturable in every group and puts its numbers on the device, as the argument of that name does.

        RuntimeError, with the reason, for a group whose step a CUDA graph cannot hold.
        """
        for number, group in enumerate(self.param_groups):
            direction, why = self._recipe(group).direction, None
            if self._recipe(group).kronecker is not None:
                why = "the host decides when its bases are refreshed; call its step outside of the graph"
            if not direction.capturable:
                why = f"{direction} reads from the device; choose an iterative preset, such as polar='auto'"
            device = group["params"][0].device if group["params"] else None
            others = [key for key in ("momentum", "betas", "eps") if _elsewhere(group.get(key), device)]
            if others:
                why = f"{others[0]} is a tensor on another device than {device}; move it there or make it a number"
            if group["params"] and why is not None:
                raise RuntimeError(f"group {number} cannot be captured in a CUDA graph: {why}")
        for group in self.param_groups:
            group["capturable"] = True
            self._numbers_on_device(group)

    def describe(self) -> str:
        """A table with a row per parameter: name, shape, rule, reason, effective learning rate and backend."""
        counter = itertools.count()
        return routing.format_table([row for group in self.param_groups for row in self._rows(group, counter)])

    def _others(self, group: Group) -> str:
        """The rule of groups that are no matrices."""
        return "AdamW"

    def _rows(self, group: Group, counter: Iterator[int]) -> list[tuple[str, ...]]:
        names = group.get("param_names") or [f"param_{next(counter)}" for _ in group["params"]]
        return [
            (
                name,
                "x".join(map(str, p.shape)) or "scalar",
                type(self).__name__ if group["use_muon"] else self._others(group),
                self._reasons.get(p, f"use_muon={group['use_muon']} in its group"),
                _effective_lr(self._hyper(group).lr, self._recipe(group), self._pieces(p, group)),
                self._backend(p, group),
            )
            for name, p in zip(names, group["params"], strict=True)
        ]

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As torch's. What is made beside the steps is in it: the present stream waits for it."""
        streams.join()
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        streams.join()
        return {
            **super().__getstate__(),
            "_adamw_defaults": self._adamw_defaults,
            "_reasons": self._reasons,
            "_skipped": self._skipped,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._recipes = {}
        self._plan = None
        rules = [True] * len(self.param_groups) if self._loading is None else self._loading["rules"]
        for group, use_muon in zip(self.param_groups, rules, strict=True):
            # A checkpoint of torch.optim.Muon, of torch.optim.AdamW or of an older version lacks keys.
            if not name_the_rule(group):
                group["use_muon"] = use_muon
            self._fill(group)
            for key, value in self.defaults.items():
                group.setdefault(key, value)
        if self._loading is not None:
            self._restore_dtypes(self._loading)

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state_dict of this class, of `torch.optim.Muon`, or of KellerJordan's Muon groups.

        State keeps the dtype it was saved in: torch's own loader would cast fp32 averages of bf16 parameters to bf16.
        Raises ValueError for state of another shape than its parameter, before anything is loaded.
        """
        streams.join()
        saved: dict[str, Any] = {"rules": [group["use_muon"] for group in self.param_groups]}

        def look(_: Any, given: dict[str, Any]) -> None:
            self._check_shapes(given)
            saved.update(given)

        handle = self.register_load_state_dict_pre_hook(look)  # after the user's hooks
        self._loading = saved  # for __setstate__, which torch calls before the user's post-hooks
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self._loading = None
            self._plan = None
        stacks.stack([state for state in self.state.values() if state])

    def _check_shapes(self, state_dict: dict[str, Any]) -> None:
        groups = state_dict["param_groups"]
        if [len(g["params"]) for g in groups] != [len(g["params"]) for g in self.param_groups]:
            return  # torch says what is wrong with it
        for saved, group in zip(groups, self.param_groups, strict=True):
            for i, (key, p) in enumerate(zip(saved["params"], group["params"], strict=True)):
                held = state_dict["state"].get(key, {})
                for name, shape in self._state_shapes(p, group).items() if held else ():
                    value = held.get(name)
                    if name == "step" or not isinstance(value, Tensor) or not value.numel() or value.shape == shape:
                        continue
                    raise ValueError(
                        f"the checkpoint's {name!r} of {parameter_name(group, i)} has shape {tuple(value.shape)} and "
                        f"the parameter {tuple(p.shape)}: it is of another model, or of another order of parameters"
                    )

    def _restore_dtypes(self, saved: dict[str, Any]) -> None:
        ids = itertools.chain.from_iterable(group["params"] for group in saved["param_groups"])
        params = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        for key, p in zip(ids, params, strict=True):
            for name, value in saved["state"].get(key, {}).items():
                self.state[p][name] = _restored(name, value, p)


def _refuse_capture(why: str) -> None:
    """RuntimeError where a CUDA graph is being captured."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"this step cannot be captured in a CUDA graph: {why}")


def _place(value: object) -> int:
    """Where a tensor of the state lies. A plan's views keep the memory, so that no other tensor comes to lie there."""
    return value.data_ptr() if type(value) is Tensor else id(value)  # a fake tensor has no address


def _elsewhere(value: Any, device: torch.device | None) -> bool:
    values = value if isinstance(value, (tuple, list)) else (value,)
    return any(isinstance(each, Tensor) and each.device != device for each in values)


def _effective_lr(lr: Number, recipe: Recipe, parts: tuple[Piece, ...]) -> str:
    ratios = dict.fromkeys(shape_ratio(recipe.adjust_lr, piece.rows, piece.cols) for piece in parts)
    return " | ".join(f"{float(lr) * ratio:.3g}" for ratio in ratios)


def _restored(name: str, value: Any, p: Tensor) -> Any:
    if name == CLOCK:
        return torch.as_tensor(value, dtype=torch.int64).clone().reshape(()).cpu()
    if name == "step":
        return torch.as_tensor(value).detach().clone().reshape(()).to(p.device, torch.float32)
    return value.detach().clone().to(p.device) if isinstance(value, Tensor) else value
