"""Scion: every layer steps in the norm of the map it is."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..optimizer import Params
from ..optimizer.group_options import (
    Group,
    number,
    parameter_name,
    refuse_cautious_update,
    refuse_decay_methods,
    refuse_option,
    refuse_schedule_free,
)
from ..optimizer.option_types import check_option
from ..parts import Columns, Direction, Hyper, Identity, Momentum, Number, Rows, Sign, shape_ratio
from ..recipe import Recipe
from ..routing.overrides import Overrides, find, read_overrides
from ..routing.places import Place, Routable, read_places
from ..routing.rules import is_convolution, layout, role
from ..step.modes import in_default_modes
from .shared import Extras, Polar, defaults_of, polar_of, recipe_of
from .vector import VectorOptimizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

# norm: (ratio of `steepest.parts.step_size`, direction; None: spectral)
_NORMS: dict[str, tuple[str, Direction | None]] = {
    "spectral": ("spectral_unclamped", None),
    "first": ("original", None),
    "conv": ("spectral_unclamped", None),
    "sign": ("head", Sign()),
    "embedding": ("embedding", Rows()),
    "columns": ("embedding_columns", Columns()),
    "rows": ("head_rows", Rows()),
    "bias": ("embedding_columns", Columns()),
}
#: The names of a group's norm.
NORMS = tuple(_NORMS)

_OF_ROLE = {"vector": "bias", "normalization": "bias", "embedding": "embedding", "table": "embedding", "head": "sign"}
_HEAD = 60.0  # the head's radius over that of the rest, for GPT of the authors' size


class Scion(VectorOptimizer):
    """Steepest descent in the norm of every layer, unconstrained or within a ball.

        m <- momentum m + (1 - momentum) g
        W <- (1 - lr) W - lr radius unit(m)                     constrained: ||W|| <= radius from a start in the ball
        W <- (1 - lr weight_decay) W - lr radius unit(m)        unconstrained

    norm, a group value        unit(m), m of d_out rows and d_in columns        for
    "spectral"                 sqrt(d_out / d_in) polar(m)                      hidden matrices
    "first"                    max(1, sqrt(d_out / d_in)) polar(m)              first layers, of one-hot inputs
    "conv"                     sqrt(d_out / d_in) / taps polar(m)               kernels, m as (d_out, d_in taps)
                               sqrt(d_out / d_in) polar(m)                      transposed, m as (d_out taps, d_in)
    "sign"                     sign(m) / d_in                                   heads
    "rows"                     rows of length 1 / sqrt(d_in)                    heads
    "embedding"                rows of length sqrt(d_in)                        tables with a row a token (nn.Embedding)
    "columns"                  columns of length sqrt(d_out)                    tables with a column a token
    "bias"                     m / RMS(m), of a vector                          biases and gains

    params: a module, named parameters or tensors: `scion_groups` gives them their norms; or groups, whose parameters
        are steered by their norm alone (use_muon=False: AdamW).   norm, radius: of groups that do not say their own.
    lr: gamma of the paper, a number >= 0 or a 1-element tensor; below 1 where constrained.
    momentum: in [0, 1), 1 - alpha of the paper.   weight_decay: beyond what the constraint is.
    polar: as in `steepest.MuAdam`.

    A group with norm "conv" has kernels of one number of taps. `init()` puts weights on the sphere of their ball. With
    radius 1, unconstrained and "spectral" everywhere it equals `steepest.Muon` with nesterov=False and
    adjust_lr_fn="spectral_unclamped". Source: arXiv:2502.07529, Algorithms 1 and 2; norms and defaults of its code.
    """

    argument_lines: ClassVar[dict[str, str]] = {
        "radius": "radius of a layer's ball; a step is lr times as long",
        "constrained": "weights stay in the ball",
    }

    def __init__(
        self,
        params: Params,
        lr: Number = 2**-12,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        *,
        norm: str = "spectral",
        radius: float = 50.0,
        constrained: bool = True,
        polar: Polar = "auto",
        **extra: Unpack[Extras],
    ) -> None:
        options = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "norm": norm,
            "radius": radius,
            "constrained": constrained,
            "polar": polar,
            "adjust_lr_fn": None,
        }
        self._radius = check_option("radius", radius)
        super().__init__(params, *defaults_of("Scion", options, extra))

    def recipe(self, group: Group) -> Recipe:
        ratio, direction = _NORMS[group["norm"]]
        return recipe_of(
            group,
            ratio=ratio,
            momentum=Momentum(dtype=group["momentum_dtype"]),
            precondition=Identity(),
            direction=polar_of(group) if direction is None else direction,
        )

    def hyper(self, group: Group) -> Hyper:
        lr, decay, beta = map(number, (group["lr"], group["weight_decay"], group["momentum"]))
        reach = group["radius"] / _taps(group) ** 0.5
        if group["weight_decay_method"] != "decoupled":  # which no learning rate multiplies
            return Hyper(lr * reach, decay, beta)
        return Hyper(lr * reach, (decay + 1.0 if group["constrained"] else decay) / reach, beta)

    @in_default_modes
    def init(self) -> None:
        """W <- radius unit(W) for every weight but AdamW's: a random start, on the sphere; zeros stay zeros."""
        for group in self.param_groups:
            for p in group["params"] if group["use_muon"] else ():
                recipe, reach = self.recipe(group), group["radius"] / _taps(group) ** 0.5
                for piece in self.pieces_of(p, group) if p.numel() else ():
                    w = piece.view(p)
                    wide = w.reshape(piece.shape).to(torch.promote_types(p.dtype, torch.float32))
                    length = reach * shape_ratio(recipe.adjust_lr, piece.rows, piece.cols)
                    w.copy_((recipe.direction.unit(wide) * length).reshape(w.shape))

    def route(self, params: Any) -> list[Group]:
        return scion_groups(params, radius=self._radius)

    def check_values(self, group: Group) -> None:
        if group["norm"] not in NORMS:
            raise ValueError(f"norm {group['norm']!r} is not known; use one of {', '.join(NORMS)}")
        if group["constrained"]:
            refuse_schedule_free(group, "its decay keeps no iterate in Scion's ball: constrained=False")
            refuse_option(group, "constraint", "Scion has its ball: constrained=False")
            refuse_cautious_update(group, "an update that is made longer leaves Scion's ball: constrained=False")
            refuse_decay_methods(group, "the decay is Scion's constraint", "independent", "l2")
        super().check_values(group)

    def check_parameters(self, group: Group) -> None:
        super().check_parameters(group)
        for i, p in enumerate(group["params"] if group["use_muon"] else ()):
            if group["norm"] == "bias" and p.ndim > 1:
                raise ValueError(
                    f"{parameter_name(group, i)} has shape {tuple(p.shape)} and norm 'bias', which is for vectors: "
                    "use 'columns', or another of " + ", ".join(NORMS)
                )
        if len({math.prod(p.shape[2:]) for p in group["params"]}) > 1 and _is_conv(group):
            raise ValueError("a group with norm 'conv' has kernels of several sizes: make one group for each size")


def _is_conv(group: Group) -> bool:
    return bool(group["use_muon"]) and group["norm"] == "conv"


def _taps(group: Group) -> int:
    """sqrt(d_out / d_in) / taps is sqrt(d_out / (d_in taps)), the ratio of the kernel as a matrix, over sqrt(taps)."""
    return math.prod(group["params"][0].shape[2:]) if _is_conv(group) and group["params"] else 1


def scion_groups(
    params: Routable,
    *,
    radius: float = 50.0,
    head_radius: float | None = None,
    overrides: Overrides | None = None,
) -> list[dict[str, Any]]:
    """Groups for `Scion`: every parameter with the norm of its role, which its module, name and shape tell.

        role                                      norm           radius
        hidden matrix, experts                    "spectral"     radius
        convolution                               "conv"         radius; a group for each number of taps
        head                                      "sign"         head_radius, by default 60 radius
        embedding, table of positions or tokens   "embedding"    radius
        vector; of a normalization layer          "bias"         radius

    A tied parameter is a head where one of its places is. Roles are those of `steepest.param_groups`.
    overrides: as there, {pattern or module type: what}: group values such as {"norm": "first", "radius": 1.0} (the rule
        "matrix" is the default, and passes over vectors), "adamw" or "exclude". Tensors without names are matrices, and
        vectors where they have fewer than two dimensions.
    Raises as `steepest.param_groups` does.
    """
    parameters, named = read_places(params)
    if overrides and not named:
        raise ValueError("overrides need names: pass the model or model.named_parameters() instead of tensors alone")
    entries = read_overrides(overrides, [place for places in parameters for place in places])
    heads = _HEAD * radius if head_radius is None else head_radius
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for places in parameters:
        place, override = places[0], find(entries, places)
        if (named and not place.param.requires_grad) or (override is not None and override.rule == "exclude"):
            continue
        matrix = override is None or override.rule == "matrix"
        norm = _norm(places)
        values: dict[str, Any] = {} if override is None else dict(override.values)
        if matrix:
            reading = {} if norm == "bias" else layout(place)
            values = {"norm": norm, "radius": heads if norm == "sign" else radius, **reading, **values}
        taps = math.prod(place.param.shape[2:]) if values.get("norm") == "conv" else 1
        key = (matrix, taps, *sorted(values.items()))
        group = groups.setdefault(key, {"params": [], "use_muon": matrix, "param_reasons": [], **values})
        group["params"].append((place.name, place.param) if named else place.param)
        group["param_reasons"].append(_reason(places) if override is None else f"override {override.label}")
    if not groups:
        raise ValueError("no trainable parameter: all are frozen (requires_grad=False) or excluded")
    return list(groups.values())


def _norm(places: list[Place]) -> str:
    roles = [role(place) for place in places]
    if "head" in roles:
        return "sign"
    if roles[0] in _OF_ROLE:
        return "columns" if roles[0] == "normalization" and places[0].param.ndim > 1 else _OF_ROLE[roles[0]]
    return "conv" if is_convolution(places[0]) or places[0].param.ndim > 3 else "spectral"


def _reason(places: list[Place]) -> str:
    return f"{_norm(places)} ({places[0].kind})"
