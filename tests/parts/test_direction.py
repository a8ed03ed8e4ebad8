"""Directions: <x, d> is the dual norm, d has length 1, and nothing of length 1 goes further."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from problems import FEW, SVD, gap, gaussian, polar_by_svd
from steepest.parts import Direction, Frobenius, Sign

# direction, base norm, dual norm, the direction's own formula: each written apart from the library
TABLE = {
    "frobenius": (
        Frobenius(),
        lambda x: x.square().sum(dim=(-2, -1)).sqrt(),
        lambda x: x.square().sum(dim=(-2, -1)).sqrt(),
        lambda x: x / x.square().sum(dim=(-2, -1), keepdim=True).sqrt(),
    ),
    "sign": (
        Sign(),
        lambda x: x.abs().amax(dim=(-2, -1)),
        lambda x: x.abs().sum(dim=(-2, -1)),
        lambda x: (x > 0).double() - (x < 0).double(),
    ),
    "spectral": (
        SVD,
        lambda x: torch.linalg.svdvals(x)[..., 0],
        lambda x: torch.linalg.svdvals(x).sum(dim=-1),
        polar_by_svd,
    ),
}
names = pytest.mark.parametrize("name", TABLE)
SHAPES = st.sampled_from([(1, 1), (1, 5), (5, 1), (3, 3), (7, 4), (4, 7), (2, 3, 5), (2, 2, 4, 3)])


@names
@FEW
@given(shape=SHAPES, seed=st.integers(0, 99))
def test_a_direction_attains_its_dual_norm_with_length_one(name: str, shape: tuple[int, ...], seed: int) -> None:
    direction, norm, dual, formula = TABLE[name]
    x = gaussian(*shape, seed=seed)
    d, n = direction(x)
    assert d.shape == x.shape
    assert n.shape == (*shape[:-2], 1, 1)
    assert gap(n[..., 0, 0], dual(x)) < 1e-13
    assert gap((x * d).sum(dim=(-2, -1)), dual(x)) < 1e-13
    assert gap(norm(d), torch.ones(shape[:-2])) < 1e-13
    assert gap(d, formula(x)) < 1e-12
    assert torch.equal(d, direction.unit(x))
    assert gap(direction.scaled(x), dual(x)[..., None, None] * formula(x)) < 1e-12


@names
@FEW
@given(seed=st.integers(0, 99))
def test_nothing_of_length_one_goes_further(name: str, seed: int) -> None:
    direction, norm, _, _ = TABLE[name]
    x, trials = gaussian(4, 6, seed=seed), gaussian(50, 4, 6, seed=seed + 1000)
    # Half of the trials are near the maximiser, where a wrong direction would be overtaken.
    trials[25:] = direction.unit(x) + 0.1 * trials[25:]
    trials /= norm(trials)[:, None, None]
    reach = (x * trials).sum(dim=(-2, -1))
    assert (reach <= direction(x)[1].item() * (1 + 1e-13)).all()


@names
def test_the_zero_matrix_has_the_zero_direction(name: str) -> None:
    direction, _, _, formula = TABLE[name]
    x = gaussian(3, 4, 5)
    x[1] = 0
    d, n = direction(x)
    assert d[1].count_nonzero() == 0
    assert n[1].item() == 0
    assert gap(d[[0, 2]], formula(x[[0, 2]])) < 1e-12
    assert direction.scaled(x)[1].count_nonzero() == 0


@names
@pytest.mark.parametrize("c", [1e-25, 1e-20, 1e20, 1e25])
def test_a_direction_does_not_see_the_scale_even_in_fp32(name: str, c: float) -> None:
    direction, _, _, formula = TABLE[name]
    x = gaussian(4, 6)
    assert gap(direction.unit((c * x).float()), formula(x)) < 1e-5


@names
def test_rank_deficient_input(name: str) -> None:
    direction, norm, dual, _ = TABLE[name]
    x = gaussian(6, 2, seed=1) @ gaussian(2, 5, seed=2)
    d, n = direction(x)
    assert gap(n.flatten(), dual(x)) < 1e-12
    assert gap(norm(d), torch.tensor(1.0)) < 1e-12


@names
@pytest.mark.parametrize(
    "dtype, dual_dtype, tolerance",
    [
        (torch.float64, torch.float64, 1e-13),
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 2e-2),
    ],
)
def test_dtypes(name: str, dtype: torch.dtype, dual_dtype: torch.dtype, tolerance: float) -> None:
    direction, _, dual, formula = TABLE[name]
    x = gaussian(5, 4, dtype=dtype)
    kept = x.clone()
    d, n = direction(x)
    assert d.dtype == direction.scaled(x).dtype == dtype
    assert n.dtype == dual_dtype
    assert gap(d, formula(x.double())) < tolerance
    assert gap(n.flatten(), dual(x.double())) < tolerance
    assert torch.equal(x, kept)


@names
def test_strided_input_and_no_matrices_at_all(name: str) -> None:
    direction = TABLE[name][0]
    x = gaussian(5, 12)[:, ::3].mT
    assert gap(direction.unit(x), direction.unit(x.contiguous())) < 1e-13
    assert direction.unit(gaussian(0, 3, 4)).shape == (0, 3, 4)
    assert direction.unit(gaussian(0, 4)).shape == (0, 4)


def test_the_scaled_frobenius_step_is_the_gradient_itself() -> None:
    x = gaussian(3, 4)
    assert Frobenius().scaled(x) is x


def test_a_base_norm_must_say_its_direction() -> None:
    with pytest.raises(NotImplementedError):
        Direction().unit(gaussian(2, 2))
