"""The named optimizers: a signature, an equation and a recipe each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import torch

from . import routing
from .linalg.coefficients import JORDAN_STEP, schedule
from .optimizer import MatrixOptimizer, Params
from .parts import Diagonal, Hyper, Identity, Momentum, Number, Spectral
from .recipe import Recipe
from .values import Group, adam_hyper, check_at_least_zero, check_betas, finish, number

if TYPE_CHECKING:
    from typing_extensions import Unpack

#: A preset of `steepest.polar`, or a table of odd polynomials, one tuple of coefficients a step.
Polar = str | Sequence[Sequence[float]]


class Extras(TypedDict, total=False):
    """Keyword arguments every optimizer here takes; all but adamw_* are group values.

    num_heads, split_sizes, batch_dims: how fused or stacked weights are read as matrices; see `steepest.matrices`.
    cautious_wd: decay only where it agrees with the update.      maximize: ascend.
    momentum_dtype: dtype of the momentum (None: the gradient's). stochastic_rounding: of bf16 parameters.
    keep_mantissa: of bf16 parameters, the 16 bits that bf16 drops are kept as state, as if they were fp32.
    capturable: lr and weight_decay become tensors on the device, so that a step can be captured in a CUDA graph;
        schedulers fill them in place. `steepest.graphed` captures a whole step.
    backend: "auto", "cuda", "triton", "cpu" or "torch", of everything elementwise.
    max_workspace_bytes: about what a step may borrow at once, inputs of the direction included; one matrix is always
        worked on, and a launch covers all matrices that fit.
    adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay: the AdamW groups; adamw_lr=None is 3e-4, or lr itself with
        adjust_lr_fn="match_rms_adamw".
    """

    num_heads: int | Sequence[int] | None
    split_sizes: Sequence[int] | None
    batch_dims: int | None
    cautious_wd: bool
    maximize: bool
    momentum_dtype: torch.dtype | None
    stochastic_rounding: bool
    keep_mantissa: bool
    capturable: bool
    backend: str
    max_workspace_bytes: int
    adamw_lr: Number | None
    adamw_betas: tuple[float, float]
    adamw_eps: float
    adamw_weight_decay: float


_EXTRAS = Extras(
    num_heads=None,
    split_sizes=None,
    batch_dims=None,
    cautious_wd=False,
    maximize=False,
    momentum_dtype=None,
    stochastic_rounding=False,
    keep_mantissa=False,
    capturable=False,
    backend="auto",
    max_workspace_bytes=1 << 30,
    adamw_lr=None,
    adamw_betas=(0.9, 0.95),
    adamw_eps=1e-8,
    adamw_weight_decay=0.0,
)


def _defaults(name: str, own: Group, extra: Extras) -> tuple[Group, Group]:
    """(defaults of matrix groups, defaults of AdamW groups) from a class's own arguments and the shared ones."""
    unknown = sorted(set(extra) - set(_EXTRAS))
    if unknown:
        raise TypeError(f"{name} got an unexpected argument {unknown[0]!r}; it takes {', '.join([*own, *_EXTRAS])}")
    values: Group = {**own, **_EXTRAS, **extra}
    adamw = {key.removeprefix("adamw_"): values.pop(key) for key in list(values) if key.startswith("adamw_")}
    if adamw["lr"] is None:
        adamw["lr"] = own["lr"] if own["adjust_lr_fn"] == "match_rms_adamw" else 3e-4
    return values, adamw


def _recipe(group: Group, **parts: Any) -> Recipe:
    """A recipe from the parts that make a method and the group values all methods share."""
    return Recipe(adjust_lr=group["adjust_lr_fn"] or "original", **finish(group), **parts)


def _spectral(
    group: Group, preset: str, coefficients: Any = None, steps: int | None = None, eps: float = 1e-7
) -> Spectral:
    """The direction; an error now for what `polar` would refuse in the middle of a step."""
    check_at_least_zero("eps", eps)
    table = None if coefficients is None else tuple(tuple(row) for row in coefficients)
    if preset != "svd":
        schedule(preset, table, steps)
    return Spectral(preset, table, steps, eps, group["max_workspace_bytes"])


def _polar(group: Group, eps: float = 1e-7) -> Spectral:
    """The direction for the group's `polar`; eps as in `steepest.polar`."""
    polar = group["polar"]
    if isinstance(polar, str):
        return _spectral(group, polar, eps=eps)
    rows: tuple[Any, ...] = tuple(polar) if isinstance(polar, Sequence) else ()
    if not rows or not all(isinstance(row, Sequence) for row in rows):
        raise TypeError(f"polar must be a preset's name or a list of coefficient tuples, one a step, but is: {polar!r}")
    return _spectral(group, "jordan", rows, eps=eps)


class Muon(MatrixOptimizer):
    """Momentum, orthogonalized: `torch.optim.Muon` (2.13), faster, and for a whole model if asked.

        m <- momentum m + (1 - momentum) g;   u = (1 - momentum) g + momentum m  (nesterov)  or  m
        W <- (1 - lr weight_decay) W - lr ratio(rows, cols) polar(u)

    The first nine arguments, their defaults and the state key `momentum_buffer` are torch's, and so is the trajectory,
    within the rounding of a bf16 iteration. Departures: the input of the iteration is scaled relatively, so a gradient
    of size 1e-20 is orthogonalized like any other; the momentum buffer is never modified by the iteration; a gradient
    that is not finite skips its parameter; state keeps its dtype on loading; fp64 parameters are iterated in fp64.

    params: a module or named parameters are routed (`steepest.param_groups`); a plain iterable must hold matrices, as
        in torch; groups may say use_muon=False for AdamW (the format of KellerJordan's MuonWithAuxAdam).
    lr, weight_decay, momentum: numbers >= 0; lr may be a 1-element tensor.
    ns_coefficients, ns_steps: the odd polynomial a x + b x^3 + c x^5 and how often, used when polar is None.
    eps: as in `steepest.polar`, relative to the matrix's largest entry; torch's is absolute.
    adjust_lr_fn: "original" (None), "match_rms_adamw", "spectral_unclamped" or "none"; see `steepest.parts.step_size`.
    polar: a preset of `steepest.polar` or a coefficient table; None is torch's polynomial, "auto" the fast default.
    extra: see `Extras`.

    Raises ValueError or TypeError naming the value; the texts of torch's own checks are torch's.
    Source: kellerjordan.github.io/posts/muon. Equals MuAdam with a constant preconditioner.
    """

    def __init__(
        self,
        params: Params,
        lr: Number = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, ...] = JORDAN_STEP,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        polar: Polar | None = None,
        **extra: Unpack[Extras],
    ) -> None:
        own = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "polar": polar,
        }
        super().__init__(params, *_defaults("Muon", own, extra))

    def recipe(self, group: Group) -> Recipe:
        if group["polar"] is None:
            # "jordan" is torch's iteration, operation for operation; other coefficients go through the general one.
            coefficients = tuple(group["ns_coefficients"])
            table = None if coefficients == JORDAN_STEP else (coefficients,)
            direction = _spectral(group, "jordan", table, group["ns_steps"], group["eps"])
        else:
            direction = _polar(group, group["eps"])
        momentum = Momentum(nesterov=group["nesterov"], dtype=group["momentum_dtype"])
        # Identity is said, though it is the default: torch.compile cannot trace an instance that is a field's default.
        return _recipe(group, momentum=momentum, precondition=Identity(), direction=direction)

    def hyper(self, group: Group) -> Hyper:
        return Hyper(*map(number, (group["lr"], group["weight_decay"], group["momentum"])))

    def _check_values(self, group: Group) -> None:
        check_at_least_zero("momentum", group["momentum"])
        if len(group["ns_coefficients"]) != 3:
            raise ValueError(f"Coefficients must be a tuple of exactly 3 values but is: {group['ns_coefficients']}")
        if group["ns_steps"] >= 100:
            raise ValueError(
                f"Number of steps must be less than 100 for computational efficiency but is: {group['ns_steps']}"
            )
        super()._check_values(group)

    def _check_shape(self, p: torch.Tensor, group: Group, declared: bool) -> None:
        if not declared and p.ndim != 2:
            raise ValueError(
                f"Muon only supports 2D parameters whereas we found a parameter with size: {p.size()}; "
                "pass the module itself to have every parameter routed, or a group that says use_muon"
            )
        super()._check_shape(p, group, declared)

    def _bare_groups(self, params: list[Any]) -> list[Any]:
        matrices = [p for p in params if isinstance(p, torch.Tensor) and p.ndim == 2]
        routes = [routing.Route(f"param_{i}", p, "matrix", "a plain iterable") for i, p in enumerate(matrices)]
        routing.warn_if_embedding_like(routes, named=False)
        return params


class MuAdam(MatrixOptimizer):
    """Muon in Adam's metric: steepest descent in the spectral norm of D o X, where D^2 is Adam's denominator.

        m <- beta1 m + (1 - beta1) g;   v <- beta2 v + (1 - beta2) g o g;   D^2 = (sqrt(v) + eps) / sqrt(1 - beta2^t)
        W <- (1 - lr weight_decay) W - lr ratio(rows, cols) polar(m / (1 - beta1^t) / D) / D

    One object for a whole model: matrices by this rule, everything else by AdamW in the same step.

    params: a module, named parameters, an iterable of tensors (routed by shape) or groups; see `steepest.param_groups`.
    lr: a number >= 0 or a 1-element tensor. The update grows as the square root of one over the gradient's scale, so a
        loss multiplied by c wants lr multiplied by sqrt(c).
    betas: decay rates of the two averages.     eps: added to sqrt(v).
    polar: a preset of `steepest.polar` or a coefficient table.
    adjust_lr_fn: as in `Muon`.                 extra: see `Extras`.

    Source: arXiv:2510.10777, Algorithm 1 (row MuAdam of Table 1). With a constant D it equals Muon up to scale.
    """

    _power = 0.25

    def __init__(
        self,
        params: Params,
        lr: Number = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adjust_lr_fn: str | None = None,
        *,
        polar: Polar = "auto",
        **extra: Unpack[Extras],
    ) -> None:
        own = {
            "lr": lr,
            "weight_decay": weight_decay,
            "betas": betas,
            "eps": eps,
            "adjust_lr_fn": adjust_lr_fn,
            "polar": polar,
        }
        super().__init__(params, *_defaults(type(self).__name__, own, extra))

    def recipe(self, group: Group) -> Recipe:
        momentum = Momentum(bias_correction=True, dtype=group["momentum_dtype"])
        precondition = Diagonal(power=self._power)
        return _recipe(group, momentum=momentum, precondition=precondition, direction=_polar(group))

    def hyper(self, group: Group) -> Hyper:
        return adam_hyper(group)

    def _check_values(self, group: Group) -> None:
        check_betas(group["betas"])
        check_at_least_zero("eps", group["eps"])
        super()._check_values(group)


class MuAdamSANIA(MuAdam):
    """MuAdam without the square root: D^2 = (v + eps) / (1 - beta2^t), so D scales exactly as the gradient does.

        W <- (1 - lr weight_decay) W - lr ratio(rows, cols) polar(m / (1 - beta1^t) / D) / D

    With eps=0 (where 0/0 = 0) the iterates are equivariant under elementwise rescaling of the weights: training
    f(A o W) from A^-1 o W_0 visits A^-1 o W_t. The update grows as one over the gradient's scale: a loss multiplied by
    c wants lr multiplied by c. Arguments as in `MuAdam`; eps is divided by 1 - beta2^t too, so its default of 1e-8, the
    authors', outweighs gradients below 3e-3 in the first step.

    Source: arXiv:2510.10777 (row MuAdam-SANIA of Table 1).
    """

    _power = 0.5
