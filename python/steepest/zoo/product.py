"""Steepest descent in a norm of the whole model that is made of its layers' norms: MuonMax, MuonAdam and the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from ..optimizer import Params
from ..optimizer.group_options import Group, adam_hyper, finish
from ..optimizer.option_types import check_option
from ..parts import Diagonal, Direction, Frobenius, Hyper, Identity, Momentum, Number, Precondition, Sign
from ..parts.product_norm import Box, ProductNorm
from ..recipe import Recipe
from .momo import Layers, Momo
from .shared import Extras, Polar, defaults_of, polar_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

Scale = Literal["lmo", "dual"]


_COUPLING = ("lower_bound", "stale_dual", "reduce_loss")


def _without(extra: Coupling, keys: Sequence[str]) -> Any:
    return {key: value for key, value in extra.items() if key not in keys}


# ---- steepest descent in a product norm ---------------------------------------------------------------------------

_ADAM = Diagonal(bias_correction=False, eps_inside=False)
#: Norms of parameters that are not matrices: (preconditioner, direction), one layer a tensor.
OTHERS: dict[str, tuple[Precondition, Direction]] = {
    "adam_2": (_ADAM, Frobenius()),
    "adam_infty": (_ADAM, Box()),
    "sign": (Identity(), Sign()),
    "euclidean": (Identity(), Frobenius()),
}


class Coupling(Extras, total=False):
    """Keyword arguments of every method here; the first three are the optimizer's, not of a group: see `Momo`.

    The first line of each is its line in the help of every class (`zoo.arguments`).

    lower_bound: of the loss, for Momo's truncation; None: none
    stale_dual: dual norms are those of the step before; None: as the class has it
    reduce_loss: the loss is averaged over all processes
    adamw_weight_decay: decay of what is no matrix, by default weight_decay; gains and biases have none
    """

    lower_bound: Number | None
    stale_dual: bool | None
    reduce_loss: bool


class ProductNormOptimizer(Momo):
    """Base of the methods here: a subclass gives its group values `own` and says which rule it is.

    A matrix is a layer with a spectral norm, any other parameter one in the norm `others`; its group's lr multiplies
    the same kind of step. ValueError for an unknown rule, TypeError for AdamW's own numbers.
    """

    carried: ClassVar[tuple[str, ...]] = ("product", "scale", "others")
    refused_options = ("adamw_lr", "adamw_betas", "adamw_eps")

    def __init__(
        self,
        params: Params,
        options: Group,
        extra: Coupling,
        *,
        product: ProductNorm,
        scale: Scale,
        others: str,
    ) -> None:
        if check_option("scale", scale) not in ("lmo", "dual"):
            raise ValueError(f"scale {scale!r} is not known; use 'lmo' (length lr in the norm) or 'dual'")
        others = check_option("others", others)
        if others not in OTHERS:
            raise ValueError(
                f"others={others!r} is not known, a norm of what is no matrix; use one of {', '.join(OTHERS)}"
            )
        name = type(self).__name__
        for key in self.refused_options:
            if key in extra:
                raise TypeError(
                    f"{name} does not take {key}: parameters that are not matrices belong to the same rule; give "
                    "their group a value of its own instead"
                )
        coupling = {key: extra[key] for key in _COUPLING if key in extra}  # type: ignore[literal-required]
        values, adamw = defaults_of(name, options, _without(extra, _COUPLING))
        adamw = {**adamw, **{key: options[key] for key in ("lr", "betas", "eps") if key in options}}
        adamw["weight_decay"] = extra.get("adamw_weight_decay", options["weight_decay"])
        self.product, self.scale, self.others = product, scale, others
        super().__init__(params, values, adamw, **{"lower_bound": None, **coupling})

    # ---- parts ----------------------------------------------------------------------------------------------------

    def direction(self, group: Group) -> Direction:
        """The base norm of the matrices of a group."""
        return polar_of(group)

    def momentum(self, group: Group) -> Momentum:
        return Momentum(start="first", dtype=group["momentum_dtype"])

    def recipe(self, group: Group) -> Recipe:
        ratio = group["adjust_lr_fn"] or "none"
        return self._recipe_of(group, self.product.follows(True), Identity(), self.direction(group), ratio)

    def _recipe_of(
        self, group: Group, follows: bool, precondition: Precondition, direction: Direction, ratio: str = "none"
    ) -> Recipe:
        scale: Scale = "dual" if follows else "lmo"
        momentum = self.momentum(group)
        return Recipe(momentum, precondition, direction, scale, ratio, **finish(group))

    def hyper(self, group: Group) -> Hyper:
        return adam_hyper(group)

    def hyper_of_others(self, group: Group) -> Hyper:
        return self.hyper(group)

    @property
    def rule_of_others(self) -> str:
        return self.others

    def recipe_of_others(self, group: Group) -> Recipe:
        return self._recipe_of(group, self.product.follows(False), *OTHERS[self.others])

    # ---- the rule -------------------------------------------------------------------------------------------------

    def couples(self) -> bool:
        return self.lower_bound is not None or self.product.couples(self.scale)

    def _stale(self, recipe: Recipe) -> bool:
        return super()._stale(recipe) and (self.product.kind, self.scale) != ("l2", "lmo")

    def _factors(self, layers: Sequence[Layers]) -> list[Number]:
        matrices, others = self._dual_norms(layers)
        factors = self.product.factors(matrices, others, self.scale)
        return [factors[0] if group["use_muon"] else factors[1] for group in self.param_groups]

    def _dual_norms(self, layers: Sequence[Layers]) -> tuple[Tensor, Tensor]:
        """The dual norms of all matrices, and those of all other layers."""
        norms: dict[bool, list[Tensor]] = {True: [layers[0].dual_norms[:0]], False: [layers[0].dual_norms[:0]]}
        for group, each in zip(self.param_groups, layers, strict=True):
            norms[group["use_muon"]].append(each.dual_norms)
        return torch.cat(norms[True]), torch.cat(norms[False])


class ProductNormDescent(ProductNormOptimizer):
    """Steepest descent in a product norm: every layer has its own norm, and one norm of those couples the layers.

        M <- beta M + (1 - beta) G,  V likewise of G o G, with the other beta;  first gradients start both
        W_l <- (1 - lr weight_decay) W_l - lr t w_l dz_l(M_l)

    Matrices: spectral norm, dz = ratio(rows, cols) polar(M). Every other parameter is one layer:

        others        norm                                 dz(M)
        adam_2        sqrt(sum (sqrt(V) + eps) x^2)        M / (sqrt(V) + eps) / dual norm
        adam_infty    max (sqrt(V) + eps) |x| / |M|        M / (sqrt(V) + eps)
        sign          max |x|                              sign(M)
        euclidean     ||x||_2                              M / dual norm

    product, scale: the product norm, "max", "l2" or "hybrid", and the kind of step, "lmo" (length lr) or "dual"
        (regularized); they say what w_l is, see the table in `steepest.parts.product_norm`. "l2" with "dual" and
        "adam_2" is PolarGrad, "max" with "lmo" and "sign" is like Scion.
    matrix_scale: s of product="hybrid".
    lr, weight_decay, betas, eps: of all groups, those of other parameters included, which may have values of their own.
    adjust_lr_fn: as in `steepest.Muon`, None is "none". A ratio makes steps longer: the norm of the matrix is the
        spectral one divided by ratio, or where w_l follows d_l (product="l2") by its root.
    polar: as in `steepest.MuAdam`.   With a lower_bound t is Momo's, else 1.

    "max" with "lmo" and "l2" with "dual" do not couple layers without a lower bound. The steps of "l2" with "lmo" have
    length lr because their dual norms are never stale. The others' are those of the step before with stale_dual=True.
    Besides the directions a coupled step costs passes over momenta, those of `Momo` with a lower bound, and unless dual
    norms are stale the memory that holds all directions. Source: arXiv:2510.09827.
    """

    stale_dual = False
    argument_lines: ClassVar[dict[str, str]] = {
        "product": 'norm over the layers: "max", "l2" or "hybrid"',
        "others": 'norm of what is no matrix: "adam_2", "adam_infty", "sign" or "euclidean"',
    }

    def __init__(
        self,
        params: Params,
        lr: Number = 1e-3,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        adjust_lr_fn: str | None = None,
        *,
        product: Literal["max", "l2", "hybrid"] = "hybrid",
        scale: Scale = "dual",
        matrix_scale: float = 10.0,
        others: str = "adam_2",
        polar: Polar = "auto",
        **extra: Unpack[Coupling],
    ) -> None:
        options = given_values(lr, weight_decay, betas, eps, adjust_lr_fn, polar)
        matrix_scale = check_option("matrix_scale", matrix_scale)
        rule = ProductNorm(check_option("product", product), matrix_scale if product == "hybrid" else 1.0)
        super().__init__(params, options, extra, product=rule, scale=scale, others=others)


class MuonMax(ProductNormOptimizer):
    """Regularized steepest descent where the matrices share one spectral norm; with lower_bound MuonMax-Momo.

        S = sum over matrices of ratio(rows, cols) ||M||_nuc
        matrices   W <- (1 - lr weight_decay) W - lr t matrix_scale S ratio(rows, cols) polar(M)
        others     W <- (1 - lr weight_decay) W - lr t M / (sqrt(V) + eps)
        t = min(1, (model - lower_bound)_+ / (lr (matrix_scale S^2 + sum M^2 / (sqrt(V) + eps))))

    with M and V as in `ProductNormDescent`, whose product="hybrid", scale="dual", others="adam_2" this is. All matrices
    share one adaptive factor. S is of the previous step, as the authors have it; with stale_dual=False of this one.
    With one matrix and matrix_scale=1 it is regularized Muon, W - lr ||M||_nuc polar(M).

    lower_bound: of the loss; None: MuonMax without Momo, t = 1. The authors use 0, and up to 3.2 for language models.
    matrix_scale: s, 10 in the authors' MuonMax-Momo; their more general code has spectral_scale=4, which is s = 16.
    Other arguments as in `ProductNormDescent`, `Coupling`.

    Source: arXiv:2510.09827 and its authors' code, with whose defaults; betas[0] is the momentum of all parameters.
    """

    def __init__(
        self,
        params: Params,
        lr: Number = 1e-3,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        adjust_lr_fn: str | None = None,
        *,
        matrix_scale: float = 10.0,
        polar: Polar = "auto",
        **extra: Unpack[Coupling],
    ) -> None:
        options = given_values(lr, weight_decay, betas, eps, adjust_lr_fn, polar)
        rule = ProductNorm("hybrid", check_option("matrix_scale", matrix_scale))
        super().__init__(params, options, extra, product=rule, scale="dual", others="adam_2")


class MuonAdam(ProductNormOptimizer):
    """Muon for matrices and Adam for the rest as one constrained step; with lower_bound MuonAdam-Momo.

        matrices   W <- (1 - lr weight_decay) W - lr t ratio(rows, cols) polar(M)
        others     W <- (1 - lr weight_decay) W - lr t M / (sqrt(V) + eps)
        t = min(1, (model - lower_bound)_+ / (lr (sum ratio ||M||_nuc + sum M^2 / (sqrt(V) + eps))))

    with M and V as in `ProductNormDescent`, whose product="max", scale="lmo", others="adam_infty" this is. Without a
    lower bound it is Muon beside Adam, whose averages begin with the first gradient instead of being corrected. One lr
    for all, though a group of other parameters may have a value of its own.

    Arguments as in `ProductNormDescent`, `Coupling`. Source: arXiv:2510.09827.
    """

    def __init__(
        self,
        params: Params,
        lr: Number = 1e-3,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        adjust_lr_fn: str | None = None,
        *,
        polar: Polar = "auto",
        **extra: Unpack[Coupling],
    ) -> None:
        options = given_values(lr, weight_decay, betas, eps, adjust_lr_fn, polar)
        super().__init__(params, options, extra, product=ProductNorm("max"), scale="lmo", others="adam_infty")


def given_values(
    lr: Number,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    adjust_lr_fn: str | None,
    polar: Polar,
) -> Group:
    return {
        "lr": lr,
        "weight_decay": weight_decay,
        "betas": betas,
        "eps": eps,
        "adjust_lr_fn": adjust_lr_fn,
        "polar": polar,
    }
