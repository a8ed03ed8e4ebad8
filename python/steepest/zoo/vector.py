"""Methods for a parameter of any shape: the rows of Table 1 of arXiv:2510.10777 without a matrix in them.

    base norm N, D of ||X|| = N(D o X)           update
    SGD             Frobenius, none              m
    NormalizedSGD   Frobenius, none              m / ||m||_F
    SignSGD, Lion   largest entry, none          sign(m)
    AdaGrad         Frobenius, (sum g^2)^1/4     m / (sqrt(sum g^2) + eps)
    Adam            Frobenius, v^1/4             m / (sqrt(v) + eps)
    MADGRAD         Frobenius, v^1/6             m / (cbrt(v) + eps)
    AdamSANIA       Frobenius, v^1/2             m / (v + eps)

A model given to one of them goes whole by its rule, biases, gains and embeddings too, as with torch's own optimizers.
`steepest.param_groups(model)`, or a group that says use_muon=False, sends what is no matrix to AdamW instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

from ..optimizer import MatrixOptimizer, Params
from ..optimizer.group_options import Group, adam_hyper, number
from ..optimizer.option_types import HEAVY_BALL, OptionType
from ..parts import Diagonal, Direction, Frobenius, Hyper, Identity, Momentum, Number, Sign
from ..recipe import Recipe
from ..routing.places import read_places
from .shared import Extras, defaults_of, recipe_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


class VectorOptimizer(MatrixOptimizer):
    """Base of the methods that take any shape: fewer than two dimensions are one column, (n,) is (n, 1).

    A module, named parameters or tensors are one group of this class's rule, weight decay for all of them; of a module
    or of names those that need no gradient are left out. More than two dimensions are flattened to (shape[0], rest)
    unless the group says otherwise.
    """

    takes_any_shape = True

    def route(self, params: Any) -> list[Group]:
        parameters, named = read_places(params)
        chosen = [places[0] for places in parameters if places[0].param.requires_grad or not named]
        if not chosen:
            raise ValueError("no trainable parameter: all are frozen (requires_grad=False)")
        given = [(place.name, place.param) if named else place.param for place in chosen]
        reasons = [f"{type(self).__name__} takes every shape"] * len(chosen)
        return [{"params": given, "use_muon": True, "param_reasons": reasons}]

    def split_group(self, group: Group) -> list[Group]:
        return [group]


class MomentumOptimizer(VectorOptimizer):
    """Base of those with one average, of a base norm's direction."""

    _direction: Direction
    _scale: Literal["lmo", "dual"] = "lmo"
    _kind: Literal["ema", "heavy_ball"] = "ema"

    def __init__(
        self,
        params: Params,
        lr: Number = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        *,
        nesterov: bool = False,
        adjust_lr_fn: str | None = None,
        **extra: Unpack[Extras],
    ) -> None:
        options = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "adjust_lr_fn": adjust_lr_fn,
        }
        super().__init__(params, *defaults_of(type(self).__name__, options, extra))

    def recipe(self, group: Group) -> Recipe:
        momentum = Momentum(self._kind, group["nesterov"], dtype=group["momentum_dtype"])
        parts: dict[str, Any] = {"momentum": momentum, "precondition": Identity(), "direction": self._direction}
        return recipe_of(group, ratio="none", scale=self._scale, **parts)

    def hyper(self, group: Group) -> Hyper:
        return Hyper(*map(number, (group["lr"], group["weight_decay"], group["momentum"])))


class SGD(MomentumOptimizer):
    """Gradient descent with momentum: regularized steepest descent in the Euclidean norm.

        m <- momentum m + g;   W <- (1 - lr weight_decay) W - lr m

    Equals `torch.optim.SGD` with weight_decay=0, with and without nesterov, within rounding; weight decay is decoupled
    here, added to the gradient there. Arguments as in `NormalizedSGD`, momentum in [0, 1]; momentum=0 is plain gradient
    descent. Source: arXiv:2510.10777 (row SGD of Table 1, whose m averages gradients: there lr is larger by
    1 / (1 - momentum)).
    """

    option_types: ClassVar[dict[str, OptionType]] = {"momentum": HEAVY_BALL}
    _direction = Frobenius()
    _scale = "dual"
    _kind = "heavy_ball"


class NormalizedSGD(MomentumOptimizer):
    """Momentum, of length 1: every step of a parameter is lr long, whatever its gradient.

        m <- momentum m + (1 - momentum) g;   W <- (1 - lr weight_decay) W - lr m / ||m||_F

    params: a module, named parameters or tensors, all by this rule, or groups (`VectorOptimizer`).   lr: a number >= 0
    or a 1-element tensor.   momentum: in [0, 1).   nesterov: as in `steepest.Muon`.   adjust_lr_fn: of the shapes of
    matrices, a name of `steepest.parts.step_size`; None is "none".

    The norm is that of a parameter, of each of its matrices where num_heads, split_sizes or batch_dims say so; m = 0 is
    no step. It is `steepest.Muon` with the Schatten 2-norm for the spectral one. Sources: arXiv:2510.10777 (row
    Normalized SGD of Table 1); with momentum, arXiv:2002.03305.
    """

    _direction = Frobenius()


class SignSGD(MomentumOptimizer):
    """The sign of the momentum (signum): every entry of a step is lr, -lr or 0.

        m <- momentum m + (1 - momentum) g;   W <- (1 - lr weight_decay) W - lr sign(m)

    Arguments as in `NormalizedSGD`; momentum=0 is signSGD. Sources: arXiv:2510.10777 (row SignSGD of Table 1),
    arXiv:1802.04434.
    """

    _direction = Sign()


class Lion(VectorOptimizer):
    """The sign of an average that gives the gradient at hand more weight than the one that is kept.

        u = sign(beta1 m + (1 - beta1) g);   m <- beta2 m + (1 - beta2) g;   W <- (1 - lr weight_decay) W - lr u

    betas: of what is stepped by and of what is kept.   Other arguments as in `NormalizedSGD`. With equal betas it is
    `SignSGD`. Source: arXiv:2302.06675, Algorithm 2.
    """

    def __init__(
        self,
        params: Params,
        lr: Number = 1e-4,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.99),
        *,
        adjust_lr_fn: str | None = None,
        **extra: Unpack[Extras],
    ) -> None:
        options = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "adjust_lr_fn": adjust_lr_fn}
        super().__init__(params, *defaults_of("Lion", options, extra))

    def recipe(self, group: Group) -> Recipe:
        momentum = Momentum(key="exp_avg", dtype=group["momentum_dtype"], interpolated=True)
        return recipe_of(group, ratio="none", momentum=momentum, precondition=Identity(), direction=Sign())

    def hyper(self, group: Group) -> Hyper:
        beta1, beta2 = map(number, group["betas"])
        if not isinstance(beta2, Tensor) and beta2 == 0:
            raise ValueError("betas[1] should be above 0 but is: 0; with SignSGD(momentum=0) nothing is kept")
        return Hyper(number(group["lr"]), number(group["weight_decay"]), beta2, beta1)

    def check_values(self, group: Group) -> None:
        self.hyper(group)
        super().check_values(group)


class AdaGrad(VectorOptimizer):
    """Every entry divided by the length of its gradients so far.

        v <- v + g o g;   m <- momentum m + (1 - momentum) g;   W <- (1 - lr weight_decay) W - lr m / (sqrt(v) + eps)

    Equals `torch.optim.Adagrad` with lr_decay=0, initial_accumulator_value=0 and weight_decay=0; weight decay is
    decoupled here, added to the gradient there. Other arguments as in `NormalizedSGD`. The buffer of the momentum is
    there with momentum=0, the default, too. Source: arXiv:2510.10777 (row AdaGrad of Table 1).
    """

    def __init__(
        self,
        params: Params,
        lr: Number = 1e-2,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        eps: float = 1e-10,
        *,
        adjust_lr_fn: str | None = None,
        **extra: Unpack[Extras],
    ) -> None:
        options: Group = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "eps": eps}
        options["adjust_lr_fn"] = adjust_lr_fn
        super().__init__(params, *defaults_of("AdaGrad", options, extra))

    def recipe(self, group: Group) -> Recipe:
        parts: dict[str, Any] = {
            "momentum": Momentum(dtype=group["momentum_dtype"]),
            "precondition": Diagonal(average="sum", bias_correction=False, eps_inside=False, key="sum"),
            "direction": Frobenius(),
        }
        return recipe_of(group, ratio="none", scale="dual", **parts)

    def hyper(self, group: Group) -> Hyper:
        lr, decay, beta, eps = map(number, (group["lr"], group["weight_decay"], group["momentum"], group["eps"]))
        return Hyper(lr, decay, beta, eps=eps)


class Adam(VectorOptimizer):
    """Adam, and with weight decay AdamW.

        m <- beta1 m + (1 - beta1) g;   v <- beta2 v + (1 - beta2) g o g
        W <- (1 - lr weight_decay) W - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    params: a module, named parameters or tensors, all by this rule, or groups (`VectorOptimizer`).   lr: a number >= 0
    or a 1-element tensor.   betas: decay rates of the two averages.   Others as in `NormalizedSGD`.

    Equals `torch.optim.AdamW` within rounding, state keys included, so that its checkpoints can be loaded. Sources:
    arXiv:2510.10777 (row Adam of Table 1), arXiv:1412.6980, arXiv:1711.05101.
    """

    _power = 0.25

    def __init__(
        self,
        params: Params,
        lr: Number = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        adjust_lr_fn: str | None = None,
        **extra: Unpack[Extras],
    ) -> None:
        options = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps, "adjust_lr_fn": adjust_lr_fn}
        super().__init__(params, *defaults_of(type(self).__name__, options, extra))

    def recipe(self, group: Group) -> Recipe:
        parts: dict[str, Any] = {
            "momentum": Momentum(bias_correction=True, key="exp_avg", dtype=group["momentum_dtype"]),
            "precondition": Diagonal(self._power, eps_inside=False),
            "direction": Frobenius(),
        }
        return recipe_of(group, ratio="none", scale="dual", **parts)

    def hyper(self, group: Group) -> Hyper:
        return adam_hyper(group)


class MADGRAD(Adam):
    """Adam with a cube root: MADGRAD's power of the second moment, as Table 1 of arXiv:2510.10777 has it.

        W <- (1 - lr weight_decay) W - lr (m / (1 - beta1^t)) / (cbrt(v / (1 - beta2^t)) + eps),   m and v as in `Adam`

    This is not the algorithm of arXiv:2101.11075, which is dual averaging: there v and the sum of gradients are sums
    weighted with lr sqrt(t), and every iterate starts anew from the first one. Only the power is the same, and with it
    the behaviour under a loss multiplied by c, which wants lr times c^-1/3. Arguments as in `Adam`.
    """

    _power = 1 / 6

    def __init__(
        self,
        params: Params,
        lr: Number = 1e-2,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        *,
        adjust_lr_fn: str | None = None,
        **extra: Unpack[Extras],
    ) -> None:
        super().__init__(params, lr, weight_decay, betas, eps, adjust_lr_fn=adjust_lr_fn, **extra)


class AdamSANIA(Adam):
    """Adam without the square root: a diagonal Newton-like step whose units are those of the weights.

        W <- (1 - lr weight_decay) W - lr (m / (1 - beta1^t)) / (v / (1 - beta2^t) + eps),   m and v as in `Adam`

    With eps=0 (where 0/0 = 0) the iterates are equivariant under elementwise rescaling of the weights: training
    f(A o W) from A^-1 o W_0 visits A^-1 o W_t. A loss multiplied by c wants lr multiplied by c, and a gradient of 1e-3
    makes a step of 1e3 lr: hence the small default. SANIA's own Polyak step size (arXiv:2312.17369) is not in it. Other
    arguments as in `Adam`.

    Source: arXiv:2510.10777 (row Adam-SANIA of Table 1).
    """

    _power = 0.5

    def __init__(
        self,
        params: Params,
        lr: Number = 1e-5,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        adjust_lr_fn: str | None = None,
        **extra: Unpack[Extras],
    ) -> None:
        super().__init__(params, lr, weight_decay, betas, eps, adjust_lr_fn=adjust_lr_fn, **extra)
