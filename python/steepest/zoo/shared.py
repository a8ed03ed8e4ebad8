"""What the named optimizers share: arguments, defaults, and the parts that are the same in all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import torch

from ..chunking import WORKSPACE
from ..linalg.coefficients import schedule
from ..optimizer.group_options import Group, finish, read_switches
from ..optimizer.option_types import POLAR, check_option
from ..parts import Normalize, Number, Spectral
from ..recipe import Recipe
from ..routing import ADAMW_NUMBERS

#: A preset of `steepest.polar`, or its `coefficients`: those of an odd polynomial, or a list of such, one a step.
Polar = str | Sequence[float] | Sequence[Sequence[float]]


class Extras(TypedDict, total=False):
    """Keyword arguments every optimizer here takes; all but adamw_* are group values.

    The first line of each is its line in the help of every class (`zoo.arguments`).

    num_heads: heads of a fused weight, or of each of its splits; a matrix each
        How weights are read as matrices: see `steepest.matrices`.
    split_sizes: rows of the parts of a fused weight, as of q, k and v; a matrix each
    batch_dims: how many leading dimensions count matrices, as of experts
    transposed: the weight is stored in x out
    split_columns: split_sizes and num_heads count columns, as of a projection back from heads
    interleaved: groups of rows that each hold an equal part of every split, as heads of q, k and v
    weight_decay_method: "decoupled"; "independent", of the learning rate; "l2", in the gradient
        See `steepest.parts.decay`.
    cautious_wd: decay only where it agrees with the update
    cautious_update: step only entries that agree with the gradient
        See `steepest.parts.cautious`.
    maximize: ascend
    momentum_dtype: dtype of the momentum; None: the gradient's
    state_bits: 8: momentum and second moments are stored in 8 bits; None: they are not
        In codes with a scale for every 256 elements, of parameters of two dimensions and 4096 elements; see
        `steepest.parts.Blockwise` and docs/low_precision.md.
    stochastic_rounding: bf16 parameters are rounded up or down at random, right on average
    keep_mantissa: the 16 bits that bf16 parameters drop are kept as state, as if they were fp32
    average: of the iterates, for `eval()`: a decay rate, or "schedule_free"; None: none
        A number in (0, 1) is of an exponential moving average; see `steepest.parts.average` and docs/weights.md.
    schedule_free_beta: where between iterate (0) and average (1) gradients are taken
        With average="schedule_free".
    constraint: "frobenius" or "spectral", the norm that every matrix keeps; None: none
        See `steepest.parts.sphere`. It has no weight decay then. Not of AdamW groups.
    variance_reduction: gamma of MARS, .025 in its paper; None: none
        See `steepest.parts.variance_reduction`.
    capturable: lr and weight_decay become tensors on the device, for CUDA graphs
        Schedulers fill them in place. `steepest.graphed` captures a whole step.
    backend: "auto", "cuda", "triton", "cpu" or "torch", of everything elementwise
    max_workspace_bytes: about what a step may borrow at once; None: 1 GiB, on a CPU 32 MiB for every thread
        Inputs of the direction included; one matrix is always worked on, and a launch covers all matrices that fit. On
        a CPU matrices that ranks share have 1 GiB too. A matrix has the same bits whatever it is.
    fuse_update: the last product of a direction moves the weights itself
        Directions that nothing else is asked of: step length lr, plain decay, no preconditioner, weights rounded to
        nearest, in the fused step. Not measured yet, so off; `metrics` has NaN for the norms of updates and parameters
        then.
    share_work: ranks of DistributedDataParallel, or of HSDP's copies, share directions
        Every rank takes those of its share of the matrices, by cost, and sends them to the others; Kronecker factors
        are at their owners alone, and state_dict() is a collective call. With False every rank does all. Sharded
        parameters share the work among the ranks of their shards whatever it is.
    foreach: torch's switch; False: one matrix after another
        Taken, as fused is, for calls that were written for torch.optim. None and True change nothing, for a step takes
        all parameters at once anyway. False is max_workspace_bytes=1, unless that is given.
    fused: torch's switch; False: backend="torch", unless that is given
    adamw_lr: learning rate of AdamW's groups; None: 3e-4, or lr with "match_rms_adamw"
    adamw_betas: decay rates of AdamW's two averages
    adamw_eps: added to AdamW's sqrt(v)
    adamw_weight_decay: decay of AdamW's parameters; a module's gains and biases have none
    """

    num_heads: int | Sequence[int] | None
    split_sizes: Sequence[int] | None
    batch_dims: int | None
    transposed: bool
    split_columns: bool
    interleaved: int
    weight_decay_method: str
    cautious_wd: bool
    cautious_update: bool
    maximize: bool
    momentum_dtype: torch.dtype | None
    state_bits: int | None
    stochastic_rounding: bool
    keep_mantissa: bool
    average: float | str | None
    schedule_free_beta: float
    constraint: str | None
    variance_reduction: float | None
    capturable: bool
    backend: str
    max_workspace_bytes: int | None
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
    split_columns=False,
    interleaved=1,
    weight_decay_method="decoupled",
    cautious_wd=False,
    cautious_update=False,
    maximize=False,
    momentum_dtype=None,
    state_bits=None,
    stochastic_rounding=False,
    keep_mantissa=False,
    average=None,
    schedule_free_beta=0.9,
    constraint=None,
    variance_reduction=None,
    capturable=False,
    backend="auto",
    max_workspace_bytes=None,
    fuse_update=False,
    share_work=False,
    adamw_lr=None,
    adamw_betas=ADAMW_NUMBERS["betas"],
    adamw_eps=ADAMW_NUMBERS["eps"],
    adamw_weight_decay=ADAMW_NUMBERS["weight_decay"],
)


def defaults_of(name: str, options: Group, extra: Extras) -> tuple[Group, Group]:
    """(defaults of matrix groups, defaults of AdamW groups) from a class's own arguments and the shared ones.

    options: a class's own arguments, `lr`, `weight_decay` and `adjust_lr_fn` always among them.
    """
    taken = (*options, *Extras.__annotations__)
    unknown = sorted(set(extra) - set(taken))
    if unknown:
        routing = f": give it to steepest.param_groups, as in {name}(steepest.param_groups(model, {unknown[0]}=...))"
        hint = routing if unknown[0] in ("overrides", "matrix", "adamw") else f"; it takes {', '.join(taken)}"
        raise TypeError(f"{name} got an unexpected argument {unknown[0]!r}{hint}")
    given: Group = dict(extra)
    read_switches(given)
    values: Group = {**options, **EXTRAS, **given}
    adamw = {key.removeprefix("adamw_"): values.pop(key) for key in list(values) if key.startswith("adamw_")}
    if adamw["lr"] is None:
        ratio = check_option("adjust_lr_fn", options["adjust_lr_fn"])
        adamw["lr"] = options["lr"] if ratio == "match_rms_adamw" else ADAMW_NUMBERS["lr"]
    return values, adamw


def recipe_of(group: Group, *, kind: type[Recipe] = Recipe, ratio: str = "original", **parts: Any) -> Recipe:
    """A recipe from a method's parts and the group values all methods share; ratio: what adjust_lr_fn=None means."""
    shared = finish(group)
    transforms = (*parts.pop("transforms", ()), *shared["transforms"])
    return kind(adjust_lr=group["adjust_lr_fn"] or ratio, **{**shared, **parts, "transforms": transforms})


def normalization(group: Group) -> tuple[Normalize, ...]:
    """The transform of the update that the group's `after` names, if it names one."""
    after = group["after"]
    if after not in (None, "rows", "elements"):
        raise ValueError(f"after {after!r} is not known; use 'rows' (as NorMuon), 'elements' (as AdaMuon) or None")
    return () if after is None else (Normalize(after),)


def spectral(
    group: Group,
    preset: str,
    coefficients: Any = None,
    steps: int | None = None,
    eps: float = 1e-7,
    option: str = "polar",
) -> Spectral:
    """The direction; an error now for what `polar` would refuse in the middle of a step, as that of the group's option
    of this name.
    """
    table = None if coefficients is None else tuple(tuple(row) for row in coefficients)
    if preset != "svd":
        try:
            schedule(preset, table, steps)
        except ValueError as error:
            raise ValueError(f"{option}={group[option]!r}: {error}") from error
    return Spectral(preset, table, steps, eps, workspace_of(group))


def workspace_of(group: Group) -> int:
    """What a direction of a group may borrow at once; a step asks for no more matrices than it has room for itself."""
    return WORKSPACE if group["max_workspace_bytes"] is None else int(group["max_workspace_bytes"])


def polar_of(group: Group, eps: float = 1e-7) -> Spectral:
    """The direction for the group's `polar`; eps as in `steepest.polar`."""
    polar = check_option("polar", group["polar"], POLAR)
    if isinstance(polar, str):
        return spectral(group, polar, eps=eps)
    return spectral(group, "jordan", polar if isinstance(polar[0], Sequence) else (polar,), eps=eps)
