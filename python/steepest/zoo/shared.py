"""What the named optimizers share: arguments, defaults, and the parts that are the same in all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import torch

from ..linalg.coefficients import schedule
from ..optimizer.group_options import Group, constraint_of, finish, read_switches
from ..optimizer.option_types import POLAR, check_option
from ..parts import Normalize, Number, Spectral
from ..recipe import Recipe
from ..routing import ADAMW_NUMBERS

#: A preset of `steepest.polar`, or its `coefficients`: those of an odd polynomial, or a list of such, one a step.
Polar = str | Sequence[float] | Sequence[Sequence[float]]


class Extras(TypedDict, total=False):
    """Keyword arguments every optimizer here takes; all but adamw_* are group values.

    num_heads, split_sizes, batch_dims, transposed: how fused or stacked weights, and those that are stored in x out,
        are read as matrices; see `steepest.matrices`.
    weight_decay_method: "decoupled"; "independent", of the learning rate; or "l2", in the gradient; see
        `steepest.parts.decay`. l2 goes by torch operations.
    cautious_wd: decay only where it agrees with the update.      maximize: ascend.
    cautious_update: step only entries that agree with the gradient; see `steepest.parts.cautious`.
    momentum_dtype: dtype of the momentum (None: the gradient's). stochastic_rounding: of bf16 parameters.
    keep_mantissa: of bf16 parameters, the 16 bits that bf16 drops are kept as state, as if they were fp32.
    average: of the iterates, for `eval()`: a number in (0, 1), the decay rate of an exponential moving average, or
        "schedule_free"; see `steepest.parts.average` and docs/weights.md. None: none is kept.
    schedule_free_beta: where between the iterate (0) and its average (1) gradients are taken with "schedule_free".
    constraint: of matrices, "frobenius" or "spectral": every one keeps this norm; see `steepest.parts.sphere`. It has
        no weight decay then. Not of AdamW groups.   None: no constraint.
    variance_reduction: gamma of MARS, .025 in its paper; see `steepest.parts.variance_reduction`. None: none.
    capturable: lr and weight_decay become tensors on the device, so that a step can be captured in a CUDA graph;
        schedulers fill them in place. `steepest.graphed` captures a whole step.
    backend: "auto", "cuda", "triton", "cpu" or "torch", of everything elementwise.
    max_workspace_bytes: about what a step may borrow at once, inputs of the direction included; one matrix is always
        worked on, and a launch covers all matrices that fit.
    fuse_update: directions that nothing else is asked of (step length lr, plain decay, no preconditioner, weights
        rounded to nearest) go from the last product straight into the weights, in the fused step. Not measured yet, so
        off; `metrics` has NaN for the norms of updates and parameters then.
    share_work: under DistributedDataParallel every rank takes the directions of its share of the matrices, by cost, and
        sends them to the others; Kronecker factors are at their owners alone, and state_dict() is a collective call.
        With False every rank does all. Sharded parameters share the work among the ranks of their shards whatever it
        is; with HSDP, True is among those of all copies.
    foreach, fused: torch's switches, for calls that were written for torch.optim. None and True change nothing, for a
        step takes all parameters at once anyway; foreach=False is max_workspace_bytes=1, one matrix after another, and
        fused=False backend="torch", unless these are given.
    adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay: the AdamW groups; adamw_lr=None is 3e-4, or lr itself with
        adjust_lr_fn="match_rms_adamw".
    """

    num_heads: int | Sequence[int] | None
    split_sizes: Sequence[int] | None
    batch_dims: int | None
    transposed: bool
    weight_decay_method: str
    cautious_wd: bool
    cautious_update: bool
    maximize: bool
    momentum_dtype: torch.dtype | None
    stochastic_rounding: bool
    keep_mantissa: bool
    average: float | str | None
    schedule_free_beta: float
    constraint: str | None
    variance_reduction: float | None
    capturable: bool
    backend: str
    max_workspace_bytes: int
    fuse_update: bool
    share_work: bool
    foreach: bool | None
    fused: bool | None
    adamw_lr: Number | None
    adamw_betas: tuple[float, float]
    adamw_eps: float
    adamw_weight_decay: float


#: Their defaults, less those of torch's switches.
EXTRAS = Extras(
    num_heads=None,
    split_sizes=None,
    batch_dims=None,
    transposed=False,
    weight_decay_method="decoupled",
    cautious_wd=False,
    cautious_update=False,
    maximize=False,
    momentum_dtype=None,
    stochastic_rounding=False,
    keep_mantissa=False,
    average=None,
    schedule_free_beta=0.9,
    constraint=None,
    variance_reduction=None,
    capturable=False,
    backend="auto",
    max_workspace_bytes=1 << 30,
    fuse_update=False,
    share_work=False,
    adamw_lr=None,
    adamw_betas=ADAMW_NUMBERS["betas"],
    adamw_eps=ADAMW_NUMBERS["eps"],
    adamw_weight_decay=ADAMW_NUMBERS["weight_decay"],
)


def defaults_of(name: str, options: Group, extra: Extras) -> tuple[Group, Group]:
    """(defaults of matrix groups, defaults of AdamW groups) from a class's own arguments and the shared ones."""
    taken = (*options, *Extras.__annotations__)
    unknown = sorted(set(extra) - set(taken))
    if unknown:
        raise TypeError(f"{name} got an unexpected argument {unknown[0]!r}; it takes {', '.join(taken)}")
    given: Group = dict(extra)
    read_switches(given)
    values: Group = {**options, **EXTRAS, **given}
    adamw = {key.removeprefix("adamw_"): values.pop(key) for key in list(values) if key.startswith("adamw_")}
    if adamw["lr"] is None:
        adamw["lr"] = options["lr"] if options["adjust_lr_fn"] == "match_rms_adamw" else ADAMW_NUMBERS["lr"]
    return values, adamw


def recipe_of(group: Group, *, kind: type[Recipe] = Recipe, ratio: str = "original", **parts: Any) -> Recipe:
    """A recipe from a method's parts and the group values all methods share; ratio: what adjust_lr_fn=None means."""
    shared = finish(group)
    transforms = (*parts.pop("transforms", ()), *shared["transforms"])
    shared |= {**parts, "transforms": transforms, "constraint": constraint_of(group)}
    return kind(adjust_lr=group["adjust_lr_fn"] or ratio, **shared)


def normalization(group: Group) -> tuple[Normalize, ...]:
    """The transform of the update that the group's `after` names, if it names one."""
    after = group["after"]
    if after not in (None, "rows", "elements"):
        raise ValueError(f"after {after!r} is not known; use 'rows' (as NorMuon), 'elements' (as AdaMuon) or None")
    return () if after is None else (Normalize(after),)


def spectral(
    group: Group, preset: str, coefficients: Any = None, steps: int | None = None, eps: float = 1e-7
) -> Spectral:
    """The direction; an error now for what `polar` would refuse in the middle of a step."""
    table = None if coefficients is None else tuple(tuple(row) for row in coefficients)
    if preset != "svd":
        schedule(preset, table, steps)
    return Spectral(preset, table, steps, eps, group["max_workspace_bytes"])


def polar_of(group: Group, eps: float = 1e-7) -> Spectral:
    """The direction for the group's `polar`; eps as in `steepest.polar`."""
    polar = check_option("polar", group["polar"], POLAR)
    if isinstance(polar, str):
        return spectral(group, polar, eps=eps)
    return spectral(group, "jordan", polar if isinstance(polar[0], Sequence) else (polar,), eps=eps)
