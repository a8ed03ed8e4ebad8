"""Stochastic rounding: unbiased, repeatable, never further than a neighbour. Mantissas: nothing is lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from steepest.matrices import pieces
from steepest.parts import Decay, Hyper, Rounding
from steepest.recipe import Recipe, State, step_one
from steepest.step import Parameter, Plan
from support.problems import FEW, RECIPES, gaussian

STOCHASTIC, MANTISSA = Rounding("stochastic"), Rounding("mantissa")


def store(w: Tensor, step: int = 1, index: int = 0) -> Tensor:
    return STOCHASTIC.store(w, torch.bfloat16, torch.tensor(float(step)), (index,))[0]


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
        nearest = Rounding().store(nearest.float() - 2.0**-12, torch.bfloat16, None, (0,))[0]
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
    assert torch.equal(STOCHASTIC.store(w, dtype, torch.tensor(1.0), (0,))[0], w.to(dtype))


def test_a_view_is_rounded_like_its_copy() -> None:
    w = gaussian(6, 8, dtype=torch.float32)[:, ::2].mT
    assert torch.equal(store(w), store(w.contiguous()))
    assert store(w[:0]).shape == (0, 6)


def test_only_stochastic_rounding_counts_steps() -> None:
    assert STOCHASTIC.counts_steps
    assert not Rounding().counts_steps


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="rounding mode 'up' is not known; use 'nearest', 'stochastic' or 'mantissa'"):
        Rounding("up")  # type: ignore[arg-type]


# ---- mantissas


EXTREMES = torch.tensor([0.0, -0.0, 2.0**-149, -(2.0**-126), 1 + 2.0**-8, 3.3895e38, -3.4028235e38, float("inf")])


def any_bits(seed: int) -> Tensor:
    """fp32 numbers of every magnitude, none of them NaN."""
    bits = torch.randint(0, 2**32, (400,), generator=torch.Generator().manual_seed(seed))
    x = bits.to(torch.int32).view(torch.float32)
    return torch.cat([x[~x.isnan()], EXTREMES, -EXTREMES])


def bits_of(x: Tensor) -> Tensor:
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])


@FEW
@given(seed=st.integers(0, 10**6))
def test_a_weight_and_its_mantissa_are_the_number(seed: int) -> None:
    value = any_bits(seed)
    w, state = MANTISSA.store(value, torch.bfloat16, None, (0, 0, 0))
    assert (w.dtype, state["mantissa"].dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(bits_of(MANTISSA.value(w, state)), bits_of(value))


@FEW
@given(seed=st.integers(0, 10**6))
def test_the_stored_weight_is_the_nearest(seed: int) -> None:
    """Within half of its distance to the next bf16 number; a tie goes away from zero."""
    value = any_bits(seed)
    value = value[value.abs() < 3.38e38]  # beyond it the neighbour is infinite
    ties = (bits_of(neighbours(value)[0]) + 0x8000).view(torch.float32)
    value = torch.cat([value, ties])
    w = MANTISSA.store(value, torch.bfloat16, None, (0, 0, 0))[0].double()
    towards_zero, away = (t.double() for t in neighbours(value))
    ours, theirs = (w - value).abs(), torch.where(w == away, towards_zero, away).sub(value).abs()
    assert bool(((w == towards_zero) | (w == away)).all())
    assert bool(((ours < theirs) | ((ours == theirs) & (w == away))).all())


def test_nan_stays_nan() -> None:
    ones = torch.tensor([-1, 0x7FFFFFFF, 0x7F800001], dtype=torch.int32).view(torch.float32)
    w, state = MANTISSA.store(torch.cat([ones, torch.ones(1)]), torch.bfloat16, None, (0, 0, 0))
    assert w.isnan().tolist() == [True, True, True, False]
    assert MANTISSA.value(w, state).isnan().tolist() == [True, True, True, False]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.mT,
    "scalar": lambda t: t[0, 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_new_mantissa_is_zero_and_lies_as_the_weight_does(layout: str) -> None:
    w = LAYOUTS[layout](gaussian(4, 6, dtype=torch.bfloat16))
    state = MANTISSA.init(w)
    low = state["mantissa"]
    assert MANTISSA.keys == ("mantissa",) == tuple(state)
    assert (low.dtype, low.shape, low.stride()) == (torch.int16, w.shape, w.stride())
    assert torch.equal(MANTISSA.value(w, state), w.float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_other_dtypes_keep_no_mantissa(dtype: torch.dtype) -> None:
    w, value = gaussian(4, 6, dtype=dtype), gaussian(4, 6, seed=1, dtype=torch.promote_types(dtype, torch.float32))
    state = MANTISSA.init(w)
    assert (state["mantissa"].numel(), state["mantissa"].dtype) == (0, torch.int16)
    assert torch.equal(MANTISSA.value(w, state), w.to(value.dtype))
    stored, left_over = MANTISSA.store(value, dtype, None, (0, 0, 0))
    assert torch.equal(stored, value.to(dtype))
    assert left_over == {}


@pytest.mark.parametrize("mode", ["nearest", "stochastic"])
def test_other_modes_keep_nothing(mode: str) -> None:
    rounding = Rounding(mode)  # type: ignore[arg-type]
    w = gaussian(4, 6, dtype=torch.bfloat16)
    assert rounding.keys == ()
    assert rounding.init(w) == {}
    assert torch.equal(rounding.value(w, {}), w.float())
    assert not MANTISSA.counts_steps


HYPER = Hyper(0.02, 0.1, 0.9, 0.95, 1e-6)
TRAINED = {
    "adamw": RECIPES["adamw"],
    "adamw, cautious": replace(RECIPES["adamw"], decay=Decay(cautious=True)),
    "muadam": RECIPES["muadam"],
    "sign_sgd": RECIPES["sign_sgd"],
}


def step_by_one(recipe: Recipe, w: Tensor, g: Tensor, state: State) -> tuple[Tensor, State]:
    return step_one(recipe, w, g, state, HYPER)


def step_by_plan(recipe: Recipe, w: Tensor, g: Tensor, state: State) -> tuple[Tensor, State]:
    w = w.clone()
    w.grad_dtype = g.dtype
    w.grad = g
    Plan([Parameter(w, state, recipe, pieces(w.shape))], {w.device: torch.zeros((), dtype=torch.int64)}).step([HYPER])
    return w, state


@pytest.mark.parametrize("step", [step_by_one, step_by_plan])
@pytest.mark.parametrize("name", TRAINED)
def test_a_bf16_weight_trains_as_an_fp32_weight(
    name: str, step: Callable[[Recipe, Tensor, Tensor, State], tuple[Tensor, State]]
) -> None:
    """Bit for bit, given the same fp32 gradients: steps far below a unit in the last place of bf16 all count."""
    recipe = replace(TRAINED[name], rounding=MANTISSA)
    narrow = gaussian(7, 5, dtype=torch.bfloat16)
    wide = narrow.float()
    start, rounded = wide.clone(), narrow.clone()
    g = gaussian(7, 5, seed=1, dtype=torch.float32)
    state, wide_state, rounded_state = recipe.init(narrow, g), recipe.init(wide, g), TRAINED[name].init(rounded, g)
    for seed in range(2, 22):
        g = gaussian(7, 5, seed=seed, dtype=torch.float32)
        narrow, state = step(recipe, narrow, g, state)
        wide, wide_state = step(recipe, wide, g, wide_state)
        rounded, rounded_state = step(TRAINED[name], rounded, g, rounded_state)
        value = MANTISSA.value(narrow, state)
        assert (narrow.dtype, wide.dtype) == (torch.bfloat16, torch.float32)
        assert torch.equal(bits_of(value), bits_of(wide)), seed
        assert bool(((narrow.double() - value.double()).abs() <= 2.0**-8 * value.abs()).all())
    assert not torch.equal(wide, start)
    assert not torch.equal(rounded.float(), wide.bfloat16().float()), "nearest alone goes another way"
