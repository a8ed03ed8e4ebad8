"""The tables are what their formulas say and promise what `polar`'s docstring says, by scalar recurrences in fp64."""

from __future__ import annotations

import math
import re

import pytest

from steepest.linalg import coefficients as tables
from steepest.linalg.polar import polar
from support.remez import best_odd, tight_table

# name, table, l, degrees, margin of the last step, gain, where [l, 1] lands
TIGHT = [
    ("tight_8e-3", tables.TIGHT_8E3, 8e-3, (5, 5, 5, 5), 1.0, 168, (0.968, 1.032)),
    ("tight_4e-3", tables.TIGHT_4E3, 4e-3, (5, 5, 5, 5), 1.0, 247, (0.859, 1.141)),
    ("auto", tables.AUTO_8E3, 8e-3, (5, 5, 5, 9), 1.06, 215, (0.995, 1.005)),
    ("auto", tables.AUTO_4E3, 4e-3, (5, 5, 5, 9), 1.06, 316, (0.954, 1.046)),
    ("auto", tables.AUTO_17E4, 1.7e-3, (5, 5, 5, 9), 1.06, 497, (0.775, 1.225)),
    ("turbo", tables.TURBO_15E3, 1.5e-2, (5, 5, 9), 1.03, 81, (0.945, 1.055)),
    ("turbo", tables.TURBO_8E3, 8e-3, (5, 5, 9), 1.03, 114, (0.817, 1.183)),
]
OTHERS = [
    ("jordan", tables.JORDAN, 1e-2, 484, (0.681, 1.135)),
    ("you", tables.YOU, 1e-2, 492, (0.977, 1.032)),
    ("polar_express", tables.polar_express(5), 1e-3, 966, (0.840, 1.124)),
]
PROMISES = [(name, table, low, gain, lands) for name, table, low, _, _, gain, lands in TIGHT] + OTHERS


@pytest.mark.parametrize("name, table, low, degrees, margin", [row[:5] for row in TIGHT])
def test_a_tight_table_is_the_remez_composition(
    name: str, table: tables.Table, low: float, degrees: tuple[int, ...], margin: float
) -> None:
    for step, computed in zip(table, tight_table(low, degrees, margin=margin), strict=True):
        assert step == pytest.approx(computed, rel=1e-6)


@pytest.mark.parametrize("name, table, low, gain, lands", PROMISES)
def test_promised_gain_and_range(
    name: str, table: tables.Table, low: float, gain: float, lands: tuple[float, float]
) -> None:
    assert gain <= tables.gain(table) < gain + 2
    values = [tables.evaluate(table, math.exp(math.log(low) * i / 20000)) for i in range(20001)]
    assert lands[0] <= min(values) <= max(values) <= lands[1]
    assert tables.evaluate(table, 1e-9) == pytest.approx(1e-9 * tables.gain(table), rel=1e-6)


@pytest.mark.parametrize("name, table, low, gain, lands", PROMISES)
def test_the_docstring_states_the_promise(
    name: str, table: tables.Table, low: float, gain: float, lands: tuple[float, float]
) -> None:
    doc = re.sub(r"\s+", " ", polar.__doc__ or "")
    least = f"{low:.1e}".replace("e-0", "e-").replace(".0", "")
    slack = "" if name in ("jordan", "you", "polar_express") else " s"
    short = [f"{end:.3f}".removeprefix("0") for end in lands]
    assert f"{gain}{slack} {least} [{short[0]}, {short[1]}]" in doc


def test_auto_lifts_vanishing_singular_values_at_least_as_much_as_jordan_at_every_slack() -> None:
    plan = tables.SCHEDULES["auto"]
    for slack in (*plan.slacks, 1.0):
        chosen = next(t for t, least in zip(plan.tables, (*plan.slacks, 1.0), strict=True) if slack >= least)
        assert tables.gain(chosen) * slack >= tables.JORDAN_GAIN * (1 - 1e-12)


def test_best_odd_equioscillates() -> None:
    step, error = best_odd(0.1, 2.0, 5)
    values = [tables.evaluate((step,), 0.1 + 1.9 * i / 10000) - 1 for i in range(10001)]
    assert max(values) == pytest.approx(error, rel=1e-5)
    assert min(values) == pytest.approx(-error, rel=1e-5)


def test_polar_express_runs_to_any_length_and_settles() -> None:
    long = tables.polar_express(12)
    assert len(long) == 12
    assert long[7:] == (tables.POLAR_EXPRESS[-1],) * 5
    assert tables.evaluate(long, 1e-3) == pytest.approx(1, abs=1e-9)
    assert tables.polar_express(3, safety=1.0) == tables.POLAR_EXPRESS[:3]


def test_polar_express_divides_the_norm_as_the_paper_does() -> None:
    """By 1.01, and x by 1.01 in all steps but the last: a singular value 2% beyond the norm stays in the range."""
    for x in (0.3, 1.0, 1.02):
        y = x / 1.01
        for k, (a, b, c) in enumerate(tables.POLAR_EXPRESS):
            s = 1.01 if k < len(tables.POLAR_EXPRESS) - 1 else 1.0
            y = a * (y / s) + b * (y / s) ** 3 + c * (y / s) ** 5
        assert tables.evaluate(tables.polar_express(8), x) == pytest.approx(y, abs=1e-12)
        assert y == pytest.approx(1, abs=0.01)


def test_own_coefficients() -> None:
    assert tables.schedule("auto", (1.5, -0.5), 7).tables == (((1.5, -0.5),) * 7,)
    assert tables.schedule("auto", [(1.5, -0.5), (2, -1.5, 0.5)], None).tables == (((1.5, -0.5), (2.0, -1.5, 0.5)),)
    assert tables.schedule("jordan", None, 3).tables == ((tables.JORDAN_STEP,) * 3,)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("jordan", None, 100), "Number of steps must be less than 100 and at least 1, got 100"),
        (("jordan", None, 0), "Number of steps must be less than 100 and at least 1, got 0"),
        (("fast", None, None), "preset 'fast' is not known; choose one of jordan, exact"),
        (("auto", None, 5), "preset 'auto' has 4 steps, got steps=5; leave steps out or pass coefficients"),
        (("auto", (1.0,), None), r"coefficients must be one tuple or a list of tuples of 2 to 5 numbers, got \(1.0,\)"),
        (("auto", (), None), "coefficients must be one tuple or a list of tuples of 2 to 5 numbers"),
        (("auto", (1.0, math.nan, 1.0), None), "coefficients must be finite"),
        (("auto", [(2, -1), (2, -1)], 3), "coefficients hold 2 steps, got steps=3; leave steps out or pass one tuple"),
    ],
)
def test_messages(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tables.schedule(*arguments)


def test_a_step_needs_its_first_term_and_another() -> None:
    for bad in ((0.0, 1.0, 0.5), (2.0, 0.0, 0.0)):
        with pytest.raises(ValueError, match="must not begin with 0 or hold one term alone"):
            tables.schedule("jordan", bad, None)


def test_zeros_at_the_end_are_no_product() -> None:
    assert tables.schedule("jordan", (1.5, -0.5, 0.0), 3).tables == (((1.5, -0.5),) * 3,)
