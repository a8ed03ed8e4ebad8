"""The work that the cost model says, against the products that torch is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

import steepest
from steepest.linalg.basis import eigh_refresh, refresh_work
from steepest.linalg.polar import CPU_CHUNK, choose, choose_sharded, polar, polar_flop, sharded_polars
from steepest.linalg.roots import ROOT_ORDERS, inverse_root, inverse_root_flop
from steepest.linalg.schatten import schatten, schatten_work
from steepest.linalg.work import Work
from steepest.ops import backend, eigh
from steepest.parts import Diagonal, Frobenius, Hyper, Momentum, Roots, Rotated, Sides, Spectral
from steepest.parts.precondition.kronecker import Kronecker
from steepest.recipe import Recipe
from steepest.step.costs import cost, matrix_work
from steepest.tools import planner
from steepest.tools.bench import counting

HYPER = Hyper(lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8)
#: torch multiplies symmetric products in full, n^2 of what is n (n + 1) / 2.
HALF = 0.5


@pytest.fixture(autouse=True)
def products_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """One by one, so that they can be counted."""
    monkeypatch.setattr(backend, "forced", "torch")


def flop_of(call: Callable[[], object]) -> float:
    """The work of a second call: the first one of a process looks at how BLAS adds up."""
    call()
    return counting.flop_of(call)


@pytest.mark.parametrize("preset", ["auto", "turbo", "jordan", "you", "polar_express"])
@pytest.mark.parametrize("shape", [(256, 1024), (1024, 256), (512, 512)])
def test_a_polar_factor_takes_what_the_planner_says(preset: str, shape: tuple[int, int]) -> None:
    choice = choose(*shape, preset, device="cuda")
    planned = planner.plan([planner.Stack(1, *shape)], preset)
    assert Spectral(preset).work(*shape, torch.float32, "cuda") == Work(polar_flop(choice, *shape))
    if planned.calls[0].form != "small":
        assert polar_flop(choice, *shape) == planned.totals()["asked_flop"]


@pytest.mark.parametrize("preset", ["auto", "turbo", "jordan"])
def test_a_polar_factor_against_torchs_products(preset: str) -> None:
    """Where symmetric products are taken in full, as "jordan" does but in fp32."""
    x, dtype = torch.randn(2, 48, 160), torch.float64 if preset == "jordan" else torch.float32
    assert x.numel() < CPU_CHUNK
    counted = flop_of(lambda: polar(x, preset, dtype=dtype)) / 2
    said = polar_flop(choose(48, 160, preset, device="cpu", dtype=dtype), 48, 160)
    assert said == counted if preset == "jordan" else HALF * counted < said < counted


def test_a_part_of_a_sharded_matrix() -> None:
    """The squares are whole, and the rest is that of the part: two parts cost the whole and the squares once more."""
    choice = choose_sharded(96, device="cpu")
    squares = polar_flop(choice, 0, 96, True)
    whole = polar_flop(choice, 1000, 96)
    assert polar_flop(choice, 700, 96, True) + polar_flop(choice, 300, 96, True) == whole + squares
    assert polar_flop(choice, 50, 96, True) < polar_flop(choice, 60, 96, True)
    assert polar_flop(choice, 96, 50, False) == polar_flop(choice, 50, 96, True)
    counted = flop_of(lambda: sharded_polars([torch.randn(2, 50, 96)], [-2], lambda t: None)) / 2
    assert HALF * counted < polar_flop(choice, 50, 96, True) < counted


@pytest.mark.parametrize("method", ["jr", "qr", "qr_sorted", "eigh"])
def test_a_refresh(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eigh, "iterates", lambda P: False)  # in torch ops, which are counted
    n = 64
    turned = torch.linalg.qr(torch.eye(n) + 0.02 * torch.randn(n, n)).Q
    factor = turned @ torch.diag(torch.linspace(1, 2, n)) @ turned.mT
    counted = flop_of(lambda: eigh_refresh(factor[None], torch.eye(n)[None], method=method))  # type: ignore[arg-type]
    said = refresh_work(n, method)  # type: ignore[arg-type]
    assert said.wide == pytest.approx(counted, rel=0.01)
    assert (said.solver > 0) == (method != "jr")


@pytest.mark.parametrize("p", ROOT_ORDERS)
@pytest.mark.parametrize("ridge", [1e-6, 1e-3])
def test_an_inverse_root(p: int, ridge: float) -> None:
    x = torch.randn(40, 80)
    counted = flop_of(lambda: inverse_root((x @ x.mT)[None], p, ridge_rel=ridge)) - 2 * 40 * 40 * 80
    assert inverse_root_flop(40, p, ridge_rel=ridge) == counted


@pytest.mark.parametrize("p", [1, 4 / 3, 1.5, 2, 3, 4, 6, 8, math.inf, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_schatten_direction(p: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steepest.linalg.polar.choice.cpu_bf16", "1" if dtype == torch.bfloat16 else "0")
    x = torch.randn(2, 48, 128).to(dtype)
    for method in ("auto", "matmul" if p != 5 else "eigh"):
        counted = flop_of(lambda method=method: schatten(x, p, method=method)) / 2
        said = schatten_work(p, 48, 128, dtype, "cpu", method=method)
        assert HALF * 0.8 * counted <= said.narrow + said.wide <= 1.05 * counted
        assert (said.solver > 0) == (p == 5 or (method == "auto" and p in (1.5, 3, 4, 6, 8)))


PARTS: dict[str, Kronecker] = {
    "SOAP": Rotated(inner=Diagonal(), method="jr"),
    "SPlus": Rotated(method="jr"),
    "Shampoo": Rotated(inner=Sides(), method="jr", side="smaller"),
    "KL": Rotated(inner=Diagonal(), coupling=Sides(values="average"), method="jr"),
    "newton": Roots(exponent=0.5),
    "newton, coupled": Roots(exponent=0.5, coupling=True),
    "one side": Rotated(inner=Diagonal(), max_dim=32, method="jr"),
    "blocks": Rotated(inner=Diagonal(), max_dim=16, blocks=True, method="jr"),
}


@pytest.mark.parametrize("name", PARTS)
def test_factors(name: str) -> None:
    """A step's products, and those of a refresh, against torch's."""
    part, g = PARTS[name], torch.randn(1, 24, 48)
    state = part.init(g)
    for _ in range(2):  # after the first gradient everything is in use
        state |= part.update_factors(state, g, HYPER)
        state |= part.refresh(part.gather([state]), [state])[0]
        state |= part.commit(state)
    step = torch.tensor(2.0)

    def turns() -> None:
        part.observe(state, g, HYPER)
        part.back(state, part.into(state, g, HYPER, step), HYPER, step)

    blocks, rows, cols = part.input_shape((1, 24, 48))
    lengths = part.factor_lengths(rows, cols)
    learn = flop_of(lambda: part.update_factors(state, g, HYPER))
    of_factors = blocks * sum(2 * n * n * k for n, k in zip(lengths, (cols, rows)))  # torch takes all of it
    every_step = learn - of_factors + flop_of(turns)
    assert blocks * part.turns_flop(rows, cols, *lengths) == every_step
    refresh = flop_of(lambda: part.refresh(part.gather([state]), [state]))
    said = sum(part.refresh_work(n, "cpu").wide for n in lengths) * blocks
    assert said == pytest.approx(refresh, rel=0.1)
    whole = part.work(24, 48, "cpu").wide
    learned = blocks * sum(n * (n + 1) * k for n, k in zip(lengths, (cols, rows)))
    assert whole == pytest.approx(every_step + learned + said / part.every, abs=blocks)


def test_the_state_has_the_factors_that_are_counted() -> None:
    for part in PARTS.values():
        _, rows, cols = part.input_shape((1, 24, 48))
        state = part.init(torch.zeros(1, 24, 48))
        found = [state[key].shape[-1] if state[key].numel() else 0 for key in ("left", "right")]
        assert found == list(part.factor_lengths(rows, cols))


def test_recipes() -> None:
    """Of every class: a cost above 0, larger for a larger matrix, and more often a refresh is more."""
    model = torch.nn.Linear(24, 16, bias=False)
    for cls in (steepest.Muon, steepest.MuAdam, steepest.SOAP, steepest.KLShampoo, steepest.SPlus, steepest.Shampoo):
        optimizer = cls(model)
        recipe = optimizer.recipe(optimizer.param_groups[0])
        assert 0 < cost(recipe, 256, 512) < cost(recipe, 512, 512) < cost(recipe, 512, 1024)
    often, seldom = (Recipe(precondition=Rotated(every=every, method="jr")) for every in (1, 100))
    assert matrix_work(often, 64, 64).wide > 2 * matrix_work(seldom, 64, 64).wide


def test_a_direction_works_on_blocks() -> None:
    rotated = Rotated(max_dim=64, blocks=True)
    recipe = Recipe(Momentum(), rotated, Spectral())
    blocks = 8 * Spectral().work(64, 64, torch.float32, "cuda").narrow
    assert matrix_work(recipe, 128, 256).narrow == blocks
    assert matrix_work(Recipe(Momentum(), rotated, Frobenius()), 128, 256).narrow == 0


def test_costs_weigh_what_is_slow() -> None:
    assert Work(10, 10, 10).flop == 30
    assert Work(1).cost < Work(0, 1).cost < Work(0, 0, 1).cost
    assert Work(3, 5, 7).times(2).shared_out(2) == Work(3, 5, 7)
