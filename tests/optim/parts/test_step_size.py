"""The factor on the learning rate, by name."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.optim._muon import _adjust_lr

from steepest.parts.direction import Columns, Direction, Rows, Sign, Spectral
from steepest.parts.step_size import ADJUST_LR, shape_ratio
from support.problems import gaussian

# name: factors for a 12 x 3, a 3 x 12 and a 5 x 5 matrix
FACTORS = {
    "original": (2.0, 1.0, 1.0),
    "match_rms_adamw": (0.2 * math.sqrt(12), 0.2 * math.sqrt(12), 0.2 * math.sqrt(5)),
    "spectral_unclamped": (2.0, 0.5, 1.0),
    "none": (1.0, 1.0, 1.0),
    "embedding": (math.sqrt(3), math.sqrt(12), math.sqrt(5)),
    "embedding_columns": (math.sqrt(12), math.sqrt(3), math.sqrt(5)),
    "head": (1 / 3, 1 / 12, 1 / 5),
    "head_rows": (1 / math.sqrt(3), 1 / math.sqrt(12), 1 / math.sqrt(5)),
    "splus": (2 / 15, 2 / 15, 1 / 5),
}


def rms(x: Tensor, dim: int = -1) -> Tensor:
    return x.square().mean(dim).sqrt()


def largest_gain(
    x: Tensor, of_input: Callable[[Tensor], Tensor], of_output: Callable[[Tensor], Tensor], inputs: Tensor
) -> float:
    """The most that x lengthens one of the inputs, the columns."""
    return (of_output((x @ inputs).mT) / of_input(inputs.mT)).max().item()


def worst_inputs(x: Tensor, kind: str) -> Tensor:
    """Columns among which is one that the operator norm is attained at."""
    if kind == "singular vectors":
        return torch.linalg.svd(x).Vh.mT
    if kind == "rows":
        return x.mT
    return torch.eye(x.shape[1]) if kind == "tokens" else x.sign().mT


# factor, direction, how inputs and outputs are measured, where the operator norm is attained
OPERATORS = {
    "spectral_unclamped": (Spectral("svd"), rms, rms, "singular vectors"),
    "embedding_columns": (Columns(), lambda x: x.abs().sum(-1), rms, "tokens"),
    "head_rows": (Rows(), rms, lambda x: x.abs().amax(-1), "rows"),
    "head": (Sign(), lambda x: x.abs().amax(-1), lambda x: x.abs().amax(-1), "signs"),
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


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (6, 6)])
def test_the_step_has_operator_norm_one(name: str, shape: tuple[int, int]) -> None:
    """From the norm of the input to that of the output nothing is lengthened by more than 1, and something by 1."""
    direction, of_input, of_output, worst = OPERATORS[name]
    step = shape_ratio(name, *shape) * direction.unit(gaussian(*shape))
    most = largest_gain(step, of_input, of_output, worst_inputs(step, worst).double())
    assert most == pytest.approx(1, rel=1e-12)
    assert largest_gain(step, of_input, of_output, gaussian(shape[1], 500, seed=1)) <= 1 + 1e-12


def test_an_embedding_step_moves_every_token_by_an_rms_of_one() -> None:
    weight = gaussian(7, 4)
    step = shape_ratio("embedding", 7, 4) * Rows().unit(weight)
    assert rms(step).tolist() == pytest.approx([1] * 7)
    other = shape_ratio("embedding_columns", 4, 7) * Columns().unit(weight.mT)
    torch.testing.assert_close(other, step.mT)


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("channels", [(4, 6), (6, 4), (8, 8)])
def test_convolutions(kernel: int, channels: tuple[int, int]) -> None:
    """Scion's factor for the flattened kernel is the modular norm's for every tap: sqrt(out / in) / k^2."""
    out, inp = channels
    taps = kernel * kernel
    flattened = shape_ratio("spectral_unclamped", out, inp * taps) / math.sqrt(taps)
    assert flattened == pytest.approx(shape_ratio("spectral_unclamped", out, inp) / taps, rel=1e-15)


def test_a_kernel_of_the_modular_norm_keeps_the_rms() -> None:
    """Taps of norm sqrt(out / in) / k^2 sum to at most the norm of one linear layer, whatever the input."""
    direction: Direction = Spectral("svd")
    kernel = gaussian(9, 6, 4)
    step = shape_ratio("spectral_unclamped", 6, 4) / 9 * direction.unit(kernel)
    weight = step.reshape(3, 3, 6, 4).permute(2, 3, 0, 1)
    image = gaussian(1, 4, 16, 16)
    image = torch.nn.functional.normalize(image, dim=1)
    found = torch.nn.functional.conv2d(image, weight)
    assert rms(found, 1).max() <= rms(image, 1).max() * (1 + 1e-12)


@pytest.mark.parametrize("name", FACTORS)
def test_an_empty_matrix_has_the_factor_one(name: str) -> None:
    assert shape_ratio(name, 0, 4) == shape_ratio(name, 4, 0) == 1.0


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="function rms is not supported; use one of original, match_rms_adamw"):
        shape_ratio("rms", 2, 2)
