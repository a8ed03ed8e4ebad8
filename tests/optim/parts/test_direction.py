"""Directions: <x, d> is the dual norm, d has length 1, and nothing of length 1 goes further."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import steepest
from steepest.linalg.schatten import compute_dtype
from steepest.parts.direction import Columns, Direction, Frobenius, Nuclear, OneHot, Rows, Schatten, Sign, Spectral
from steepest.recipe import Recipe
from support.problems import FEW, SVD, gap, gaussian, polar_by_svd
from support.training import both_backends, give_gradients, made, parameters


def largest_entry(x: Tensor) -> Tensor:
    flat = x.flatten(-2)
    hot = torch.nn.functional.one_hot(flat.abs().argmax(-1), flat.shape[-1])
    return (hot * flat.sign()).reshape(x.shape)


def unit_along(dim: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x / x.square().sum(dim=dim, keepdim=True).sqrt()


def leading_pair(x: Tensor) -> Tensor:
    u, _, vt = torch.linalg.svd(x, full_matrices=False)
    return u[..., :1] @ vt[..., :1, :]


def by_p(p: float, direction: Direction) -> Row:
    q = p / (p - 1)

    def norm(x: Tensor, power: float) -> Tensor:
        return (torch.linalg.svdvals(x) ** power).sum(-1) ** (1 / power)

    def formula(x: Tensor) -> Tensor:
        u, s, vt = torch.linalg.svd(x, full_matrices=False)
        s = torch.where(s > 1e-12 * s[..., :1], s, 0) / norm(x, q)[..., None]
        return (u * s.unsqueeze(-2) ** (q - 1)) @ vt

    return direction, lambda x: norm(x, p), lambda x: norm(x, q), formula


# direction, base norm, dual norm, the direction's own formula: each written apart from the library
Row = tuple[Direction, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
TABLE: dict[str, Row] = {
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
    "one hot": (OneHot(), lambda x: x.abs().sum((-2, -1)), lambda x: x.abs().amax((-2, -1)), largest_entry),
    "rows": (
        Rows(),
        lambda x: x.square().sum(-1).sqrt().amax(-1),
        lambda x: x.square().sum(-1).sqrt().sum(-1),
        unit_along(-1),
    ),
    "columns": (
        Columns(),
        lambda x: x.square().sum(-2).sqrt().amax(-1),
        lambda x: x.square().sum(-2).sqrt().sum(-1),
        unit_along(-2),
    ),
    "nuclear": (
        Nuclear(),
        lambda x: torch.linalg.svdvals(x).sum(dim=-1),
        lambda x: torch.linalg.svdvals(x)[..., 0],
        leading_pair,
    ),
    "schatten 4/3": by_p(4 / 3, Schatten(4 / 3, "eigh")),
    "schatten 2": by_p(2, Schatten(2)),
    "schatten 2.5": by_p(2.5, Schatten(2.5)),
    "schatten 4": by_p(4, Schatten(4, "eigh")),
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


def test_of_equal_entries_the_first_is_taken() -> None:
    x = torch.tensor([[1.0, -3.0, 2.0], [3.0, -3.0, 0.0]])
    assert OneHot().unit(x).tolist() == [[0.0, -1.0, 0.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("direction, dim", [(Rows(), 1), (Columns(), 0)])
def test_a_zero_row_or_column_stays_zero_beside_others(direction: Direction, dim: int) -> None:
    x = gaussian(4, 5)
    x.select(1 - dim, 2).zero_()
    lengths = direction.unit(x).norm(dim=dim)
    assert lengths[2] == 0
    assert gap(lengths[[0, 1, 3]], torch.ones(3)) < 1e-14


@pytest.mark.parametrize("direction", [direction for direction, *_ in TABLE.values()], ids=TABLE)
@pytest.mark.parametrize("c", [1e-30, 1e-12, 7.0, 1e30])
def test_a_direction_has_degree_zero_and_its_dual_norm_degree_one(direction: Direction, c: float) -> None:
    x = gaussian(4, 6)
    d, n = direction(x)
    far, longer = direction(c * x)
    assert gap(far, d) < 1e-12
    assert gap(longer, c * n) < 1e-12


@pytest.mark.parametrize("direction", [direction for direction, *_ in TABLE.values()], ids=TABLE)
def test_a_batch_is_its_matrices_and_a_transpose_is_a_transpose(direction: Direction) -> None:
    x = gaussian(3, 4, 6)
    for one, d in zip(x, direction.unit(x), strict=True):
        assert gap(d, direction.unit(one)) < 1e-13
    across = {Rows(): Columns(), Columns(): Rows()}.get(direction, direction)
    assert gap(across.unit(x.mT), direction.unit(x).mT) < 1e-12


# ---- Schatten: the ends, products, what a plan asks ----------------------------------------------------------------


def test_the_ends_of_schatten_are_the_named_norms() -> None:
    x = gaussian(5, 8)
    assert gap(Schatten(1).unit(x), Nuclear().unit(x)) == 0
    assert gap(Schatten(2).unit(x), Frobenius().unit(x)) < 1e-14
    assert gap(Schatten(math.inf).unit(x), Spectral().unit(x)) == 0
    assert gap(Schatten(math.inf, "eigh").unit(x), SVD.unit(x)) < 1e-12


# p: how far the direction by products is from the exact one, its length from 1, and its dual norm from the exact one;
# Gaussian matrices, fp32
NEAR = {1.5: (0.005, 1e-3, 1e-3), 3.0: (0.025, 0.01, 0.01), 4.0: (0.03, 1e-5, 1e-3), 8.0: (0.055, 1e-5, 5e-3)}


@pytest.mark.parametrize("p", NEAR)
@pytest.mark.parametrize("shape", [(40, 40), (30, 90), (90, 30), (3, 20, 24)])
def test_products_are_near_the_exact_direction(p: float, shape: tuple[int, ...]) -> None:
    x = gaussian(*shape)
    d, n = Schatten(p, "matmul")(x.float())
    _, norm, dual, formula = by_p(p, Schatten(p))
    relative, length, short = NEAR[p]
    wanted = formula(x)
    assert (d - wanted).norm() < relative * wanted.norm()
    assert gap(norm(d.double()), torch.ones(shape[:-2])) < length
    assert gap(n[..., 0, 0], dual(x)) < short


def test_schatten_is_captured_where_it_takes_products() -> None:
    for p, captured in {1: True, 2: True, 4 / 3: True, 1.5: False, 4: False, 5: False}.items():
        for device in map(torch.device, ("cuda", "cpu")):
            for dtype in (torch.bfloat16, torch.float32, torch.float64):
                assert Schatten(p).capturable(dtype, device) is captured
                assert not Schatten(p, "eigh").capturable(dtype, device)
    assert Schatten(4, "matmul").capturable(torch.float64, torch.device("cpu"))


def test_a_solver_is_checked_before_the_first_step_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    module, gpu = importlib.import_module("steepest.step.warm_up"), torch.device("cuda")
    prepared: list[Any] = []
    monkeypatch.setattr(module, "prepare", lambda families, device: prepared.append((families, device)))
    module.warm_up(Schatten(4), (8, 4), torch.float32, gpu)
    module.warm_up(Spectral("svd"), (8, 4), torch.float32, gpu)
    assert prepared == [(("eigenvectors",), gpu), ((), gpu)]


def test_the_sizes_of_schatten() -> None:
    cpu, half = torch.device("cpu"), torch.device("cuda")
    for p in (1, 4, 5):
        for device in (cpu, half):
            assert Schatten(p).compute_dtype(torch.float32, device) == compute_dtype(p, torch.float32, device)
    assert Schatten(4, "eigh").compute_dtype(torch.float32, half) == torch.float32
    assert Schatten(4, "matmul").compute_dtype(torch.float32, half) == torch.float16
    bf16 = torch.bfloat16
    for p, method, dtype, work in ((4, "matmul", bf16, bf16), (5, "auto", torch.float32, torch.float64)):
        wide = torch.promote_types(work, torch.float32)  # in which X is had once more
        spectral = Spectral().workspace_bytes(8, 12, work)
        assert Schatten(p, method).workspace_bytes(8, 12, dtype) == spectral + 8 * 12 * wide.itemsize
    assert Schatten(math.inf).workspace_bytes(8, 12, bf16) == Spectral().workspace_bytes(8, 12, bf16)


@pytest.mark.parametrize(
    "p, method, message",
    [
        (0.9, "auto", "p must be at least 1, got 0.9"),
        (4, "newton", "method 'newton' is not known; choose one of auto, matmul, eigh"),
        (5, "matmul", "p = 5 has no products: choose one of 1, 1.5, 2, 3, 4, 6, 8, inf, or method='auto'"),
    ],
)
def test_schatten_says_at_once_what_it_cannot_take(p: float, method: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schatten(p, method)


def test_the_scaled_frobenius_step_is_the_gradient_itself() -> None:
    x = gaussian(3, 4)
    assert Frobenius().scaled(x) is x


def test_the_spectral_direction_says_how_far_its_bound_was() -> None:
    """||X||_F over the bound, between 1 and the ratio of the two norms."""
    xs = [gaussian(2, 6, 9).float(), gaussian(3, 5, 5).float()]
    slacks, alone = ([torch.full((len(x),), math.nan) for x in xs] for _ in range(2))
    ds = Spectral().units(xs, slacks)
    for x, d, slack, one in zip(xs, ds, slacks, alone, strict=True):
        assert torch.equal(Spectral().unit(x, slack=one), d)
        assert torch.equal(one, slack)
        most = torch.linalg.matrix_norm(x) / torch.linalg.matrix_norm(x, 2)
        assert bool(((slack >= 1 - 1e-6) & (slack <= most * (1 + 1e-5))).all())


def test_a_base_norm_must_say_its_direction() -> None:
    with pytest.raises(NotImplementedError):
        Direction().unit(gaussian(2, 2))


@dataclass(frozen=True)
class LargestRow(Direction):
    """`Rows` as somebody writes it who has read that a norm gives `unit`."""

    def unit(self, x: Tensor) -> Tensor:
        return unit_along(-1)(x)


class ByLargestRow(steepest.Muon):
    def recipe(self, group: dict[str, Any]) -> Recipe:
        return replace(super().recipe(group), direction=LargestRow())


@both_backends
def test_a_norm_that_gives_its_direction_alone_is_stepped(backend: str) -> None:
    """By the fused ops and by torch's, in directions that are lengths of rows."""
    params = parameters([(6, 4), (6, 4), (3, 5)], torch.float64)
    optimizer = made(ByLargestRow, params, lr=0.1, weight_decay=0.0, adjust_lr_fn="original", backend=backend)
    start = [p.detach().clone() for p in params]
    give_gradients(params, 0)
    optimizer.step()
    for p, w in zip(params, start, strict=True):
        step = 0.1 * max(1.0, p.shape[0] / p.shape[1]) ** 0.5
        torch.testing.assert_close(w - p.detach(), step * unit_along(-1)(p.grad), rtol=1e-9, atol=1e-12)
