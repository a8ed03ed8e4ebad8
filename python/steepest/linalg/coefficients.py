"""Coefficient tables of the Newton-Schulz polynomials, each with its source.

A step is an odd polynomial p(x) = a x + b x^3 + c x^5 (+ d x^7 (+ e x^9)), given as the tuple (a, b, c, ...) and
applied to the singular values: X <- (a I + b A + c A^2 + ...) X with A = X X^T.  A table is a tuple of steps; its
*gain* is the product of the a's, by which a vanishing singular value of the normalised matrix is lifted.

A schedule says how the matrix is normalised and which table it gets.  With the norm ``"frobenius"`` X is divided by
||X||_F.  With ``"tight"`` it is divided by an upper bound of ||X||_2 taken from the first Gram product
(`steepest.ops.chain_numbers`), and the *slack* ||X||_F / bound says how much larger the singular values are than after
the Frobenius norm.  A schedule of several tables gives a matrix the first whose slack it reaches; the last takes any.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch

Step = tuple[float, ...]
Table = tuple[Step, ...]
Coefficients = Sequence[float] | Sequence[Sequence[float]]

# The five equal steps of the original Muon, also torch.optim.Muon's default (K. Jordan, "Muon", 2024).
JORDAN_STEP: Step = (3.4445, -4.7750, 2.0315)
JORDAN: Table = (JORDAN_STEP,) * 5
JORDAN_GAIN = JORDAN_STEP[0] ** 5

# Five unequal steps by Jiacheng You (2025), used in the speed runs of the nanoGPT record.
YOU: Table = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)

# Polar Express, arXiv:2505.16932, section 3 and its listing: optimal composition for l = 1e-3, before the safety
# factor.
POLAR_EXPRESS: Table = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
SAFETY = 1.01

# The tables below are `tight_table(l, degrees, margin=...)` of tests/support/remez.py: each step is the best odd
# approximation of 1 on the interval which the steps before it leave, starting from [l, 1], with x / 1.02 in place of x
# in every step but the last so that rounding may carry a singular value 2% beyond the interval.  In the auto and turbo
# tables the last step is good beyond its interval as well, by 6% and 3% (margin): without it two bf16 steps in the
# Gram form sent a singular value to 2.3.  Rounded to 7 digits; the tests compute them again.
TIGHT_8E3: Table = (
    (8.014032, -22.5589, 16.03143),
    (3.678941, -2.647, 0.4959718),
    (2.808322, -2.026348, 0.4309354),
    (2.040409, -1.436629, 0.4030848),
)
TIGHT_4E3: Table = (
    (8.177432, -23.17865, 16.50516),
    (3.906225, -2.800494, 0.5122829),
    (3.2921, -2.378749, 0.4676301),
    (2.354639, -1.729445, 0.4317746),
)
AUTO_8E3: Table = (*TIGHT_8E3[:3], (2.597543, -3.60609, 3.105592, -1.314451, 0.2133857))
AUTO_4E3: Table = (*TIGHT_4E3[:3], (3.013907, -4.819401, 4.121846, -1.580762, 0.2195446))
AUTO_17E4: Table = (
    (8.274319, -23.54631, 16.78626),
    (4.054534, -2.899285, 0.5228059),
    (3.72787, -2.680273, 0.499503),
    (3.981749, -7.546701, 6.179864, -2.082341, 0.2436997),
)
TURBO_15E3: Table = (
    (7.742799, -21.5311, 15.24611),
    (3.356182, -2.423886, 0.4723804),
    (3.147663, -5.356772, 4.785796, -1.899686, 0.2717357),
)
TURBO_8E3: Table = (*TIGHT_8E3[:2], (3.87512, -7.537368, 6.55156, -2.369701, 0.2991775))


# Tables that another package has a name for, under that name, with the Frobenius norm: NVIDIA's Emerging-Optimizers
# (muon_utils.py, commit fd77292), and below them timm and dion. Those of this file that they have too go by both names.
OTHERS: dict[str, Table] = {
    "simple": JORDAN,
    "quintic": YOU,
    # CANS, arXiv:2506.10935: Remez steps with an interval that adapts; divided by `SAFETY` below.
    "cans": (
        (8.4703, -25.1081, 18.6293),
        (4.1828, -3.1087, 0.5806),
        (3.9619, -2.9541, 0.5630),
        (3.2866, -2.4647, 0.5074),
        (2.2737, -1.6447, 0.4162),
    ),
    # DeepSeek-V4's report: eight steps of Jordan's, two of Newton and Schulz.
    "deepseekv4": (JORDAN_STEP,) * 8 + ((2.0, -1.5, 0.5),) * 2,
    # arXiv:2606.00371: cubic steps, a product less each, for a band from 7e-3 on.
    "cubic5": (
        (3.3656576, -3.3420992),
        (2.5744352, -1.4957376),
        (2.5368962, -1.4312570),
        (2.4418906, -1.2764040),
        (2.2230472, -0.9630650),
    ),
    # timm (timm/optim/muon.py, commit aa4b585) and modded-nanogpt: Polar Express with 2 % of room in every step.
    "polar_express_safer": (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.0429299351667245, -2.808917465908704, 0.5000178451051299),
        (3.8916678022926563, -2.7724841532176825, 0.5060648178503389),
        (3.285753657755658, -2.3681294933425394, 0.46449024233003117),
        (2.3005307116270983, -1.6111665557258408, 0.3833374427545273),
    ),
    # dion (dion/polar_express.py, commit 0a059a4): the same but for its last step, made for five steps; of x / 1.02.
    "dion": (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
}


def gain(table: Table) -> float:
    """The factor by which the table lifts a vanishing singular value of the normalised matrix."""
    return math.prod(step[0] for step in table)


def evaluate(table: Table, x: float) -> float:
    """The value to which the table sends the singular value ``x`` of the normalised matrix, in double precision."""
    for step in table:
        x = sum(coefficient * x ** (2 * power + 1) for power, coefficient in enumerate(step))
    return x


@dataclass(frozen=True)
class Schedule:
    """What happens to X.

    ``tables``, and the slack from which each but the last is used (falling); the ``norm`` that X is divided by first;
    and the steps before which the Gram form takes a new Gram product in bf16, None where bf16 does not bear that form.
    """

    tables: tuple[Table, ...]
    slacks: tuple[float, ...] = ()
    norm: Literal["frobenius", "tight"] = "frobenius"
    bf16_restarts: tuple[int, ...] | None = None

    @property
    def steps(self) -> int:
        return len(self.tables[0])


def _reach_jordan(table: Table) -> float:
    """The slack from which the table lifts small singular values as much as five Jordan steps after ||X||_F."""
    return JORDAN_GAIN / gain(table)


# bf16 in the Gram form bears two quintic steps and no more: with three, or with one of degree 9, the off-diagonal error
# reaches .2-.5 and singular values 9 (64 to 300 columns, five spectra).  Two steps of polar_express or tight_4e-3 reach
# singular values of 2.5, and two of jordan cost an off-diagonal .018 for .011 on Gaussian matrices, which is not
# "exact".
SCHEDULES: dict[str, Schedule] = {
    "jordan": Schedule((JORDAN,)),
    "exact": Schedule((JORDAN,)),
    "you": Schedule((YOU,), bf16_restarts=(2, 4)),
    "tight_8e-3": Schedule((TIGHT_8E3,), norm="tight", bf16_restarts=(2,)),
    "tight_4e-3": Schedule((TIGHT_4E3,), norm="tight"),
    "auto": Schedule(
        (AUTO_8E3, AUTO_4E3, AUTO_17E4),
        slacks=(_reach_jordan(AUTO_8E3), _reach_jordan(AUTO_4E3)),
        norm="tight",
        bf16_restarts=(2, 3),
    ),
    "turbo": Schedule((TURBO_15E3, TURBO_8E3), slacks=(_reach_jordan(TURBO_15E3),), norm="tight", bf16_restarts=(2,)),
}


def _safe_step(step: Step, divisor: float) -> Step:
    """The step for x / divisor."""
    return tuple(v / divisor ** (2 * power + 1) for power, v in enumerate(step))


# As published it sends 1 + 1e-3, to which rounding in 16 bits may carry a singular value, to 1e20.
OTHERS["dion"] = (_safe_step(OTHERS["dion"][0], 1.02), *OTHERS["dion"][1:])  # its norm has the room too
OTHERS["cans"] = (*(_safe_step(step, SAFETY) for step in OTHERS["cans"][:-1]), OTHERS["cans"][-1])


def polar_express(steps: int = 5, safety: float = SAFETY) -> Table:
    """Polar Express for any number of steps: the published ones, then the last repeated.

    ``safety`` divides x in all but the published last step, and the norm besides, as the paper does for low precision
    (arXiv:2505.16932): in the first step twice.
    """
    steady = POLAR_EXPRESS[-1]

    first, *others = POLAR_EXPRESS[:-1]
    safe = [_safe_step(first, safety**2), *(_safe_step(step, safety) for step in others)]
    return tuple((safe + [steady] * steps)[:steps])


def schedule(preset: str, coefficients: Coefficients | None, steps: int | None) -> Schedule:
    """The schedule for a preset, or for the caller's own coefficients (Frobenius norm), with ``steps`` steps.

    ``steps`` repeats a table of equal steps ("jordan", "exact", "simple", one tuple of coefficients) or sets the length
    of "polar_express".  Elsewhere it must be the table's own length, because a tight table is optimal only as a whole.
    """
    if steps is not None and not 0 < steps < 100:
        raise ValueError(f"Number of steps must be less than 100 and at least 1, got {steps}")
    if coefficients is not None:
        return Schedule((_table_of(coefficients, steps),))
    if preset == "polar_express":
        return Schedule((polar_express(5 if steps is None else steps),))
    check_preset(preset)
    known = SCHEDULES.get(preset) or Schedule((OTHERS[preset],))
    if steps is None or steps == known.steps:
        return known
    if preset in ("jordan", "exact", "simple"):
        return Schedule(((JORDAN_STEP,) * steps,))
    raise ValueError(
        f"preset {preset!r} has {known.steps} steps, got steps={steps}; leave steps out or pass coefficients"
    )


def presets() -> tuple[str, ...]:
    """Every name that `polar` accepts."""
    return (*SCHEDULES, "polar_express", *OTHERS, "svd")


def check_preset(preset: str) -> None:
    """ValueError for a name that `polar` does not accept."""
    if preset == "aol":
        raise ValueError(
            "preset 'aol' sends singular values above .884 of the norm to -1, and a matrix of rank 1 to minus its "
            "polar factor; use another preset, or pass its numbers as coefficients"
        )
    if preset not in presets():
        raise ValueError(f"preset {preset!r} is not known; choose one of {', '.join(presets())}")


# Singular values that own coefficients are tried with, and what none of them may become.
_STARTS, _LARGEST = 64, 100.0


def _table_of(coefficients: Coefficients, steps: int | None) -> Table:
    rows: list[Any] = list(coefficients)
    if rows and not isinstance(rows[0], Sequence):
        rows = [rows]
    table = tuple(_without_zeros_at_the_end(tuple(float(v) for v in row)) for row in rows)
    if not table or any(not 2 <= len(step) <= 5 for step in table):
        raise ValueError(f"coefficients must be one tuple or a list of tuples of 2 to 5 numbers, got {coefficients!r}")
    if any(step[0] == 0 or not any(step[1:]) for step in table):
        raise ValueError(f"coefficients of a step must not begin with 0 or hold one term alone, got {coefficients!r}")
    if not all(math.isfinite(v) for step in table for v in step):
        raise ValueError(f"coefficients must be finite, got {coefficients!r}")
    if len(table) == 1:
        table *= 5 if steps is None else steps
    elif steps is not None and steps != len(table):
        raise ValueError(f"coefficients hold {len(table)} steps, got steps={steps}; leave steps out or pass one tuple")
    if not torch.compiler.is_compiling():  # of what is traced the constructor has asked
        _check_bounded(table)
    return table


@cache
def _check_bounded(table: Table) -> None:
    """ValueError for a table that takes singular values, which begin between 0 and 1, to where no dtype holds them."""
    for i in range(1, _STARTS + 1):
        s = i / _STARTS
        for step in table:
            s = sum(c * s ** (2 * k + 1) for k, c in enumerate(step))
            if abs(s) > _LARGEST:
                raise ValueError(
                    f"coefficients take a singular value of {i / _STARTS:.3g} times the norm to {s:.3g}, and the "
                    f"result is not finite, got {table[0]!r}: choose some that keep numbers from 0 to 1 near 1, as "
                    "(2, -1.5, 0.5)"
                )


def _without_zeros_at_the_end(step: Step) -> Step:
    """(a, b, 0) is the cubic (a, b): a product less."""
    while len(step) > 2 and step[-1] == 0:
        step = step[:-1]
    return step
