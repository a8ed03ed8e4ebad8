"""Stochastic rounding: unbiased, repeatable, never further than a neighbour."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from problems import FEW, gaussian
from steepest.parts import Rounding

STOCHASTIC = Rounding("stochastic")


def store(w: Tensor, step: int = 1, index: int = 0) -> Tensor:
    return STOCHASTIC.store(w, torch.bfloat16, torch.tensor(float(step)), (index,))


def neighbours(w: Tensor) -> tuple[Tensor, Tensor]:
    """The bf16 numbers next to w (fp32), towards zero and away from it."""
    towards_zero = (w.view(torch.int32) & -0x10000).view(torch.float32)
    away = ((w.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32)
    return towards_zero, away


@FEW
@given(seed=st.integers(0, 99), step=st.integers(1, 10**6), exponent=st.sampled_from([-38, -20, 0, 20, 37]))
def test_only_neighbours_are_reached(seed: int, step: int, exponent: int) -> None:
    w = gaussian(8, 9, seed=seed, dtype=torch.float32) * 10.0**exponent
    low, high = neighbours(w)
    stored = store(w, step).float()
    assert ((stored == low) | (stored == high)).all()


def test_the_mean_over_steps_is_the_exact_value() -> None:
    """Each mean of 4000 draws has standard deviation at most 1/2 ulp / sqrt(4000); 5 of those bound 63 entries."""
    w = gaussian(7, 9, dtype=torch.float32)
    low, high = neighbours(w)
    mean = torch.stack([store(w, step).double() for step in range(1, 4001)]).mean(dim=0)
    fraction = (mean - low.double()) / (high - low).double()
    wanted = ((w - low) / (high - low)).double()
    assert (fraction - wanted).abs().max() < 5 * 0.5 / 4000**0.5


def test_the_mean_over_elements_is_the_exact_value() -> None:
    """Elements of one tensor in one step are as good a sample: 1 + ulp/4 goes up a quarter of the time."""
    w = torch.full((200, 200), 1 + 2.0**-9)
    assert abs((store(w) > 1).double().mean().item() - 0.25) < 5 * 0.5 / 200


def test_updates_below_half_an_ulp_are_not_lost() -> None:
    w = torch.ones(64, 64, dtype=torch.bfloat16)
    nearest = w.clone()
    for step in range(1, 129):
        w = store(w.float() - 2.0**-12, step)
        nearest = Rounding().store(nearest.float() - 2.0**-12, torch.bfloat16, None, (0,))
    assert nearest.eq(1).all()
    assert abs(w.double().mean().item() - (1 - 128 * 2.0**-12)) < 1e-3


def test_the_same_step_gives_the_same_bits_and_no_generator_moves() -> None:
    w, before = gaussian(30, 30, dtype=torch.float32), torch.get_rng_state()
    assert torch.equal(store(w, 7, 3), store(w, 7, 3))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("other", [(8, 3), (7, 4), (7, 1000), (700, 3)])
def test_other_steps_and_parameters_draw_independently(other: tuple[int, int]) -> None:
    """Halfway values go up or down in two draws: they agree in half of the entries."""
    w = torch.full((100, 100), 1 + 2.0**-8)
    first, second = store(w, 7, 3) > 1, store(w, *other) > 1
    assert abs((first == second).double().mean().item() - 0.5) < 5 * 0.5 / 100


def test_neighbouring_elements_draw_independently() -> None:
    up = (store(torch.full((100, 101), 1 + 2.0**-8)) > 1).flatten()
    for lag in (1, 2, 16, 101):
        assert abs((up[lag:] == up[:-lag]).double().mean().item() - 0.5) < 5 * 0.5 / 100


def test_bf16_numbers_are_stored_as_they_are() -> None:
    w = torch.cat([gaussian(500, dtype=torch.bfloat16), torch.tensor([0.0, -0.0, 2.0**-133, 3.3895e38]).bfloat16()])
    for step in (1, 2, 3):
        assert torch.equal(store(w.float(), step).view(torch.int16), w.view(torch.int16))


def test_what_is_not_finite_stays_so() -> None:
    w = torch.tensor([float("inf"), float("-inf"), float("nan"), 1.0])
    stored = store(w)
    assert stored[0] == float("inf")
    assert stored[1] == float("-inf")
    assert stored[2].isnan()
    assert stored[3] == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_other_dtypes_are_rounded_to_nearest(dtype: torch.dtype) -> None:
    w = gaussian(5, 5, dtype=torch.float32)
    assert torch.equal(STOCHASTIC.store(w, dtype, torch.tensor(1.0), (0,)), w.to(dtype))


def test_a_view_is_rounded_like_its_copy() -> None:
    w = gaussian(6, 8, dtype=torch.float32)[:, ::2].mT
    assert torch.equal(store(w), store(w.contiguous()))
    assert store(w[:0]).shape == (0, 6)


def test_only_stochastic_rounding_counts_steps() -> None:
    assert STOCHASTIC.counts_steps
    assert not Rounding().counts_steps


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="rounding mode 'up' is not known; use 'nearest' or 'stochastic'"):
        Rounding("up")  # type: ignore[arg-type]
