"""HASD: the guarantee of every iterate, what is known of its density, and its rate against gradient descent's."""

from __future__ import annotations

import math
from itertools import islice

import pytest
import torch
from torch import Tensor

from steepest.zoo.hasd import Point, hasd
from support.problems import gap, gaussian

P = (2.0, 4.0, 16.0, math.inf)
every_p = pytest.mark.parametrize("p", P)

# f(x) = sum h (x - goal)^2 / 2 with few large curvatures and many small ones, so that gradients are dense.
D = 200
CURVATURE = torch.full((D,), 0.01, dtype=torch.float64)
CURVATURE[:3] = 1.0
GOAL, START = gaussian(D), torch.zeros(D, dtype=torch.float64)


def f(x: Tensor) -> float:
    return float((CURVATURE * (x - GOAL) ** 2).sum() / 2)


def gradient(x: Tensor) -> Tensor:
    return CURVATURE * (x - GOAL)


def smoothness(p: float) -> float:
    """The largest sum h x^2 with |x|_p = 1: the norm of h whose exponent p / (p - 2) is dual to p / 2."""
    if p == 2:
        return float(CURVATURE.max())
    r = 1.0 if math.isinf(p) else p / (p - 2)
    return float((CURVATURE**r).sum() ** (1 / r))


def points(p: float, steps: int = 60) -> list[Point]:
    return list(islice(hasd(gradient, START, smoothness(p), p), steps))


@every_p
def test_the_guarantee_holds_at_every_iterate(p: float) -> None:
    distance = float(GOAL.square().sum())
    for step, point in enumerate(points(p), 1):
        assert f(point.x) <= distance / (2 * point.weight)
        assert point.weight >= step**2 / (8 * smoothness(p))
        assert 1.0 <= point.density <= D ** (1 - 2 / p) * (1 + 1e-12)


@every_p
def test_a_few_gradients_a_step(p: float) -> None:
    assert points(p)[-1].gradients <= 60 * (2 if p == 2 else 10)


def test_dense_gradients_make_it_faster_than_descent_and_than_acceleration_alone() -> None:
    """Gradient descent with as many gradients as HASD takes at p = 16, and HASD at p = 2 with as many steps."""
    found, accelerated = points(16.0)[-1], points(2.0)[-1]
    x = START
    for _ in range(found.gradients):
        x = x - gradient(x) / smoothness(2.0)
    assert f(found.x) < 0.1 * f(x)
    assert f(found.x) < 1e-2 * f(accelerated.x)


def test_the_rate_is_quadratic_in_the_steps() -> None:
    """log weight against log steps; descent's guarantee has slope 1."""
    weights = [math.log(point.weight) for point in points(math.inf, 80)]
    assert (weights[79] - weights[19]) / math.log(80 / 20) > 1.8


def test_for_p_two_it_is_accelerated_gradient_descent() -> None:
    x, z, weight, big = START, START, 0.0, smoothness(2.0)
    for point in points(2.0, 20):
        a = (1 + math.sqrt(1 + 8 * big * weight)) / (4 * big)
        y = (weight * x + a * z) / (weight + a)
        x = y - gradient(y) / (2 * big)
        z, weight = z - a * gradient(x), weight + a
        assert gap(point.x, x) < 1e-12


@pytest.mark.parametrize("p", [4.0, math.inf])
def test_of_singular_values_it_is_that_of_entries_on_diagonal_matrices(p: float) -> None:
    h, goal = CURVATURE[:12], GOAL[:12]

    def diagonal(x: Tensor) -> Tensor:
        return torch.diag(h * (x.diagonal() - goal))

    entries = islice(hasd(lambda x: h * (x - goal), START[:12], 3.1, p), 15)
    matrices = islice(hasd(diagonal, torch.zeros(12, 12, dtype=torch.float64), 3.1, p, singular=True), 15)
    for flat, full in zip(entries, matrices):
        assert gap(full.x.diagonal(), flat.x) < 1e-10


def test_a_matrix_problem_in_the_spectral_norm() -> None:
    """sum of h_ij (X - goal)_ij^2 / 2: L in the spectral norm is at most the sum of the largest curvatures of rows."""
    h = CURVATURE[:96].reshape(12, 8)
    goal, big = gaussian(12, 8), float(h.amax(1).sum())
    start = torch.zeros(12, 8, dtype=torch.float64)
    for point in islice(hasd(lambda x: h * (x - goal), start, big, singular=True), 30):
        assert float((h * (point.x - goal) ** 2).sum() / 2) <= float(goal.square().sum()) / (2 * point.weight)


def test_it_stops_at_a_minimiser_and_leaves_the_start_alone() -> None:
    start = GOAL.clone()
    (only,) = list(hasd(gradient, start, 1.0, 4.0))
    assert torch.equal(only.x, GOAL)
    assert torch.equal(start, GOAL)


@pytest.mark.parametrize(
    "options, text",
    [
        ({"p": 1.5}, "p should be at least 2 but is: 1.5"),
        ({"smoothness": 0.0}, "should be positive but are: 0.0"),
        ({"singular": True}, r"shape \(200,\)"),
    ],
)
def test_bad_values_are_named(options: dict[str, float], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        next(hasd(gradient, START, **{"smoothness": 1.0, **options}))  # type: ignore[arg-type]
