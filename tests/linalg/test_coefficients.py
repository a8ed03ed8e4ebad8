"""The tables are what their formulas say and promise what `polar`'s docstring says, by scalar recurrences in fp64."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import pytest

from steepest.linalg import coefficients as tables
from steepest.linalg.polar import polar
from support.remez import best_odd, tight_table

# table, l, degrees, margin of the last step
TIGHT = [
    (tables.TIGHT_8E3, 8e-3, (5, 5, 5, 5), 1.0),
    (tables.TIGHT_4E3, 4e-3, (5, 5, 5, 5), 1.0),
    (tables.AUTO_8E3, 8e-3, (5, 5, 5, 9), 1.06),
    (tables.AUTO_4E3, 4e-3, (5, 5, 5, 9), 1.06),
    (tables.AUTO_17E4, 1.7e-3, (5, 5, 5, 9), 1.06),
    (tables.TURBO_15E3, 1.5e-2, (5, 5, 9), 1.03),
    (tables.TURBO_8E3, 8e-3, (5, 5, 9), 1.03),
]
#: A line of the table in `polar`'s docstring: names, or none where it goes on, steps, gain, l and where [l, 1] lands.
PROMISE = re.compile(
    r"^ {8}(\S[\w, -]*?)? +(?:(\d+) +)?(\d+)( s)? +([\d.]+e-\d) +\[([\d.]+), ([\d.]+)\] ", re.MULTILINE
)


@dataclass(frozen=True)
class Promise:
    """What `polar`'s docstring says of one table."""

    steps: int
    gain: int
    tight: bool
    low: float
    lands: tuple[float, float]


def promises() -> dict[str, list[Promise]]:
    """Those of every preset, table by table."""
    stated: dict[str, list[Promise]] = {}
    names, steps = [""], "0"
    for name, count, gain, slack, low, *lands in PROMISE.findall(polar.__doc__ or ""):
        names, steps = (name.split(", "), count) if name else (names, steps)
        least, most = map(float, lands)
        for each in names:
            stated.setdefault(each, []).append(Promise(int(steps), int(gain), bool(slack), float(low), (least, most)))
    return stated


def test_every_preset_states_what_it_promises() -> None:
    doc = re.sub(r"\s+", " ", polar.__doc__ or "")
    assert '"simple" and "quintic" are other names of "jordan" and "you"' in doc
    assert {*promises(), "simple", "quintic", "svd"} == set(tables.presets())


@pytest.mark.parametrize("table, low, degrees, margin", TIGHT)
def test_a_tight_table_is_the_remez_composition(
    table: tables.Table, low: float, degrees: tuple[int, ...], margin: float
) -> None:
    for step, computed in zip(table, tight_table(low, degrees, margin=margin), strict=True):
        assert step == pytest.approx(computed, rel=1e-6)


@pytest.mark.parametrize("preset", promises())
def test_promised_gain_and_range(preset: str) -> None:
    """Gains are cut to whole numbers, and ranges rounded outwards to the digits that are shown."""
    schedule = tables.schedule(preset, None, None)
    for table, promise in zip(schedule.tables, promises()[preset], strict=True):
        assert (len(table), promise.tight) == (promise.steps, schedule.norm == "tight")
        assert promise.gain == int(tables.gain(table))
        values = [tables.evaluate(table, math.exp(math.log(promise.low) * i / 20000)) for i in range(20001)]
        least, most = promise.lands
        assert least <= min(values) < least + 1e-3
        assert most - 1e-3 < max(values) <= most
        assert tables.evaluate(table, 1e-9) == pytest.approx(1e-9 * tables.gain(table), rel=1e-6)


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
