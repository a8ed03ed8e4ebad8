"""Methods that work in the eigenbases of Kronecker factors: Shampoo, KL-Shampoo, SOAP, SPlus and what lies between."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, TypedDict

import torch

from ..optimizer import MatrixOptimizer, Params
from ..optimizer.group_options import Group, adam_hyper, decay_of
from ..parts import (
    ClipRMS,
    Decay,
    Diagonal,
    Direction,
    Frobenius,
    Graft,
    Hyper,
    Identity,
    Momentum,
    Number,
    Roots,
    Rotated,
    Sides,
    Sign,
)
from ..parts.precondition.kronecker import Kronecker
from ..recipe import Recipe
from .shared import Extras, Polar, defaults_of, normalization, polar_of, recipe_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

INVERSE_ROOTS = ("basis", "newton")
FIRST_STEPS = ("skip", "move")
NORMS = ("frobenius", "spectral", "sign")
REFRESHES = ("auto", "jr", "qr", "eigh")


class Bases(TypedDict, total=False):
    """Keyword arguments of every method with bases; all are group values.

    The first line of each is its line in the help of every class (`zoo.arguments`).

    shampoo_beta: decay rate of the factors; None: betas[1], 1: sums
    precondition_frequency: steps between two refreshes of the bases
    refresh: "auto", "jr", "qr" or "eigh", how the bases are refreshed
        A method of `steepest.linalg.basis.eigh_refresh`; "auto" is `steepest.linalg.basis.tracked` on a CPU.
    exact_refreshes: how many of the first refreshes are exact eigendecompositions
    refresh_delay: steps until the result of a refresh is used, at most precondition_frequency
        But for the first. On a GPU it is made beside these steps, on a stream of its own. The same on every device and
        on every run.
    factor_dtype: torch.bfloat16 stores factors and bases in 16 bits; None: fp32
        Computed with in fp32.
    max_preconditioner_dim: a longer side has no factor, or is cut into blocks
    block_preconditioner: longer sides are cut into blocks with factors of their own
    norm: base norm in the bases, "frobenius", "spectral" or "sign"; None: the method's
        "frobenius" is scaled by its dual norm, the others are of length 1. With "spectral" every method here becomes
        one of its own: Muon in its metric.
    polar: of norm="spectral", a preset of `steepest.polar` or a coefficient table
    after: "rows" or "elements" of the update are normalized, as in `steepest.MuAdam`
    adjust_lr_fn: how the learning rate depends on a matrix's shape, as in `steepest.Muon`
        None is "original" with norm="spectral" and the method's own otherwise.
    parity: "authors": step for step what the authors' implementation does
        Where the class says so. "emerging-optimizers" of `steepest.SOAP`: what that package's does.
    """

    shampoo_beta: float | None
    precondition_frequency: int
    refresh: str
    exact_refreshes: int
    refresh_delay: int
    factor_dtype: torch.dtype | None
    max_preconditioner_dim: int
    block_preconditioner: bool
    norm: str | None
    polar: Polar
    after: str | None
    adjust_lr_fn: str | None
    parity: str | None


class BasesAndExtras(Bases, Extras, total=False):
    """`Bases` and what every optimizer takes."""


class KroneckerOptimizer(MatrixOptimizer):
    """Base of the methods here: a subclass gives its `Bases` and the parts that differ."""

    _bases = Bases(
        shampoo_beta=None,
        precondition_frequency=10,
        refresh="auto",
        exact_refreshes=1,
        refresh_delay=0,
        factor_dtype=None,
        max_preconditioner_dim=10000,
        block_preconditioner=False,
        norm=None,
        polar="auto",
        after=None,
        adjust_lr_fn=None,
        parity=None,
    )
    _norm = "frobenius"
    _ratio = "none"
    _parities: tuple[str | None, ...] = (None,)

    def __init__(self, params: Params, options: Group, extra: BasesAndExtras) -> None:
        shared = {key: extra[key] for key in extra if key not in self._bases}  # type: ignore[literal-required]
        bases = {key: extra.get(key, value) for key, value in self._bases.items()}
        values, adamw = defaults_of(type(self).__name__, {**options, **bases}, shared)  # type: ignore[arg-type]
        super().__init__(params, values, adamw)

    def parts(self, group: Group) -> dict[str, Any]:
        """The method's momentum, preconditioner and whatever else differs."""
        raise NotImplementedError

    def recipe(self, group: Group) -> Recipe:
        norm, parts = group["norm"] or self._norm, self.parts(group)
        parts["transforms"] = (*parts.get("transforms", ()), *normalization(group))
        ratio = "original" if norm == "spectral" else self._ratio
        scale = "dual" if norm == "frobenius" else "lmo"
        return recipe_of(group, ratio=ratio, direction=self._direction(norm, group), scale=scale, **parts)

    def hyper(self, group: Group) -> Hyper:
        return adam_hyper(group)

    def decay(self, group: Group, *, scaled: bool = False) -> Decay:
        """The weight decay, after the update where the authors have it there."""
        return decay_of(group, after=group["parity"] == "authors", scaled=scaled)

    def _direction(self, norm: str, group: Group) -> Direction:
        if norm == "spectral":
            return polar_of(group)
        return Frobenius() if norm == "frobenius" else Sign()

    def rotated(self, group: Group, inner: Identity | Diagonal | Sides | None = None, **others: Any) -> Rotated:
        """The preconditioner in eigenbases with the group's values, but for what `others` say."""
        values = {"inner": inner or Identity(), "method": group["refresh"], "exact": group["exact_refreshes"]}
        return Rotated(**{**self._of_factors(group), **values, **others})

    def by_roots(self, group: Group, exponent: float, **others: Any) -> Roots:
        """The preconditioner by inverse roots."""
        scale = "refresh" if group["parity"] else "present"
        return Roots(**{**self._of_factors(group), "exponent": exponent, "scale": scale, **others})

    def powers(self, group: Group, sides: Sides, **others: Any) -> Kronecker:
        """The preconditioner in the form that `inverse_root` names."""
        if group["inverse_root"] == "newton":
            return self.by_roots(group, sides.exponent, **others)
        return self.rotated(group, sides, **others)

    def _of_factors(self, group: Group) -> dict[str, Any]:
        return {
            "beta": group["shampoo_beta"],
            "max_dim": group["max_preconditioner_dim"],
            "blocks": group["block_preconditioner"],
            "every": group["precondition_frequency"],
            "delay": group["refresh_delay"],
            "dtype": group["factor_dtype"],
        }

    def check_values(self, group: Group) -> None:
        if group["refresh_delay"] > group["precondition_frequency"]:
            raise ValueError(
                f"refresh_delay should be at most precondition_frequency, {group['precondition_frequency']}, but is: "
                f"{group['refresh_delay']}"
            )
        if group["factor_dtype"] not in (None, torch.bfloat16):
            raise ValueError(f"factor_dtype should be None (fp32) or torch.bfloat16 but is: {group['factor_dtype']}")
        if group["factor_dtype"] is not None and group.get("inverse_root") == "newton":
            raise ValueError(
                "inverse_root='newton' needs the small eigenvalues that rounding a factor to bf16 loses: use "
                "inverse_root='basis' or factor_dtype=None"
            )
        _check_choice("refresh", group["refresh"], REFRESHES)
        _check_choice("norm", group["norm"], (*NORMS, None))
        _check_choice("parity", group["parity"], self._parities)
        _check_choice("inverse_root", group.get("inverse_root", "basis"), INVERSE_ROOTS)
        _check_choice("first_step", group.get("first_step"), (*FIRST_STEPS, None))
        polar_of(group)
        super().check_values(group)


def _check_choice(name: str, value: object, choices: tuple[str | None, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} {value!r} is not known; use {' or '.join(map(repr, choices))}")


class Shampoo(KroneckerOptimizer):
    """Full-matrix AdaGrad, one factor a side, with the length of Adam's step.

        L <- L + g g^T;   R <- R + g^T g;   m <- beta1 m + (1 - beta1) g
        u = L^-1/4 m R^-1/4;   W <- (1 - lr weight_decay) W - lr u ||adam|| / ||u||,   adam = m / (sqrt(v) + eps)

    params: a module, named parameters, an iterable of tensors (routed by shape) or groups; see `steepest.param_groups`.
    lr, weight_decay: numbers >= 0.   betas: of m, and of Adam's v in the graft (of the factors: shampoo_beta).
    eps: added to a factor's eigenvalues, besides 1e-6 of the largest, and to Adam's sqrt(v).
    graft: "adam", or None for the length of u itself.
    inverse_root: "basis", of eigenvalues in eigenbases, or "newton": by a coupled iteration, all products. Then the
        1e-6 are of a bound on the largest eigenvalue, eps is Adam's only, and roots are of the last refresh but for
        their scale; `refresh` and `exact_refreshes` are not used. See `steepest.parts.Roots`.
    Factors are sums (shampoo_beta=1), and sides longer than 1024 have blocks with factors of their own.

    A gradient is in the factors before its own step, and eigenvalues are those of the factors as they are, in the bases
    of the last refresh. parity="authors": the roots are of the last refresh, eigenvalues too. Without accumulation
    (shampoo_beta=0, betas=(0, ...)) u is polar(g), Muon's direction, but for what is added to the eigenvalues. Source:
    arXiv:1802.09568, grafting and blocks arXiv:2309.06497.
    """

    _parities = (None, "authors")

    _bases = Bases(
        **{  # type: ignore[typeddict-item]
            **KroneckerOptimizer._bases,
            "shampoo_beta": 1.0,
            "max_preconditioner_dim": 1024,
            "block_preconditioner": True,
        }
    )
    argument_lines: ClassVar[dict[str, str]] = {
        "graft": '"adam": steps have the length of Adam\'s; None: their own',
    }

    def __init__(
        self,
        params: Params,
        lr: Number = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-12,
        *,
        graft: str | None = "adam",
        inverse_root: str = "basis",
        **extra: Unpack[BasesAndExtras],
    ) -> None:
        options = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps, "graft": graft}
        super().__init__(params, {**options, "inverse_root": inverse_root}, extra)

    def parts(self, group: Group) -> dict[str, Any]:
        _check_choice("graft", group["graft"], ("adam", None))
        transforms = (Graft(),) if group["graft"] else ()
        sides = Sides(exponent=0.25, values="refresh" if group["parity"] else "present")
        precondition = self.powers(group, sides, update_first=True)
        momentum = Momentum(bias_correction=True, dtype=group["momentum_dtype"])
        return {"momentum": momentum, "precondition": precondition, "transforms": transforms}


class OneSidedShampoo(KroneckerOptimizer):
    """Shampoo with one factor, that of the shorter side, at the power that one alone takes (ASGO).

        m <- beta1 m + (1 - beta1) g;   L <- beta2 L + (1 - beta2) g g^T
        W <- (1 - lr weight_decay) W - lr (L^1/2 + eps)^-1 m        (from the right, where there are fewer columns)

    m and L have Adam's bias corrections, so that the first update is polar(g), as is every one without accumulation
    (betas=(0, 0)). A gradient is in L before its own step, and eigenvalues are those of L as it is, in the basis of the
    last refresh; parity="authors": the root is of the last refresh, and a gradient that L had not seen by then can be
    divided by eps. inverse_root="newton": as in `Shampoo`. Other arguments as in `SOAP`; eps is added to the square
    root. Sources: arXiv:2503.20762, arXiv:2503.10537, which do not correct the averages.
    """

    _parities = (None, "authors")

    def __init__(
        self,
        params: Params,
        lr: Number = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        *,
        inverse_root: str = "basis",
        **extra: Unpack[BasesAndExtras],
    ) -> None:
        options = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps, "inverse_root": inverse_root}
        super().__init__(params, options, extra)

    def parts(self, group: Group) -> dict[str, Any]:
        sides = Sides(exponent=0.5, values="refresh" if group["parity"] else "present", damping="outside")
        precondition = self.powers(group, sides, side="smaller", update_first=True)
        momentum = Momentum(bias_correction=True, dtype=group["momentum_dtype"])
        return {"momentum": momentum, "precondition": precondition}


def _first_and_refresh(group: Group) -> Group:
    """What SOAP and KL-Shampoo have in common: their first step, and what parity="authors" means for a refresh."""
    first = "identity" if group["first_step"] == "move" else "skip"
    if group["parity"]:
        return {"first": first, "method": "qr", "transport": "slots"}
    return {"first": first, "method": group["refresh"], "transport": "hadamard"}


#: Values of the authors of KL-Shampoo: averages in the current basis that begin at 0.1.
_COUPLED = Sides(exponent=0.5, values="average", initial=0.1, damping="outside", limited=True)


class KLShampoo(KroneckerOptimizer):
    """Shampoo whose factors minimise a KL divergence: each is measured in the metric of the other.

        L <- beta2 L + (1 - beta2) g R^-1 g^T / n;   R <- beta2 R + (1 - beta2) g^T L^-1 g / m
        W <- (1 - lr weight_decay) W - lr L^-1/2 m R^-1/2

    The eigenvalues are averages that every step adds to in the bases of the last refresh, from .1 on, and not below
    1/max(10, min(n, 4000))^2. The first gradient meets R = I and L = I. Arguments as in `SOAP`. A refresh mixes the
    eigenvalues by the squares of its rotation. parity="authors": orthogonal iteration for every refresh, eigenvalues
    stay with their columns, and weight decay after the update (the authors' iteration does not sort its columns, ours
    does). Source: arXiv:2509.03378.

    inverse_root="newton" (see `Shampoo`) is the formula above, with L^-1/2 and R^-1/2 of the factors themselves at the
    last refresh; both begin as rms(g) I with the first gradient. There are no averages of eigenvalues and no eps, and
    the scale of the gradients changes nothing.

    first_step: as in `SOAP`; None is "skip" with bases, and with inverse_root="newton" "move", in the metric that the
        first gradient has made.
    max_update_rms: bound on the root mean square of an update before lr, which is ((1 - beta1) / (1 + beta1))^1/2 for
        noise and at most about 1; None, the authors': no bound. A gradient is stepped before the factors know it, so
        that one s times too large makes a step about s (1 - beta1^2)^1/2 times the usual one; with 1 at most 5 times.
    """

    _parities = (None, "authors")
    argument_lines: ClassVar[dict[str, str]] = {
        "max_update_rms": "bound on the root mean square of an update; None: no bound",
    }

    def __init__(
        self,
        params: Params,
        lr: Number = 1e-4,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        *,
        inverse_root: str = "basis",
        first_step: str | None = None,
        max_update_rms: float | None = None,
        **extra: Unpack[BasesAndExtras],
    ) -> None:
        options = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps, "inverse_root": inverse_root}
        super().__init__(params, {**options, "first_step": first_step, "max_update_rms": max_update_rms}, extra)

    def parts(self, group: Group) -> dict[str, Any]:
        if group["inverse_root"] == "newton":
            first = "skip" if group["first_step"] == "skip" else "learn"
            precondition: Kronecker = self.by_roots(group, 0.5, coupling=True, first=first)
        else:
            precondition = self.rotated(group, _COUPLED, coupling=_COUPLED, **_first_and_refresh(group))
        momentum, most = Momentum(dtype=group["momentum_dtype"]), group["max_update_rms"]
        parts = {"momentum": momentum, "precondition": precondition, "decay": self.decay(group)}
        return parts if most is None else {**parts, "transforms": (ClipRMS(most),)}


class SOAP(KroneckerOptimizer):
    """Adam in the eigenbases of Shampoo's factors.

        L <- beta2 L + (1 - beta2) g g^T;   R <- beta2 R + (1 - beta2) g^T g;   Q_L, Q_R their eigenbases
        m <- beta1 m + (1 - beta1) g;   v <- beta2 v + (1 - beta2) (Q_L^T g Q_R)^2
        W <- (1 - lr weight_decay) W - lr Q_L (Q_L^T m Q_R / (sqrt(v) + eps)) Q_R^T        with Adam's bias corrections

    params: a module, named parameters, an iterable of tensors (routed by shape) or groups; see `steepest.param_groups`.
    lr, weight_decay: numbers >= 0.   betas: of m, and of v and the factors (see shampoo_beta).   eps: added to sqrt(v).

    first_step: "skip", the authors': the first gradient only makes the bases; in them it is diagonal, and Adam would
        divide the rounding errors beside it by themselves. "move": the first step is Adam's, in identity bases.

    At a refresh v is mixed by the squares of the rotation, v <- (R_L o R_L)^T v (R_R o R_R), as if the gradient's
    entries were independent: what a large rotation finds in its slots would else be of other directions, and a step
    tens of times too long. parity="authors": the bases are refreshed by orthogonal iteration with v permuted as its
    columns are sorted, and weight decay follows the update. The trajectory is then that of the authors' implementation
    if the first gradient has full rank; else a factor begins with a null space, every basis of which is as good, and
    which one it is depends on the eigensolver. eps is divided by sqrt(1 - beta2^t), as they have it. With identity
    bases it is Adam, with norm="spectral" MuAdam in these bases. m is in fp32 also where gradients are in 16 bits: what
    these round off lies in directions as well that no gradient has, where v is next to 0. With momentum_dtype of 16
    bits, or state_bits=8, gradients should not stay in a few directions. Source: arXiv:2409.11321.

    parity="emerging-optimizers": a gradient is in the factors before its own step and the bases are refreshed in every
    step, so precondition_frequency is to be 1: by the exact solver for the first and with refresh="eigh" (use_eigh),
    else by orthogonal iteration of which the columns are sorted afterwards. v stays in its places, eps is added to the
    corrected sqrt(v), and every gradient makes a step, the first in its own bases: what it has beside their diagonal is
    rounding, divided by itself and eps. Decay comes before the update. Source: NVIDIA-NeMo/Emerging-Optimizers,
    legacy_soap/soap.py at commit fd77292 (registered there as "soap"), with correct_bias and power_iter_steps=1.
    """

    _parities: tuple[str | None, ...] = (None, "authors", "emerging-optimizers")

    def __init__(
        self,
        params: Params,
        lr: Number = 3e-3,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        *,
        first_step: str = "skip",
        **extra: Unpack[BasesAndExtras],
    ) -> None:
        options = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps, "first_step": first_step}
        super().__init__(params, options, extra)

    def parts(self, group: Group) -> dict[str, Any]:
        parts = self._adam_in_bases(group)
        if group["parity"] == "emerging-optimizers":
            method = "eigh" if group["refresh"] == "eigh" else "qr_sorted"
            order = {"first": "learn", "update_first": True, "method": method, "transport": "fixed"}
            parts["precondition"] = self.rotated(group, Diagonal(power=0.25, eps_inside=False), **order)
        return parts

    def check_values(self, group: Group) -> None:
        super().check_values(group)
        if group["parity"] == "emerging-optimizers" and group["precondition_frequency"] != 1:
            raise ValueError(
                "parity='emerging-optimizers' refreshes the bases in every step but precondition_frequency is: "
                f"{group['precondition_frequency']}; pass precondition_frequency=1"
            )
        narrow = {"momentum_dtype": group["momentum_dtype"] in (torch.bfloat16, torch.float16)}
        narrow["state_bits"] = group["state_bits"] is not None
        name = next((name for name, is_narrow in narrow.items() if is_narrow), None)
        if group["parity"] == "emerging-optimizers" and name is not None:
            raise ValueError(
                f"parity='emerging-optimizers' divides what {name}={group[name]} would round off the momentum by next "
                "to nothing, and steps thousands of times too far: keep the momentum in fp32 or more"
            )

    def _adam_in_bases(self, group: Group, coupling: Sides | None = None, *, corrected: bool = True) -> dict[str, Any]:
        """corrected: by Adam's bias corrections."""
        inner = Diagonal(power=0.25, bias_correction=corrected)
        precondition = self.rotated(group, inner, coupling=coupling, **_first_and_refresh(group))
        # What 16 bits round off lies in directions that v has next to nothing of, and would be divided by that.
        momentum = Momentum(bias_correction=corrected, dtype=group["momentum_dtype"], wide=True)
        return {"momentum": momentum, "precondition": precondition, "decay": self.decay(group)}


class KLSOAP(SOAP):
    """Adam in the eigenbases of KL-Shampoo's factors; see `SOAP` and `KLShampoo`.

    parity="authors": as in `SOAP`, and without Adam's bias corrections, so that entries of the first update are
    (1 - beta1) / sqrt(1 - beta2), .71 with the default betas, where Adam's are 1. Source: arXiv:2509.03378.
    """

    _parities = (None, "authors")

    def __init__(
        self,
        params: Params,
        lr: Number = 1e-4,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        *,
        first_step: str = "skip",
        **extra: Unpack[BasesAndExtras],
    ) -> None:
        super().__init__(params, lr, weight_decay, betas, eps, first_step=first_step, **extra)

    def parts(self, group: Group) -> dict[str, Any]:
        return self._adam_in_bases(group, _COUPLED, corrected=group["parity"] is None)


class SPlus(KroneckerOptimizer):
    """The sign of the momentum in Shampoo's eigenbases, and an average of the iterates to evaluate.

        m <- beta1 m + (1 - beta1) g;   L <- beta2 L + (1 - beta2) g g^T;   R <- beta2 R + (1 - beta2) g^T g
        W <- (1 - lr' weight_decay) W - lr 2 / (m + n) Q_L sign(Q_L^T m Q_R) Q_R^T
        average <- rate average + (1 - rate) W,   divided by 1 - rate^t in `eval`

    The bases are those of the last refresh, at step 1 the identity; lr' = 2 lr / (m + n). `eval()` puts the average, of
    every parameter, in place of the weights, `train()` the weights back; a step in between is refused.

    lr: .1 is the authors'.   average_rate: what `average` is elsewhere; 0: no average is kept.   Others as in `SOAP`.
    parity="authors": weight decay follows the update (their average takes the weights between the two, ours after both:
    it is smaller by a factor 1 - lr' weight_decay). With identity bases it is signum. Source: arXiv:2506.07254.
    """

    _bases = Bases(
        **{  # type: ignore[typeddict-item]
            **KroneckerOptimizer._bases,
            "precondition_frequency": 100,
            "refresh": "eigh",
        }
    )
    _norm = "sign"
    _ratio = "splus"
    _parities = (None, "authors")
    argument_lines: ClassVar[dict[str, str]] = {
        "average_rate": "decay rate of the average of iterates; 0: no average",
    }

    def __init__(
        self,
        params: Params,
        lr: Number = 0.1,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-30,
        *,
        average_rate: float = 0.999,
        **extra: Unpack[BasesAndExtras],
    ) -> None:
        options = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps, "average_rate": average_rate}
        super().__init__(params, options, extra)

    def parts(self, group: Group) -> dict[str, Any]:
        return {
            "momentum": Momentum(dtype=group["momentum_dtype"]),
            "precondition": self.rotated(group, first="identity"),
            "decay": self.decay(group, scaled=True),
        }

    def check_values(self, group: Group) -> None:
        if group["average"] is not None and group["average_rate"]:
            raise ValueError(
                f"average={group['average']!r} and average_rate={group['average_rate']} are two answers to one "
                "question: choose one of them, average_rate=0 or average=None"
            )
        super().check_values(group)
