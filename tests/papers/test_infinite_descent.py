"""The Method of Infinite Descent, arXiv:2510.05489: 0 = sum_k D^(k+1) L(theta) [delta^k] / k!, with L = mean (f - y)^2.

References are written from f(x) = Re sum_j c_j exp(z_j x) in complex numpy, loop by loop.
"""

from __future__ import annotations

import copy
import math
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import least_squares, minimize
from torch import Tensor, nn

import steepest
from steepest.zoo.infinite_descent import _closed_problem
from support.references import gap, gaussian

X = np.linspace(0.0, 6.0, 64)
NYQUIST = (-1.0) ** np.arange(64)
Complex = NDArray[np.complex128]
NAMES = ("alpha", "omega", "cosine", "sine")


def units(k: int, seed: int) -> tuple[Complex, Complex]:
    """z and c of k units whose frequencies lie apart."""
    rng = np.random.default_rng(seed)
    omega = 2.5 * (np.arange(1, k + 1) + rng.uniform(-0.2, 0.2, k))
    return rng.uniform(-0.3, 0, k) + 1j * omega, rng.uniform(0.5, 1.5, k) * np.exp(1j * rng.uniform(0, 6, k))


def signal(z: Complex, c: Complex, x: NDArray[np.float64] = X) -> NDArray[np.float64]:
    """f(x) = Re sum_j c_j exp(z_j x)."""
    return sum((c[j] * np.exp(z[j] * x)).real for j in range(len(z)))


def noisy(k: int, seed: int, size: float = 0.3) -> NDArray[np.float64]:
    return signal(*units(k, seed)) + size * np.random.default_rng(100 + seed).normal(size=len(X))


def fresh(k: int, seed: int = 0, **options: Any) -> steepest.AION:
    torch.manual_seed(seed)
    return steepest.AION(k, dtype=torch.float64, **options)


def read(model: nn.Module) -> tuple[Complex, Complex]:
    """z and c of an AION in order of frequency, which is made positive: Re c exp(z x) is that of the conjugates."""
    values = {name: p.detach().numpy().ravel() for name, p in model.named_parameters()}
    z, c = values["alpha"] + 1j * values["omega"], values["cosine"] - 1j * values["sine"]
    z, c = np.where(z.imag < 0, z.conj(), z), np.where(z.imag < 0, c.conj(), c)
    order = np.argsort(z.imag)
    return z[order], c[order]


def loss_of(model: nn.Module, y: NDArray[np.float64]) -> float:
    return float(np.mean((signal(*read(model)) - y) ** 2))


def tensor(x: NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(x)


def solved(model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> tuple[Any, nn.Module]:
    root = steepest.infinite_descent(model, x, y, **options)
    moved = copy.deepcopy(model)
    root.apply(moved)
    return root, moved


# ---- the series ------------------------------------------------------------------------------------------------------


def taylor_sum(
    z: Complex, c: Complex, dz: Complex, dc: Complex, y: NDArray[np.float64], order: int
) -> NDArray[np.float64]:
    """sum_(k <= order) D^(k+1) L [delta^k] / k! from derivatives at (z, c) alone.

    exp((z + t dz) x) = exp(z x) sum_m (t dz x)^m / m!, so that f and its derivatives are power series in t.
    """
    k, n, powers = len(z), len(X), order + 1
    f = np.zeros((powers, n))
    f[0] = -y
    slopes = np.zeros((4 * k, powers, n))
    for j in range(k):
        for m in range(powers):
            here = np.exp(z[j] * X) * (dz[j] * X) ** m / math.factorial(m)
            before = np.exp(z[j] * X) * (dz[j] * X) ** (m - 1) / math.factorial(m - 1) if m else np.zeros(n)
            unit = c[j] * here + dc[j] * before
            f[m] += unit.real
            slopes[j, m], slopes[k + j, m] = (unit * X).real, (unit * 1j * X).real
            slopes[2 * k + j, m], slopes[3 * k + j, m] = here.real, (-1j * here).real
    total = np.zeros(4 * k)
    for m in range(powers):
        for split in range(m + 1):
            total += 2 / n * slopes[:, m - split] @ f[split]
    return total


def series_errors(scale: float, orders: range) -> list[float]:
    """How far Taylor sums of a step of two units are from the resummed gradient."""
    (z, c), y = units(2, 0), signal(*units(2, 1))
    rng = np.random.default_rng(5)
    dz, dc = (scale * (rng.normal(size=2) + 1j * rng.normal(size=2)) / 6 for _ in range(2))
    model = fresh(2)
    with torch.no_grad():
        for name, value in zip(NAMES, (z.real, z.imag, c.real, -c.imag)):
            p = getattr(model, name)
            p.copy_(tensor(value).reshape(p.shape))
    shapes = {name: getattr(model, name).shape for name in NAMES}
    delta = {
        name: tensor(value).reshape(shapes[name]) for name, value in zip(NAMES, (dz.real, dz.imag, dc.real, -dc.imag))
    }
    problem = _closed_problem(model, tensor(X), tensor(y))
    step = torch.cat([delta[name].flatten() for name in problem.names])
    resummed = problem.derivatives(problem.start + step).gradient.numpy()
    # sine is -Im c: its derivative is that by Im c with the other sign, which taylor_sum has (-i) already
    return [float(np.abs(taylor_sum(z, c, dz, dc, y, order) - resummed).max()) for order in orders]


def test_the_first_term_that_is_left_out_is_the_error_of_a_taylor_sum() -> None:
    """|d|^(K+1): half the step, 2^-(K+1) of the error."""
    orders = range(6)
    whole, half = series_errors(0.02, orders), series_errors(0.01, orders)
    for order in orders:
        assert math.log2(whole[order] / half[order]) == pytest.approx(order + 1, abs=0.2)


def test_taylor_sums_come_to_the_resummed_gradient_like_an_exponential_series() -> None:
    """L is a sum of products of two units: its terms are at most (2 |d| x)^K / K! of the largest."""
    rng = np.random.default_rng(5)
    d = np.abs(rng.normal(size=2) + 1j * rng.normal(size=2)).max() / 6
    errors = series_errors(1.0, range(4, 44, 4))
    for order, error in zip(range(4, 44, 4), errors):
        bound = (2 * d * X.max()) ** (order + 1) / math.factorial(order + 1)
        assert error <= 1e3 * bound + 1e-10
    assert errors[0] > 1e-2 > 1e-12 > errors[-1]


def test_moving_an_exponent_multiplies_the_unit() -> None:
    model, x, d = fresh(3), gaussian(20, 1), gaussian(2, 3, 1)
    x = x.to(torch.complex128)
    waves, c = torch.exp(x @ model.z.mT), model.c
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved.alpha += d[0]
        moved.omega += d[1]
    shifted = (waves * torch.exp(x @ torch.complex(d[0], d[1]).mT)) @ c.mT
    assert gap(moved(x.real).detach(), shifted.real.detach()) < 1e-13


# ---- data without noise ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_without_noise_one_step_is_the_optimum(k: int) -> None:
    for seed in range(5):
        z, c = units(k, seed)
        root, model = solved(fresh(k, seed), tensor(X), tensor(signal(z, c)))
        assert root.iterations == 1
        assert root.definite
        assert root.gradient_norm < 1e-10
        for found, wanted in zip(read(model), (z, c)):
            assert np.abs(found - wanted).max() < 1e-10


def test_order_shape_offset_and_repetition_do_not_matter() -> None:
    z, c = units(2, 0)
    order = np.random.default_rng(0).permutation(len(X))
    shuffled, again = X[order] - 2.0, np.concatenate([X, X[5:20]])
    for x, column in ((shuffled, False), (shuffled, True), (again, False)):
        y = tensor(signal(z, c, x))
        root, model = solved(fresh(2), tensor(x)[:, None], y[:, None] if column else y)
        assert root.iterations == 1
        assert np.abs(read(model)[0] - z).max() < 1e-10
    assert steepest.infinite_descent(fresh(2), tensor(X[:8]), tensor(signal(z, c, X[:8]))).iterations == 1  # 4k numbers


def test_several_outputs_share_exponents() -> None:
    z, c = units(2, 0)
    y = torch.stack([tensor(signal(z, c * factor)) for factor in (1, 1j, 0.3)], 1)
    root, model = solved(fresh(2, outputs=3), tensor(X), y)
    assert root.iterations == 1
    assert gap(model(tensor(X)[:, None]).detach(), y) < 1e-10


def test_sums_of_exponentials_and_of_sinusoids_have_the_rest_frozen() -> None:
    decays = fresh(2)
    with torch.no_grad():
        decays.omega.zero_()
        decays.sine.zero_()
    decays.omega.requires_grad_(False)
    decays.sine.requires_grad_(False)
    root, model = solved(decays, tensor(X), tensor(np.exp(-X) + 2 * np.exp(-3 * X)))
    assert root.iterations == 1
    assert root.definite
    assert root.delta.keys() == {"alpha", "cosine"}
    assert sorted(model.get_parameter("alpha").flatten().tolist()) == pytest.approx([-3, -1], abs=1e-10)

    waves = fresh(2)
    waves.alpha.requires_grad_(False)
    root, model = solved(waves, tensor(X), tensor(np.cos(2 * X) + np.sin(5 * X + 1)))
    assert root.iterations == 1
    assert root.definite
    assert read(model)[0] == pytest.approx([2j, 5j], abs=1e-10)


def test_a_gap_in_the_grid_takes_a_few_newton_steps() -> None:
    z, c = units(2, 0)
    x = np.delete(X, [7, 30])
    root, model = solved(fresh(2), tensor(x), tensor(signal(z, c, x)))
    assert root.iterations <= 10
    assert np.abs(read(model)[0] - z).max() < 1e-10


@pytest.mark.parametrize(
    "y, k",
    [
        (np.full_like(X, 3.0), 1),
        (np.zeros_like(X), 2),
        (signal(*units(1, 0)), 3),
        (np.exp(-X), 1),
        (X, 1),
        (NYQUIST, 1),
    ],
    ids=["constant", "zero", "one unit of three", "real exponent", "a double root", "half a turn a sample"],
)
def test_what_the_data_do_not_determine_is_no_strict_minimum(y: NDArray[np.float64], k: int) -> None:
    root, model = solved(fresh(k), tensor(X), tensor(y))
    assert root.definite is None
    assert loss_of(model, y) < 1e-12 * max(1.0, float(np.mean(y**2)))


# ---- noise -----------------------------------------------------------------------------------------------------------


def real_residual(theta: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    alpha, omega, a, b = theta.reshape(4, -1)
    return signal(alpha + 1j * omega, a - 1j * b) - y


def real_slopes(theta: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    alpha, omega, a, b = theta.reshape(4, -1)
    waves = [np.exp((p + 1j * q) * X) for p, q in zip(alpha, omega)]
    units_ = [w * (p - 1j * q) for w, p, q in zip(waves, a, b)]
    columns = [(u * X).real for u in units_] + [(u * 1j * X).real for u in units_]
    return np.stack(columns + [w.real for w in waves] + [(-1j * w).real for w in waves], axis=1)


@pytest.mark.slow
def test_with_noise_it_is_a_minimum_as_an_independent_hessian_has_it() -> None:
    for seed in range(3):
        y = noisy(2, seed)
        root, model = solved(fresh(2, seed), tensor(X), tensor(y))
        z, c = read(model)
        theta = np.concatenate([z.real, z.imag, c.real, -c.imag])
        r, J = real_residual(theta, y), real_slopes(theta, y)
        assert np.abs(2 / len(X) * J.T @ r).max() < 1e-10
        assert root.gradient_norm < 1e-10

        def loss(t: Tensor, y: NDArray[np.float64] = y) -> Tensor:
            alpha, omega, a, b = t.reshape(4, -1)
            waves = torch.exp(torch.complex(alpha, omega) * tensor(X)[:, None])
            return ((waves * torch.complex(a, -b)).real.sum(1) - tensor(y)).square().mean()

        least = float(torch.linalg.eigvalsh(torch.func.hessian(loss)(tensor(theta)))[0])
        assert least > 0
        assert root.definite is True


def lowest_of_least_squares(k: int, y: NDArray[np.float64], starts: int, seed: int) -> float:
    """scipy's Levenberg-Marquardt from random starts; aliases beyond half a turn a sample are left out."""
    rng, best = np.random.default_rng(seed), np.inf
    for _ in range(starts):
        start = np.concatenate([rng.uniform(-0.5, 0.1, k), rng.uniform(0, 3 * k + 3, k), rng.normal(size=2 * k)])
        with np.errstate(all="ignore"), suppress(ValueError):  # one that overflows
            found = least_squares(real_residual, start, real_slopes, method="lm", args=(y,), max_nfev=300)
            if np.abs(found.x[k : 2 * k]).max() < math.pi / (X[1] - X[0]):
                best = min(best, float(np.mean(found.fun**2)))
    return best


@pytest.mark.slow
def test_with_noise_no_start_of_least_squares_comes_lower() -> None:
    for seed in range(2):
        y = noisy(2, seed)
        _, model = solved(fresh(2, seed), tensor(X), tensor(y))
        assert loss_of(model, y) <= lowest_of_least_squares(2, y, 20, seed) * (1 + 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("size", [0.3, 1.0])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_in_much_noise_no_start_of_least_squares_comes_lower(k: int, size: float) -> None:
    """docs/infinite_descent.md says so of these 24 fits."""
    for seed in range(2, 6):
        y = noisy(k, seed, size)
        root, model = solved(fresh(k, seed), tensor(X), tensor(y))
        assert root.gradient_norm < 1e-10
        assert root.definite
        assert loss_of(model, y) <= lowest_of_least_squares(k, y, 30, seed) * (1 + 1e-9)


def test_of_waves_with_the_same_values_on_a_grid_the_slow_one_is_taken() -> None:
    """From a model that is turns a sample faster, and has converged."""
    y = noisy(1, 0)
    _, slow = solved(fresh(1), tensor(X), tensor(y))
    fast = copy.deepcopy(slow)
    with torch.no_grad():
        fast.get_parameter("omega").add_(6 * math.pi / (X[1] - X[0]))
    _, again = solved(fast, tensor(X), tensor(y))
    assert np.abs(read(again)[0] - read(slow)[0]).max() < 1e-8


def test_from_the_models_parameters_where_there_is_no_grid() -> None:
    """Several inputs have no pencil: Newton goes down from where the model is."""
    truth = fresh(2, inputs=2, outputs=2)
    x = gaussian(80, 2)
    model = copy.deepcopy(truth)
    with torch.no_grad():
        for index, p in enumerate(model.parameters()):
            p += 0.05 * gaussian(*p.shape, seed=index)
    root, moved = solved(model, x, truth(x).detach())
    assert root.definite
    for name, p in moved.named_parameters():
        assert float((p - truth.get_parameter(name)).detach().abs().max()) < 1e-10


# ---- saddles ---------------------------------------------------------------------------------------------------------


def test_a_saddle_is_reported() -> None:
    """Two linear layers of zeros, the mean in the last bias: every derivative is 0, and the curvature of two signs."""
    x, y = gaussian(30, 4), gaussian(30, 3, seed=1)
    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 3)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model[1].bias.copy_(y.mean(0))
    root = steepest.infinite_descent(model, x, y)
    assert root.gradient_norm < 1e-14
    assert root.definite is False
    assert root.iterations == 0
    assert not any(step.any() for step in root.delta.values())


def test_beside_a_saddle_the_lower_root_is_taken() -> None:
    """omega = 0 between two symmetric minima."""
    model = fresh(1)
    model.alpha.requires_grad_(False)
    model.sine.requires_grad_(False)
    with torch.no_grad():
        model.omega.zero_()
        model.sine.zero_()
    x = tensor(np.linspace(-1, 1, 41))
    root, moved = solved(model, x, torch.cos(3 * x))
    assert root.definite
    assert abs(moved.get_parameter("omega").item()) == pytest.approx(3, abs=1e-10)


# ---- polynomials -----------------------------------------------------------------------------------------------------


def test_a_quadratic_loss_takes_one_newton_step() -> None:
    x, y = gaussian(40, 5), gaussian(40, 3, seed=1)
    root, model = solved(nn.Linear(5, 3).double(), x, y)
    ones = torch.cat([x, torch.ones(40, 1, dtype=torch.float64)], 1)
    wanted = torch.linalg.lstsq(ones, y).solution.mT
    assert (root.iterations, root.definite) == (1, True)
    assert gap(torch.cat([model.weight, model.bias[:, None]], 1).detach(), wanted) < 1e-12  # type: ignore[index]


def test_more_parameters_than_data_is_one_step_to_one_of_many() -> None:
    x, y = gaussian(5, 9), gaussian(5, 1, seed=1)
    root, model = solved(nn.Linear(9, 1).double(), x, y)
    assert (root.iterations, root.definite) == (1, None)
    assert gap(model(x).detach(), y) < 1e-12


def test_products_of_layers_reach_the_least_squares_fit() -> None:
    """Its minima are no points: W2 A, A^-1 W1 are one model."""
    x, y = gaussian(30, 5), gaussian(30, 3, seed=1)
    ones = torch.cat([x, torch.ones(30, 1, dtype=torch.float64)], 1)
    least = float((ones @ torch.linalg.lstsq(ones, y).solution - y).square().mean())
    for seed in range(4):
        torch.manual_seed(seed)
        root, model = solved(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double(), x, y)
        assert root.gradient_norm < 1e-10
        assert root.definite is None
        assert float((model(x) - y).square().mean().detach()) == pytest.approx(least, rel=1e-10)


class Quadratic(nn.Module):
    """A bilinear form of two inputs and a square of one, through operations and not modules."""

    def __init__(self) -> None:
        super().__init__()
        self.form = nn.Parameter(torch.randn(3, 3))
        self.inside = nn.Parameter(torch.randn(3))
        self.outside = nn.Parameter(torch.randn(1))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.einsum("ni,ij,nj->n", a, self.form, b) + self.outside * (a @ self.inside) ** 2


def test_a_polynomial_of_any_shape_is_solved() -> None:
    torch.manual_seed(3)
    truth, a, b = Quadratic().double(), gaussian(60, 3), gaussian(60, 3, seed=1)
    y = truth(a, b).detach()
    torch.manual_seed(4)
    root, model = solved(Quadratic().double(), (a, b), y)
    assert root.gradient_norm < 1e-10
    assert float((model(a, b) - y).abs().max().detach()) < 1e-10


# ---- what it saves ---------------------------------------------------------------------------------------------------


def test_gradients_asked_for_beside_descent_and_newton_cg() -> None:
    """A exp(alpha x) cos(omega x + phi), from a start in the basin of the optimum, to a gradient of 1e-8."""
    z, c = np.array([-0.2 + 2.0j]), np.array([1.2 * np.exp(0.4j)])
    y = signal(z, c)
    theta = np.array([-0.1, 2.1, 0.8, 0.1])
    counted = 0

    def loss(t: NDArray[np.float64]) -> float:
        return float(np.mean(real_residual(t, y) ** 2))

    def gradient(t: NDArray[np.float64]) -> NDArray[np.float64]:
        nonlocal counted
        counted += 1
        return 2 / len(X) * real_slopes(t, y).T @ real_residual(t, y)

    at = theta.copy()
    while np.linalg.norm(g := gradient(at)) > 1e-8 and counted < 5000:
        step = 1.0
        while loss(at - step * g) > loss(at) - 0.5 * step * float(g @ g):
            step /= 2
        at = at - step * g
    descent, counted = counted, 0
    found = minimize(loss, theta, jac=gradient, method="Newton-CG", options={"xtol": 1e-12, "maxiter": 200})
    newton_cg = counted
    assert np.linalg.norm(gradient(found.x)) < 1e-6

    model = fresh(1)
    with torch.no_grad():
        for name, value in zip(NAMES, theta):
            getattr(model, name).fill_(value)
    root, moved = solved(model, tensor(X), tensor(y))
    assert root.gradient_norm < 1e-8
    assert np.abs(read(moved)[0] - z).max() < 1e-10
    assert root.iterations == 1 < 10 < newton_cg < descent


# ---- heads on a frozen backbone --------------------------------------------------------------------------------------


def backbone(outputs: int) -> nn.Sequential:
    torch.manual_seed(7)
    layers = nn.Sequential(nn.Linear(3, 16), nn.BatchNorm1d(16), nn.ReLU(inplace=True), nn.Linear(16, outputs))
    return layers.requires_grad_(False)


def test_an_exponential_head_is_refitted_on_a_frozen_backbone() -> None:
    """Its inputs are no grid. The head of before, moved by a tenth, finds the new data's."""
    features, x = backbone(1), gaussian(200, 3).float()
    truth = steepest.AION(2)
    with torch.no_grad():
        for name, values in {"alpha": (-0.5, 0.2), "omega": (2, 5), "cosine": (1, 0.5), "sine": (0.3, -0.7)}.items():
            p = truth.get_parameter(name)
            p.copy_(torch.tensor(values).reshape(p.shape))
        y = truth.double()(features.double()(x.double()))
        features.float()
    model = nn.Sequential(features, copy.deepcopy(truth).float())
    with torch.no_grad():
        for p in model[1].parameters():
            p.mul_(1.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    root = steepest.infinite_descent(model, x, y)
    assert root.delta.keys() == {"1.alpha", "1.omega", "1.cosine", "1.sine"}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert root.definite
    assert root.gradient_norm < 1e-6
    refitted = model.double()
    root.apply(refitted)
    z, c = read(model[1])
    wanted = read(truth)
    assert np.abs(z - wanted[0]).max() < 1e-4  # as far as the backbone is the same in fp32 and fp64
    assert np.abs(c - wanted[1]).max() < 1e-4


def test_a_linear_head_is_refitted_in_one_step() -> None:
    features, x, y = backbone(6).double(), gaussian(50, 3), gaussian(50, 2, seed=1)
    root, model = solved(nn.Sequential(features, nn.Linear(6, 2).double()), x, y)
    h = torch.cat([features(x), torch.ones(50, 1, dtype=torch.float64)], 1)
    assert root.iterations == 1
    assert gap(model(x).detach(), h @ torch.linalg.pinv(h) @ y) < 1e-10


def test_an_aion_trains_as_any_module() -> None:
    torch.manual_seed(0)
    model, x = steepest.AION(3), torch.linspace(0, 3, 50)[:, None]
    y = torch.exp(-x) * torch.cos(4 * x)
    optimizer = steepest.Adam(model, lr=3e-2)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    other = steepest.AION(3)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    assert repr(other) == "AION(units=3, inputs=1, outputs=1)"
