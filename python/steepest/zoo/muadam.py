"""MuAdam and MuAdam-SANIA: Muon in the metric of Adam."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..optimizer import MatrixOptimizer, Params
from ..optimizer.group_options import Group, adam_hyper
from ..parts import Diagonal, Hyper, Momentum, Number
from ..recipe import Recipe
from .shared import Extras, Polar, defaults_of, normalization, polar_of, recipe_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


class MuAdam(MatrixOptimizer):
    """Muon in Adam's metric: steepest descent in the spectral norm of D o X, where D^2 is Adam's denominator.

        m <- beta1 m + (1 - beta1) g;   v <- beta2 v + (1 - beta2) g o g;   D^2 = (sqrt(v) + eps) / sqrt(1 - beta2^t)
        W <- (1 - lr weight_decay) W - lr ratio(rows, cols) polar(m / (1 - beta1^t) / D) / D

    One object for a whole model: matrices by this rule, everything else by AdamW in the same step.

    params: a module, named parameters, an iterable of tensors (routed by shape) or groups; see `steepest.param_groups`.
    lr: a number >= 0 or a 1-element tensor. The update grows as the square root of one over the gradient's scale, so a
        loss multiplied by c wants lr multiplied by sqrt(c).
    betas: decay rates of the two averages.
    eps: added to sqrt(v). It is all that D has where the gradient was always 0, as behind a ReLU that no sample of a
        small batch passes, and polar(m / D) is not 0 there: such a weight moves by up to lr ratio eps^-1/2
        (1 - beta2^t)^1/4, 1.8 in the first step with the default values. The rule has it so. Where batches are that
        small pass eps=1e-6, a tenth of that, or 0, with which such weights stay.
    polar: a preset of `steepest.polar` or a coefficient table.
    after: "rows" or "elements" divides those of the update by a running root mean square of theirs, with decay rate
        betas[1], and keeps the length of the matrix (see `NorMuon`); None does not.
    adjust_lr_fn: as in `Muon`.

    The authors' released code (the class TAIA) sets its step count back at every call, so that t = 1 for ever and D is
    larger by (1 - beta2)^-1/4: its lr is worth (1 - beta2)^(1/4) of ours, .18 for beta2 = .999.

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
        after: str | None = None,
        **extra: Unpack[Extras],
    ) -> None:
        options = {
            "lr": lr,
            "weight_decay": weight_decay,
            "betas": betas,
            "eps": eps,
            "adjust_lr_fn": adjust_lr_fn,
            "polar": polar,
            "after": after,
        }
        super().__init__(params, *defaults_of(type(self).__name__, options, extra))

    def recipe(self, group: Group) -> Recipe:
        momentum = Momentum(bias_correction=True, dtype=group["momentum_dtype"])
        return recipe_of(
            group,
            momentum=momentum,
            precondition=Diagonal(power=self._power),
            direction=polar_of(group),
            transforms=normalization(group),
        )

    def hyper(self, group: Group) -> Hyper:
        return adam_hyper(group)


class MuAdamSANIA(MuAdam):
    """MuAdam without the square root: D^2 = (v + eps) / (1 - beta2^t), so D scales exactly as the gradient does.

        W <- (1 - lr weight_decay) W - lr ratio(rows, cols) polar(m / (1 - beta1^t) / D) / D

    With eps=0 (where 0/0 = 0) the iterates are equivariant under elementwise rescaling of the weights by positive
    numbers: training f(A o W) from A^-1 o W_0 visits A^-1 o W_t. (Signs change the singular values of m / D, and with
    them the update, unless they are those of whole rows and columns.) The update grows as one over the gradient's
    scale: a loss multiplied by c wants lr multiplied by c. Other arguments as in `MuAdam`; eps is divided by
    1 - beta2^t too, so its default of 1e-8, the authors', outweighs gradients below 3e-3 in the first step. The lr of
    their code, in which t = 1 (see `MuAdam`), is worth (1 - beta2)^(1/2) of ours, .032 for beta2 = .999.

    Source: arXiv:2510.10777 (row MuAdam-SANIA of Table 1).
    """

    _power = 0.5

    def __init__(
        self,
        params: Params,
        lr: Number = 1e-4,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adjust_lr_fn: str | None = None,
        *,
        polar: Polar = "auto",
        after: str | None = None,
        **extra: Unpack[Extras],
    ) -> None:
        super().__init__(params, lr, weight_decay, betas, eps, adjust_lr_fn, polar=polar, after=after, **extra)
