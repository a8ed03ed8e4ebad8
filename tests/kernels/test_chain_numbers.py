"""The norm bound and the numbers that follow from it: the reference against fp64, the kernel's formulas against it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from steepest.linalg.coefficients import SCHEDULES
from steepest.ops import backend
from steepest.ops.chain_numbers import SCRATCH, chain_numbers, squared_norm_bound
from support.chain_numbers import given, grams, kernel

needs_extension = pytest.mark.skipif(backend.extension is None, reason=f"{backend.extension_reason}")


@pytest.mark.parametrize("m", [1, 2, 5, 40, 130])
def test_the_bound_is_one(m: int) -> None:
    gram = grams(m, torch.float64)[:-1]
    bound, trace = squared_norm_bound(gram)
    largest = torch.linalg.eigvalsh(gram)[:, -1]
    assert (bound >= largest * (1 - 1e-12)).all()
    assert (bound <= torch.linalg.matrix_norm(gram) * (1 + 1e-12)).all()
    torch.testing.assert_close(trace, gram.diagonal(dim1=1, dim2=2).sum(-1))


@pytest.mark.parametrize("name", ["auto", "turbo", "exact", "tight_8e-3"])
def test_numbers_are_constants_by_powers_of_the_norm(name: str) -> None:
    schedule, gram = SCHEDULES[name], grams(64, torch.float64)[:-2]
    constants, powers, slacks = given(schedule)
    slack = torch.empty(len(gram))
    tight = schedule.norm == "tight"
    found = chain_numbers(gram, constants, powers, slacks, tight=tight, eps=0.0, slack=slack)
    taken = set()
    for i, r in enumerate(gram):
        s = torch.linalg.eigvalsh(r)
        square = s.mean() + (s - s.mean()).norm() * (63 / 64) ** 0.5 if tight else s.sum()
        assert slack[i].item() == pytest.approx((s.sum() / square).sqrt().item(), rel=1e-6)
        table = next((t for t, least in enumerate(slacks) if (s.sum() / square).sqrt() >= least), len(slacks))
        wanted = [c * square.item() ** (-power / 2) for c, power in zip(constants[table], powers)]
        assert found[i].tolist() == pytest.approx(wanted, rel=1e-9)
        taken.add(table)
    assert taken == set(range(len(constants)))


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [1, 3, 64, 131])
@pytest.mark.parametrize("name", ["auto", "turbo", "exact"])
def test_the_ops_formulas_are_those_of_the_reference(name: str, m: int, dtype: torch.dtype) -> None:
    schedule, gram = SCHEDULES[name], grams(m, dtype)
    tight = schedule.norm == "tight"
    for eps in (0.0, 1e-7, 0.5):
        slack = torch.empty(len(gram))
        wanted = chain_numbers(gram.double(), *given(schedule), tight=tight, eps=eps, slack=slack)
        found, found_slack = kernel(torch.ops.steepest, gram, given(schedule), tight, eps)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=0, equal_nan=True)
        torch.testing.assert_close(found_slack, slack, rtol=1e-6, atol=0, equal_nan=True)


@needs_extension
def test_opcheck() -> None:
    constants, powers, slacks = given(SCHEDULES["auto"])
    gram = grams(5, torch.bfloat16)[:-1]
    numbers, slack = torch.zeros(len(gram), len(powers)), torch.zeros(len(gram))
    scratch = torch.zeros(len(gram) * SCRATCH, dtype=torch.float64)
    flat = [value for row in constants for value in row]
    arguments = (gram, numbers, slack, scratch, flat, list(powers), list(slacks), True, 1e-7)
    torch.library.opcheck(torch.ops.steepest.chain_numbers.default, arguments)


@needs_extension
@pytest.mark.parametrize(
    "change,message",
    [
        ({"gram": torch.zeros(2, 3, 4)}, "gram must be a contiguous stack of square matrices"),
        ({"gram": torch.zeros(2, 3, 3, dtype=torch.float64)}, "gram must be float32, bfloat16 or float16"),
        ({"numbers": torch.zeros(2, 3)}, "numbers must be a contiguous float32 tensor of 4 elements"),
        ({"slack": torch.zeros(2, dtype=torch.float64)}, "slack must be a contiguous float32 tensor of 2 elements"),
        ({"scratch": torch.zeros(3, dtype=torch.float64)}, "scratch must be a contiguous float64 tensor of at least 8"),
        ({"constants": [1.0]}, "constants has 1 elements; wanted are 1 tables of 2, at most 4 tables and 320 elements"),
        ({"constants": [1.0] * 400, "powers": [0] * 400}, "constants has 400 elements"),
        ({"powers": [0, -1]}, "powers has -1"),
    ],
)
def test_messages(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "gram": torch.zeros(2, 3, 3),
        "numbers": torch.zeros(2, 2),
        "slack": torch.zeros(2),
        "scratch": torch.zeros(8, dtype=torch.float64),
        "constants": [1.0, 2.0],
        "powers": [0, 1],
        "slacks": [],
        "tight": True,
        "eps": 0.0,
    }
    with pytest.raises(RuntimeError, match=message):
        torch.ops.steepest.chain_numbers(*{**arguments, **change}.values())
