"""Muon, a drop-in for `torch.optim.Muon`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from .. import routing
from ..linalg.coefficients import JORDAN_STEP
from ..optimizer import MatrixOptimizer, Params
from ..optimizer.group_options import Group, number
from ..optimizer.groups import check_shaped
from ..parts import Hyper, Identity, Momentum, Number
from ..recipe import Recipe
from .shared import Extras, Polar, defaults_of, polar_of, recipe_of, spectral

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Muon(MatrixOptimizer):
    """Momentum, orthogonalized: `torch.optim.Muon` (2.13), faster, and for a whole model if asked.

        m <- momentum m + (1 - momentum) g;   u = (1 - momentum) g + momentum m  (nesterov)  or  m
        W <- (1 - lr weight_decay) W - lr ratio(rows, cols) polar(u)

    The first nine arguments, their defaults and the state key `momentum_buffer` are torch's, and so is the trajectory,
    within the rounding of a bf16 iteration. Departures: the input of the iteration is scaled relatively, so a gradient
    of size 1e-20 is orthogonalized like any other; the momentum buffer is never modified by the iteration; a gradient
    that is not finite skips its parameter; state keeps its dtype on loading; fp64 parameters are iterated in fp64.

    params: a module or named parameters are routed (`steepest.param_groups`); a plain iterable must hold matrices, as
        in torch; groups may say use_muon=False for AdamW (the format of KellerJordan's MuonWithAuxAdam), and one that
        says nothing and has names, or more than matrices, is routed.
    lr, weight_decay: numbers >= 0; lr may be a 1-element tensor.   momentum: in [0, 1).
    ns_coefficients, ns_steps: the odd polynomial a x + b x^3 + c x^5 and how often, used when polar is None.
    eps: as in `steepest.polar`, relative to the matrix's largest entry; torch's is absolute.
    adjust_lr_fn: "original" (None), "match_rms_adamw", "spectral_unclamped" or "none"; see `steepest.parts.step_size`.
    polar: a preset of `steepest.polar` or a coefficient table; None is torch's polynomial, "auto" the fast default.

    Raises ValueError or TypeError naming the value; the texts of torch's own checks are torch's.
    Source: kellerjordan.github.io/posts/muon. Equals MuAdam with a constant preconditioner.
    """

    argument_lines: ClassVar[dict[str, str]] = {
        "ns_coefficients": "a, b, c of the polynomial a x + b x^3 + c x^5, where polar is None",
        "ns_steps": "how often the polynomial is applied, where polar is None",
    }

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
        options = {
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
        super().__init__(params, *defaults_of("Muon", options, extra))

    def recipe(self, group: Group) -> Recipe:
        if group["polar"] is None:
            # "jordan" is torch's iteration, operation for operation; other coefficients go through the general one.
            coefficients = tuple(group["ns_coefficients"])
            table = None if coefficients == JORDAN_STEP else (coefficients,)
            direction = spectral(group, "jordan", table, group["ns_steps"], group["eps"], option="ns_coefficients")
        else:
            direction = polar_of(group, group["eps"])
        momentum = Momentum(nesterov=group["nesterov"], dtype=group["momentum_dtype"])
        # Identity is said, though it is the default: torch.compile cannot trace an instance that is a field's default.
        return recipe_of(group, momentum=momentum, precondition=Identity(), direction=direction)

    def hyper(self, group: Group) -> Hyper:
        return Hyper(*map(number, (group["lr"], group["weight_decay"], group["momentum"])))

    def check_values(self, group: Group) -> None:
        if len(group["ns_coefficients"]) != 3:
            raise ValueError(
                f"Coefficients must be a tuple of exactly 3 values but is: {group['ns_coefficients']}; ns_coefficients "
                "are (a, b, c) of a x + b x^3 + c x^5"
            )
        if not 0 < group["ns_steps"] < 100:
            raise ValueError(
                f"Number of steps must be less than 100 for computational efficiency but is: {group['ns_steps']}; "
                "ns_steps is at least 1, and 5 by default"
            )
        super().check_values(group)

    def route_tensors(self, params: list[Any]) -> list[Any]:
        """Matrices, as in torch; what is no tensor torch finds itself."""
        for i, p in enumerate(params):
            if isinstance(p, torch.Tensor):
                check_shaped(p, f"parameter {i}")
                if p.ndim != 2:
                    raise ValueError(
                        f"Muon only supports 2D parameters whereas we found a parameter with size: {p.size()}; "
                        "pass the module itself to have every parameter routed, or a group that says use_muon"
                    )
        return params

    def split_group(self, group: Group) -> list[Group]:
        """Matrices without names are a group of torch.optim.Muon's."""
        params = group["params"]
        is_bare = isinstance(params, list) and "param_names" not in group
        if not is_bare or not all(isinstance(p, torch.Tensor) and p.ndim == 2 for p in params):
            return super().split_group(group)
        routes = [routing.Route(f"param_{i}", p, "matrix", "a plain iterable") for i, p in enumerate(params)]
        routing.warn_if_embedding_like(routes, named=False)
        return [group]
