"""The `torch.optim` shell: groups, state, closures and checkpoints around `plan.update`.

A `MatrixOptimizer` holds two kinds of group: those with use_muon=True take the class's own recipe, those with
use_muon=False take AdamW. One object, one `step`, one learning-rate scheduler for a whole model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, overload

import torch
from torch import Tensor, nn

from . import plan, routing
from .matrices import Piece, pieces
from .ops.backend import requested
from .parts import ADJUST_LR, Decay, Hyper, Number, Rounding, shape_ratio
from .recipe import Recipe, adamw

Group = dict[str, Any]
Params = nn.Module | Mapping[str, Tensor] | Iterable[Any]


class MatrixOptimizer(torch.optim.Optimizer):
    """Base of the named optimizers: a subclass gives `recipe(group)` and `hyper(group)` for its matrices.

    params: a module or named parameters (routed by `steepest.param_groups`), an iterable of tensors (routed by shape),
        or an iterable of groups, where use_muon=False sends a group to AdamW.
    defaults: group values of the matrix method.   adamw: group values of AdamW groups (lr, betas, eps, weight_decay).
    """

    _loading: dict[str, Any] | None = None

    def __init__(self, params: Params, defaults: Group, adamw: Group) -> None:
        self._adamw_defaults = dict(adamw)
        self._reasons: dict[Tensor, str] = {}
        self._skipped: dict[torch.device, Tensor] = {}
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
        declared = _name_the_rule(param_group)
        reasons = param_group.pop("param_reasons", None)
        self._fill(param_group)
        super().add_param_group(param_group)
        try:
            self._check_group(param_group, declared=declared, routed=reasons is not None)
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
        for group in self.param_groups:  # every check, before the first write
            self._check_step(group)
        batches = [self._batch(i, group) for i, group in enumerate(self.param_groups)]
        for group, batch in zip(self.param_groups, batches, strict=True):
            plan.update(
                self._recipe(group),
                self._hyper(group),
                batch,
                backend=group["backend"],
                max_workspace_bytes=group["max_workspace_bytes"],
            )
        return loss

    def init_state(self) -> None:
        """Creates the state of every parameter now, as if each had a zero gradient, without a step."""
        for group in self.param_groups:
            for p in group["params"]:
                self._init_state(p, p.dtype, self._recipe(group))

    def _recipe(self, group: Group) -> Recipe:
        return self.recipe(group) if group["use_muon"] else adamw(group["momentum_dtype"], **finish(group))

    def _hyper(self, group: Group) -> Hyper:
        return self.hyper(group) if group["use_muon"] else adam_hyper(group)

    def _check_step(self, group: Group) -> None:
        """Raises for what a step of this group would stumble over: its values may have changed since it was added."""
        recipe, name = self._recipe(group), type(self).__name__
        forced = requested(group["backend"]) != "auto"
        for p in group["params"]:
            if p.grad is None:
                continue
            if torch.is_complex(p):
                raise RuntimeError(f"{name} does not support complex parameters; found one of shape {tuple(p.shape)}")
            if p.grad.layout != torch.strided:
                raise RuntimeError(f"{name} does not support sparse gradients; found one of shape {tuple(p.shape)}")
            self._check_tensor(p)
            self._pieces(p, group)
            if forced:
                plan.backend_of(recipe, p, group["backend"])

    def _batch(self, number: int, group: Group) -> plan.Batch:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        states: list[Tensor] = []
        skipped: list[Tensor] = []
        self._init_group(group, params, grads, states, skipped)
        keys = self._recipe(group).keys
        return plan.Batch(
            params=params,
            grads=grads,
            states=[dict(zip(keys, states[i : i + len(keys)], strict=True)) for i in range(0, len(states), len(keys))],
            skipped=skipped,
            pieces=[self._pieces(p, group) for p in params],
            places=[(number, i) for i, p in enumerate(group["params"]) if p.grad is not None],
            maximize=group["maximize"],
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
            self._init_state(p, p.grad.dtype, recipe)
            params.append(p)
            grads.append(p.grad)
            states.extend(self.state[p][key] for key in recipe.keys)
            skipped.append(self._counter(p.device))
        return False

    def _init_state(self, p: Tensor, dtype: torch.dtype, recipe: Recipe) -> None:
        state = self.state[p]
        if all(key in state for key in recipe.keys):
            return
        for key, value in recipe.init(torch.empty_like(p, dtype=dtype, requires_grad=False)).items():
            state.setdefault(key, value)

    def _counter(self, device: torch.device) -> Tensor:
        if device not in self._skipped:
            self._skipped[device] = torch.zeros((), dtype=torch.int64, device=device)
        return self._skipped[device]

    # ---- what a user may ask --------------------------------------------------------------------------------------

    def skipped_updates(self) -> dict[torch.device, Tensor]:
        """Per device, how many parameter updates a gradient that was not finite left out (0-d int64 tensors)."""
        return dict(self._skipped)

    def describe(self) -> str:
        """A table with a row per parameter: name, shape, rule, reason, effective learning rate and backend."""
        counter = itertools.count()
        return routing.format_table([row for group in self.param_groups for row in self._rows(group, counter)])

    def _rows(self, group: Group, counter: Iterator[int]) -> list[tuple[str, ...]]:
        names = group.get("param_names") or [f"param_{next(counter)}" for _ in group["params"]]
        return [
            (
                name,
                "x".join(map(str, p.shape)) or "scalar",
                type(self).__name__ if group["use_muon"] else "AdamW",
                self._reasons.get(p, f"use_muon={group['use_muon']} in its group"),
                _effective_lr(group["lr"], self._recipe(group), self._pieces(p, group)),
                plan.backend_of(self._recipe(group), p, group["backend"]),
            )
            for name, p in zip(names, group["params"], strict=True)
        ]

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "_adamw_defaults": self._adamw_defaults,
            "_reasons": self._reasons,
            "_skipped": self._skipped,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # a checkpoint of torch.optim.Muon or of an older version lacks keys
            _name_the_rule(group)
            self._fill(group)
            for key, value in self.defaults.items():
                group.setdefault(key, value)
        if self._loading is not None:
            self._restore_dtypes(self._loading)

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state_dict of this class, of `torch.optim.Muon`, or of KellerJordan's Muon groups.

        State keeps the dtype it was saved in: torch's own loader would cast fp32 averages of bf16 parameters to bf16.
        """
        saved: dict[str, Any] = {}
        handle = self.register_load_state_dict_pre_hook(lambda _, given: saved.update(given))  # after the user's hooks
        self._loading = saved  # for __setstate__, which torch calls before the user's post-hooks
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self._loading = None

    def _restore_dtypes(self, saved: dict[str, Any]) -> None:
        ids = itertools.chain.from_iterable(group["params"] for group in saved["param_groups"])
        params = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        for key, p in zip(ids, params, strict=True):
            for name, value in saved["state"].get(key, {}).items():
                self.state[p][name] = _restored(name, value, p)


def check_lr(lr: Number) -> None:
    """ValueError in torch's words unless lr is one number >= 0."""
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element but has {lr.numel()}")
    check_at_least_zero("Learning rate", lr)


def check_at_least_zero(name: str, value: Number) -> None:
    if not value >= 0.0:
        raise ValueError(f"{name} should be >= 0 but is: {value}")


def check_betas(betas: tuple[Number, Number]) -> None:
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas should be two numbers in [0, 1) but is: {betas}")


def finish(group: Group) -> dict[str, Any]:
    """The parts of a recipe that end every step, the same for matrices and for AdamW."""
    return {
        "decay": Decay(cautious=group["cautious_wd"]),
        "rounding": Rounding("stochastic" if group["stochastic_rounding"] else "nearest"),
    }


def number(value: Number) -> Number:
    """A float, or a 0-d view of a 1-element tensor of any shape."""
    return value.reshape(()) if isinstance(value, Tensor) else value


def adam_hyper(group: Group) -> Hyper:
    """The numbers of a group with Adam's keys: lr, betas, eps, weight_decay."""
    beta1, beta2 = group["betas"]
    return Hyper(lr=number(group["lr"]), weight_decay=group["weight_decay"], beta1=beta1, beta2=beta2, eps=group["eps"])


def _name_the_rule(group: Group) -> bool:
    """Turns algorithm="muon"/"adamw" into use_muon; whether the group named its rule at all."""
    if "algorithm" in group:
        algorithm = group.pop("algorithm")
        if algorithm not in ("muon", "adamw"):
            raise ValueError(f"group algorithm {algorithm!r} is not known; use 'muon' or 'adamw'")
        group["use_muon"] = algorithm == "muon"
    return "use_muon" in group


def _effective_lr(lr: Number, recipe: Recipe, parts: tuple[Piece, ...]) -> str:
    ratios = dict.fromkeys(shape_ratio(recipe.adjust_lr, piece.rows, piece.cols) for piece in parts)
    return " | ".join(f"{float(lr) * ratio:.3g}" for ratio in ratios)


def _restored(name: str, value: Any, p: Tensor) -> Any:
    if name == "step" and not isinstance(value, Tensor):
        return torch.tensor(float(value), dtype=torch.float32, device=p.device)
    return value.detach().clone().to(p.device) if isinstance(value, Tensor) else value
