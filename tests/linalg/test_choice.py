"""How a polar factor is computed is chosen in one place, and what is chosen is what runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from steepest.linalg.chain import Apply, Gram, Product, multiplication
from steepest.linalg.coefficients import SCHEDULES
from steepest.linalg.polar import Choice, choose, factors, polar
from support.singular_values import gaussian

H, B, F, D = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("rows", "columns", "preset", "options", "form", "dtype", "restarts", "rule"),
    [
        (1024, 4096, "auto", {}, "gram", H, (2,), "gram"),
        (4096, 1024, "turbo", {}, "gram", H, (), "gram"),
        (1024, 4096, "you", {}, "gram", B, (2, 4), "gram"),
        (1024, 4096, "polar_express", {}, "standard", B, (1, 2, 3, 4), "dtype"),
        (1024, 1024, "auto", {}, "standard", H, (1, 2, 3), "aspect"),
        (64, 512, "auto", {}, "standard", H, (1, 2, 3), "short side"),
        (64, 512, "auto", {"dtype": F}, "gram", F, (2,), "gram"),
        (64, 512, "jordan", {}, "plain", B, (1, 2, 3, 4), "preset"),
        (64, 512, "jordan", {"dtype": F}, "gram", F, (3,), "gram"),
        (64, 64, "jordan", {"dtype": F}, "standard", F, (1, 2, 3, 4), "aspect"),
        (64, 512, "jordan", {"dtype": D}, "plain", D, (1, 2, 3, 4), "preset"),
        (64, 512, "jordan", {"form": "standard"}, "standard", B, (1, 2, 3, 4), "caller"),
        (64, 64, "auto", {"form": "gram"}, "gram", H, (2,), "caller"),
        (64, 64, "auto", {"restarts": {3, 1}}, "gram", H, (1, 3), "caller"),
        (64, 64, "auto", {"restarts": (1, 2, 3)}, "standard", H, (1, 2, 3), "caller"),
        (0, 8, "auto", {}, "standard", H, (1, 2, 3), "short side"),
        (64, 512, "auto", {"x_dtype": D}, "gram", D, (2,), "gram"),
    ],
)
def test_choices_on_a_gpu(
    rows: int,
    columns: int,
    preset: str,
    options: dict[str, Any],
    form: str,
    dtype: torch.dtype,
    restarts: tuple[int, ...],
    rule: str,
) -> None:
    choice = choose(rows, columns, preset, device="cuda", **options)
    assert (choice.form, choice.dtype, choice.restarts, choice.rule) == (form, dtype, restarts, rule)
    assert choice.schedule == choose(rows, columns, preset, device="cpu", **options).schedule


def test_the_kernel_for_small_matrices_comes_first_and_is_asked_last() -> None:
    """Its self-check may run where it is asked: not where something else has decided."""
    asked = []

    def small(schedule: object) -> bool:
        asked.append(schedule)
        return True

    taken = choose(64, 512, device="cuda", small=small)
    assert (taken.form, taken.rule) == ("small", "small")
    assert asked == [SCHEDULES["auto"]]
    for options in ({"dtype": B}, {"form": "standard"}, {"restarts": (2,)}, {"preset": "jordan"}):
        assert choose(64, 512, device="cuda", small=small, **options).form != "small"
    assert len(asked) == 1


@pytest.mark.parametrize("form", ["gram", "standard", "plain"])
def test_polar_runs_what_is_chosen(form: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x = gaussian(40, 160).float()
    restarts = () if form == "gram" else (1, 2, 3)
    preset = "jordan" if form == "plain" else "auto"
    wanted = polar(x, preset, dtype=D, **({} if form == "plain" else {"restarts": restarts}))
    forced = Choice(form, D, SCHEDULES[preset], restarts, "caller")
    monkeypatch.setattr(factors, "choose", lambda *_, **__: forced)
    assert torch.equal(polar(x), wanted)


@pytest.mark.parametrize(("rows", "columns"), [(3, 5), (5, 3), (4, 4)])
@pytest.mark.parametrize("node", [Gram("gram", "x"), Product("z", "z", "t", "t", 1, 0), Apply("y", "q", "x", 1, 0)])
def test_a_multiplication_has_the_sizes_of_its_operands(node: Any, rows: int, columns: int) -> None:
    product = multiplication(node, rows, columns)
    short = min(rows, columns)

    def shape(operand: Any) -> tuple[int, int]:
        sizes = (rows, columns) if operand.buffer in ("x", "y") else (short, short)
        return sizes[::-1] if operand.transposed else sizes

    assert shape(product.a) == (product.m, product.k)
    assert shape(product.b) == (product.k, product.n)
    assert product.symmetric == (not isinstance(node, Apply))
    assert (product.m, product.n) == ((rows, columns) if isinstance(node, Apply) else (short, short))
