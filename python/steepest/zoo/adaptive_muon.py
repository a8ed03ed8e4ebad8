"""NorMuon, AdaMuon and NAMO: Muon whose update learns a scale of its rows, of its entries, or of the whole matrix."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from ..optimizer import MatrixOptimizer, Params
from ..optimizer.group_options import Group, number
from ..optimizer.option_types import check_option
from ..parts import Hyper, Identity, Momentum, Normalize, NormRatio, Number, SpectralOfSign, UpdateTransform
from ..recipe import Recipe
from .shared import Extras, Polar, defaults_of, polar_of, recipe_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


class AdaptiveMuon(MatrixOptimizer):
    """Base of the methods here: momentum, the polar factor, and a transform of it that remembers."""

    _transform: ClassVar[UpdateTransform]
    _ratio = "match_rms_adamw"
    _corrects = False
    #: whether an update has AdamW's size, so that its lr is one for AdamW's groups
    _fits_adamw = True
    #: defaults of arguments that a subclass has besides
    _more: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        params: Params,
        lr: Number = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        beta2: float = 0.95,
        nesterov: bool = False,
        adjust_lr_fn: str | None = None,
        *,
        polar: Polar = "auto",
        **extra: Unpack[Extras],
    ) -> None:
        options = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "beta2": beta2,
            "nesterov": nesterov,
            "adjust_lr_fn": adjust_lr_fn,
            "polar": polar,
            **{key: extra.pop(key, default) for key, default in self._more.items()},  # type: ignore[misc]
        }
        if self._fits_adamw and adjust_lr_fn is None and extra.get("adamw_lr") is None:
            extra["adamw_lr"] = lr
        super().__init__(params, *defaults_of(type(self).__name__, options, extra))

    def recipe(self, group: Group) -> Recipe:
        momentum = Momentum(nesterov=group["nesterov"], bias_correction=self._corrects, dtype=group["momentum_dtype"])
        return recipe_of(
            group,
            ratio=self._ratio,
            momentum=momentum,
            precondition=Identity(),
            direction=polar_of(group),
            transforms=(self._transform,),
        )

    def hyper(self, group: Group) -> Hyper:
        return Hyper(*map(number, (group["lr"], group["weight_decay"], group["momentum"], group["beta2"])))


class NorMuon(AdaptiveMuon):
    """Muon whose rows are of one size: each is divided by a running root mean square of its own.

        m <- momentum m + (1 - momentum) g;   o = polar(m);   v_i <- beta2 v_i + (1 - beta2) mean_j(o_ij^2)
        u = o / (sqrt(v) + 1e-8) row by row;   W <- (1 - lr weight_decay) W - lr ratio(rows, cols) ||o|| / ||u|| u

    params, lr, weight_decay, momentum, nesterov: as in `Muon`.      beta2: of the rows' second moment, in [0, 1).
    adjust_lr_fn: as in `Muon`; None is "match_rms_adamw", so that entries have root mean square .2 and AdamW's lr fits:
        its groups take lr too, unless adamw_lr is given.
    polar: a preset of `steepest.polar` or a coefficient table.

    The state is Muon's and a number a row, `update_exp_avg_sq`. The matrix keeps the length of its polar factor, as in
    the authors' code; the paper's .2 sqrt(rows cols) is the same where the factor is exact and of full rank. With rows
    that all have one size already (an orthogonal factor with no more rows than columns) it is Muon. A row is an output
    of its layer; of heads, splits and experts every matrix has its rows, and of transposed=True weights a row is a
    stored column. `steepest.MuAdam` and the methods in eigenbases do the same with after="rows".

    Source: arXiv:2510.05491, Algorithm 1.
    """

    _transform = Normalize("rows")


class AdaMuon(AdaptiveMuon):
    """Muon of the momentum's signs whose entries are divided by a running root mean square of their own.

        m <- momentum m + (1 - momentum) g;   o = polar(sign(m));   v <- beta2 v + (1 - beta2) o o o
        u = o / (sqrt(v) + 1e-8);   W <- (1 - lr weight_decay) W - lr .2 sqrt(rows cols) / ||u|| u

    Arguments as in `NorMuon`; beta2 is of the entries' second moment, for which the paper takes momentum itself, and
    adjust_lr_fn=None is "none", for the root mean square of an update is .2 already. The state is Muon's and an fp32
    number an entry, `update_exp_avg_sq`. The paper sums gradients where they are averaged here: the signs are the same.

    parity="timm": o = polar(m), without the signs: timm's Muon(algo="adamuon", adjust_lr_fn="match_rms_adamw")
        (huggingface/pytorch-image-models, timm/optim/muon.py at commit aa4b585). It ends at lower losses in all runs of
        docs/choose.md.

    Source: arXiv:2507.11005v3, Algorithm 1.
    """

    _transform = Normalize("elements", rms=0.2)
    _ratio = "none"
    _more: ClassVar[dict[str, Any]] = {"parity": None}

    def __init__(
        self,
        params: Params,
        lr: Number = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        beta2: float = 0.95,
        nesterov: bool = False,
        adjust_lr_fn: str | None = None,
        *,
        polar: Polar = "auto",
        parity: str | None = None,
        **extra: Unpack[Extras],
    ) -> None:
        values = {"adjust_lr_fn": adjust_lr_fn, "polar": polar, "parity": parity, **extra}
        super().__init__(params, lr, weight_decay, momentum, beta2, nesterov, **values)  # type: ignore[arg-type]

    def recipe(self, group: Group) -> Recipe:
        if group["parity"] not in (None, "timm"):
            raise ValueError(f"parity {group['parity']!r} is not known; use 'timm' (no signs) or None (the paper's)")
        recipe = super().recipe(group)
        if group["parity"] == "timm":
            return recipe
        return replace(recipe, direction=SpectralOfSign(**vars(polar_of(group))))


class NAMO(AdaptiveMuon):
    """Muon whose step is as long as gradients agree: Adam's ratio of a mean to a root mean square, of whole matrices.

        m <- momentum m + (1 - momentum) g;   v <- beta2 v + (1 - beta2) ||g||_F^2
        a = ||m / (1 - momentum^t)||_F sqrt(1 - beta2^t) / (sqrt(v) + 1e-8)
        W <- (1 - lr weight_decay) W - lr ratio(rows, cols) a polar(m)

    Arguments as in `NorMuon`, without nesterov: Adam's correction of m is not defined for it. adjust_lr_fn=None is
    "none", the paper's. a is 1 at the first step and where gradients repeat, and about
    ((1 - momentum) / (1 + momentum))^1/2 in pure noise. The state is Muon's, a number a matrix and the step.
    The paper multiplies the weight decay by a as well; here it is decoupled, as everywhere.

    Source: arXiv:2602.17080, Algorithm 1.
    """

    _transform = NormRatio()
    _ratio = "none"
    _corrects = True
    _fits_adamw = False

    def __init__(
        self,
        params: Params,
        lr: Number = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        beta2: float = 0.99,
        adjust_lr_fn: str | None = None,
        *,
        polar: Polar = "auto",
        **extra: Unpack[Extras],
    ) -> None:
        values = {"adjust_lr_fn": adjust_lr_fn, "polar": polar, **extra}
        super().__init__(params, lr, weight_decay, momentum, beta2, **values)  # type: ignore[arg-type]

    def hyper(self, group: Group) -> Hyper:
        check_option("momentum", group["momentum"])  # which a schedule may have set since
        return super().hyper(group)
