"""The factor on the learning rate, by name."""

from __future__ import annotations

import math

import pytest
from torch.optim._muon import _adjust_lr

from steepest.parts import ADJUST_LR, shape_ratio

# name: factors for a 12 x 3, a 3 x 12 and a 5 x 5 matrix
FACTORS = {
    "original": (2.0, 1.0, 1.0),
    "match_rms_adamw": (0.2 * math.sqrt(12), 0.2 * math.sqrt(12), 0.2 * math.sqrt(5)),
    "spectral_unclamped": (2.0, 0.5, 1.0),
    "none": (1.0, 1.0, 1.0),
}


def test_the_table_is_whole() -> None:
    assert set(ADJUST_LR) == set(FACTORS)


@pytest.mark.parametrize("name", FACTORS)
def test_factors(name: str) -> None:
    assert [shape_ratio(name, m, n) for m, n in ((12, 3), (3, 12), (5, 5))] == pytest.approx(FACTORS[name], rel=1e-15)


@pytest.mark.parametrize("name", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(7, 3), (3, 7), (4, 4), (1, 9)])
def test_torch_means_the_same(name: str, shape: tuple[int, int]) -> None:
    assert shape_ratio(name, *shape) == pytest.approx(_adjust_lr(1.0, name, shape), rel=1e-15)


@pytest.mark.parametrize("name", FACTORS)
def test_an_empty_matrix_has_the_factor_one(name: str) -> None:
    assert shape_ratio(name, 0, 4) == shape_ratio(name, 4, 0) == 1.0


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="function rms is not supported; use one of original, match_rms_adamw"):
        shape_ratio("rms", 2, 2)
