"""The methods with bases: what theory says of them, and when they refresh. Their published rules are in tests/papers.

fp64 and the exact polar factor throughout, but for what is about rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import steepest
from steepest.matrices import pieces
from steepest.parts.precondition import rotated
from steepest.parts.precondition.roots import RESIDUALS
from steepest.recipe import CLOCK, Recipe, State, step_one
from steepest.zoo.kronecker import KroneckerOptimizer
from support.problems import SHAPES
from support.references import gap, gaussian, gradients, polar_by_svd, trained
from support.slow import slow
from support.training import KRONECKER, noise

Maker = type[KroneckerOptimizer]
every_class = pytest.mark.parametrize("cls", KRONECKER)


# ---- all parameters at once are one after the other -----------------------------------------------------------------

HOW = {
    "shampoo": (steepest.Shampoo, {}),
    "shampoo, averages": (steepest.Shampoo, {"shampoo_beta": 0.9, "graft": None}),
    "shampoo, blocks": (steepest.Shampoo, {"max_preconditioner_dim": 3}),
    "shampoo, spectral": (steepest.Shampoo, {"norm": "spectral", "polar": "svd"}),
    "one-sided": (steepest.OneSidedShampoo, {}),
    "one-sided, cautious": (steepest.OneSidedShampoo, {"cautious_wd": True}),
    "kl-shampoo": (steepest.KLShampoo, {}),
    "kl-shampoo, blocks": (steepest.KLShampoo, {"max_preconditioner_dim": 4, "block_preconditioner": True}),
    "soap": (steepest.SOAP, {}),
    "soap, authors": (steepest.SOAP, {"parity": "authors"}),
    "soap, short sides": (steepest.SOAP, {"max_preconditioner_dim": 4}),
    "soap, blocks": (steepest.SOAP, {"max_preconditioner_dim": 4, "block_preconditioner": True}),
    "soap, spectral": (steepest.SOAP, {"norm": "spectral", "polar": "svd"}),
    "soap, sign": (steepest.SOAP, {"norm": "sign", "refresh": "eigh"}),
    "kl-soap": (steepest.KLSOAP, {}),
    "kl-soap, short sides": (steepest.KLSOAP, {"max_preconditioner_dim": 4, "refresh": "qr"}),
    "splus": (steepest.SPlus, {"average_rate": 0.0}),
    "shampoo, newton roots": (steepest.Shampoo, {"inverse_root": "newton", "max_preconditioner_dim": 3}),
    "one-sided, newton roots": (steepest.OneSidedShampoo, {"inverse_root": "newton", "norm": "sign"}),
    "kl-shampoo, newton roots": (steepest.KLShampoo, {"inverse_root": "newton", "refresh_delay": 1}),
    "shampoo, delayed": (steepest.Shampoo, {"refresh_delay": 1, "parity": "authors"}),
    "kl-shampoo, delayed": (steepest.KLShampoo, {"refresh_delay": 4}),
    "soap, delayed": (steepest.SOAP, {"refresh_delay": 2}),
    "soap, authors, delayed": (steepest.SOAP, {"refresh_delay": 3, "parity": "authors"}),
    "splus, delayed": (steepest.SPlus, {"refresh_delay": 2, "average_rate": 0.0}),
    "soap, bf16 factors": (steepest.SOAP, {"factor_dtype": torch.bfloat16, "refresh_delay": 1}),
}
SHAPES_OF_ALL = {
    **{key: SHAPES[key] for key in SHAPES if key != "empty"},
    "square experts": ((4, 4, 4), {"batch_dims": 1}),
}
SHAPES_OF_A_FEW = {key: SHAPES_OF_ALL[key] for key in ("tall", "conv", "split experts", "square experts")}
ON_ALL_SHAPES = ("shampoo, blocks", "kl-soap")
#: Roots by both ways, bases whole and in blocks, one side, moments in a basis, an average, what waits. The others are
#: these crossed.
EACH_WAY = (
    *("shampoo", "shampoo, blocks", "one-sided", "kl-shampoo, newton roots", "soap, blocks", "soap, authors, delayed"),
    *("soap, spectral", "kl-soap, short sides", "splus, delayed"),
)


def own_state(state: State, recipe: Recipe, number: int, view: Callable[[Tensor], Tensor], p: Tensor) -> State:
    """The state of one piece, as `step_one` names and shapes it."""
    names = recipe.names(number)
    shared = {key: t for key, t in state.items() if key in recipe.keys and key not in names}
    return {
        **{key: view(t) if t.shape == p.shape else t for key, t in shared.items()},
        **{key: state[name] for key, name in names.items()},
    }


@pytest.mark.parametrize("name", [name if name in EACH_WAY else slow(name) for name in HOW])
def test_a_step_of_all_is_step_one_of_each(name: str) -> None:
    """A residual is a distance from the identity, all of it rounding here: its bound is absolute."""
    (cls, options), shapes = HOW[name], SHAPES_OF_ALL if name in ON_ALL_SHAPES else SHAPES_OF_A_FEW
    params = [torch.nn.Parameter(gaussian(*shape, seed=i)) for i, (shape, _) in enumerate(shapes.values())]
    groups = [{"params": [p], "use_muon": True, **how} for p, (_, how) in zip(params, shapes.values())]
    optimizer = cls(groups, lr=0.02, weight_decay=0.1, precondition_frequency=4, **options)
    recipes = [optimizer.recipe(group) for group in optimizer.param_groups]
    hypers = [optimizer.hyper(group) for group in optimizer.param_groups]
    alone: list[list[tuple[Tensor, State]]] = []
    read = [pieces(shape, **how) for shape, how in shapes.values()]
    for p, recipe, parts in zip(params, recipes, read):
        views = [piece.view(p.detach()).reshape(piece.shape).clone() for piece in parts]
        alone.append([(w, recipe.init(w)) for w in views])
    for step in range(14):  # refreshes in steps 4, 8 and 12, the last delayed one taken in step 12
        for i, p in enumerate(params):
            if step < i % 3 or step == 9 + i % 2:  # late, or missing for once
                p.grad = None
                continue
            p.grad = gaussian(*p.shape, seed=100 * step + i)
            for k, piece in enumerate(read[i]):
                g = piece.view(p.grad).reshape(piece.shape)
                alone[i][k] = step_one(recipes[i], alone[i][k][0], g, alone[i][k][1], hypers[i])
        optimizer.step()
    for i, p in enumerate(params):
        for k, piece in enumerate(read[i]):
            w, wanted = alone[i][k]
            assert gap(piece.view(p.detach()).reshape(piece.shape), w) < 1e-10, (tuple(p.shape), k)
            found = own_state(optimizer.state[p], recipes[i], k, piece.view, p)
            assert found.keys() == wanted.keys()
            for key, t in wanted.items():
                assert found[key].dtype == t.dtype
                if key in RESIDUALS:
                    torch.testing.assert_close(found[key].reshape(t.shape), t, rtol=0, atol=1e-10)
                    continue
                assert gap(found[key].reshape(t.shape), t) < 1e-8, key


def test_a_piece_sees_its_own_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a parameter that is read as several matrices, under the names of one."""
    seen, learn = [], rotated.Rotated.update_factors

    def watched(self: Any, state: State, g: Tensor, hyper: Any) -> State:
        seen.append((set(state), state["left"].shape[-1]))
        return learn(self, state, g, hyper)

    monkeypatch.setattr(rotated.Rotated, "update_factors", watched)
    p = torch.nn.Parameter(gaussian(9, 4))
    optimizer = steepest.SOAP([{"params": [p], "split_sizes": (4, 3, 2)}])
    p.grad = gaussian(9, 4, seed=1)
    optimizer.step()
    assert seen == [(set(optimizer.recipe(optimizer.param_groups[0]).keys), n) for n in (4, 3, 2)]


SIZES = pytest.mark.parametrize("shape", [(8, 5), (5, 8), (6, 6)], ids=str)
STEPS = 50

# ---- identities -----------------------------------------------------------------------------------------------------

WITHOUT = {"max_preconditioner_dim": 1}


def test_soap_without_factors_is_adam_after_the_first_step() -> None:
    grads = list(gradients(STEPS, 8, 5))
    start = gaussian(8, 5, seed=9)
    found = trained(steepest.SOAP, iter(grads), start, lr=0.01, betas=(0.9, 0.95), eps=0.0, weight_decay=0.1, **WITHOUT)
    wanted = trained(torch.optim.AdamW, iter(grads[1:]), start, lr=0.01, betas=(0.9, 0.95), eps=0.0, weight_decay=0.1)
    assert gap(found, wanted) < 1e-12


@pytest.mark.parametrize("cls", [steepest.SOAP, steepest.KLSOAP])
@pytest.mark.parametrize("parity", [None, "authors"])
def test_a_first_step_that_moves_is_adams(cls: Maker, parity: str | None) -> None:
    """And makes the bases, in which the next ones are stepped. Without bias corrections it is longer."""
    grads, start = list(gradients(3, 8, 5)), gaussian(8, 5, seed=9)
    values: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.0, "eps": 0.0}
    options = {**values, "parity": parity, "first_step": "move"}
    once = trained(cls, iter(grads[:1]), start, **options)
    wanted = trained(torch.optim.AdamW, iter(grads[:1]), start, **values)
    longer = 0.1 / 0.05**0.5 if parity and cls is steepest.KLSOAP else 1.0
    assert gap(once - start, longer * (wanted - start)) < 1e-12
    skipped = trained(cls, iter(grads[:2]), start, **{**options, "first_step": "skip"})
    moved = trained(cls, iter(grads[:2]), start, **options)
    assert torch.equal(trained(cls, iter(grads[:1]), start, **{**options, "first_step": "skip"}), start)
    assert (moved - once).norm() < 2 * (skipped - start).norm()


def test_kl_shampoo_may_move_in_its_first_step_too() -> None:
    """By ten times its momentum: values begin at .1."""
    (g,), start = gradients(1, 8, 5), gaussian(8, 5, seed=9)
    found = trained(
        steepest.KLShampoo, iter([g]), start, lr=1.0, betas=(0.9, 0.98), eps=0.0, weight_decay=0.0, first_step="move"
    )
    assert gap(start - found, 10 * 0.1 * g) < 1e-12
    with pytest.raises(ValueError, match="first_step 'later' is not known; use 'skip' or 'move' or None"):
        steepest.KLShampoo([torch.nn.Parameter(start)], first_step="later")


def test_kl_soap_without_factors_is_soap() -> None:
    options = {"lr": 1e-3, "betas": (0.9, 0.98), **WITHOUT}
    found, wanted = (
        trained(cls, gradients(20, 8, 5), gaussian(8, 5, seed=9), **options) for cls in (steepest.KLSOAP, steepest.SOAP)
    )
    assert torch.equal(found, wanted)


def test_soap_in_the_spectral_norm_without_factors_is_muadam_after_the_first_step() -> None:
    grads, start = list(gradients(20, 8, 5)), gaussian(8, 5, seed=9)
    shared = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1, "polar": "svd"}
    found = trained(steepest.SOAP, iter(grads), start, norm="spectral", **shared, **WITHOUT)
    assert gap(found, trained(steepest.MuAdam, iter(grads[1:]), start, **shared)) < 1e-12


def test_splus_without_factors_is_signum() -> None:
    w, m = gaussian(8, 5, seed=9), torch.zeros(8, 5, dtype=torch.float64)
    found = trained(steepest.SPlus, gradients(20, 8, 5), w, lr=0.1, weight_decay=0.1, betas=(0.9, 0.99), **WITHOUT)
    length = 0.1 * 2 / 13
    for g in gradients(20, 8, 5):
        m = 0.9 * m + 0.1 * g
        w = (1 - 0.1 * length) * w - length * m.sign()
    assert gap(found, w) < 1e-12


def of_singular_values(g: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    u, sigma, vh = torch.linalg.svd(g, full_matrices=False)
    return (u * f(sigma)) @ vh


AT_ONCE = {"weight_decay": 0.0, "precondition_frequency": 1, "refresh": "eigh", "lr": 1.0}


@SIZES
@pytest.mark.parametrize("refresh", ["eigh", "auto"])
def test_shampoo_without_accumulation_is_the_polar_factor(shape: tuple[int, int], refresh: str) -> None:
    """But for the ridge: singular values become s / (s^2 + 1e-6 max s^2)^1/2. One Jacobi rotation is not exact."""
    grads, start = list(gradients(4, *shape)), gaussian(*shape, seed=9)
    options = {**AT_ONCE, "refresh": refresh, "shampoo_beta": 0.0, "betas": (0.0, 0.9), "graft": None, "eps": 0.0}
    found = start - trained(steepest.Shampoo, iter(grads), start, **options)
    wanted = sum(of_singular_values(g, lambda s: s / (s**2 + 1e-6 * s[0] ** 2) ** 0.5) for g in grads)
    assert gap(found, wanted) < (1e-9 if refresh == "eigh" else 2e-2)
    assert gap(found, sum(map(polar_by_svd, grads))) < 3e-2


@SIZES
def test_one_sided_shampoo_without_accumulation_is_the_polar_factor(shape: tuple[int, int]) -> None:
    grads, start = list(gradients(4, *shape)), gaussian(*shape, seed=9)
    found = start - trained(steepest.OneSidedShampoo, iter(grads), start, **AT_ONCE, betas=(0.0, 0.0), eps=0.0)
    assert gap(found, sum(map(polar_by_svd, grads))) < 1e-9


@SIZES
def test_shampoo_in_the_spectral_norm_without_accumulation(shape: tuple[int, int]) -> None:
    """L^-1/8 polar(L^-1/8 g R^-1/8) R^-1/8: the polar factor divided by the root of the singular values."""
    grads, start = list(gradients(4, *shape)), gaussian(*shape, seed=9)
    options = {**AT_ONCE, "norm": "spectral", "polar": "svd", "adjust_lr_fn": "none"}
    both = {"shampoo_beta": 0.0, "betas": (0.0, 0.9), "graft": None, "eps": 0.0}
    found = start - trained(steepest.Shampoo, iter(grads), start, **options, **both)
    assert gap(found, sum(of_singular_values(g, lambda s: (s**2 + 1e-6 * s[0] ** 2) ** -0.25) for g in grads)) < 1e-9
    found = start - trained(steepest.OneSidedShampoo, iter(grads), start, **options, betas=(0.0, 0.0), eps=0.0)
    assert gap(found, sum(of_singular_values(g, lambda s: s**-0.5) for g in grads)) < 1e-9


def test_the_first_step_of_one_sided_shampoo_is_the_polar_factor() -> None:
    g, start = gaussian(8, 5), gaussian(8, 5, seed=9)
    found = start - trained(steepest.OneSidedShampoo, iter([g]), start, lr=1.0, weight_decay=0.0, eps=0.0)
    assert gap(found, polar_by_svd(g)) < 1e-12


# Adam's length, to which Shampoo's step is brought, is not that of a rotated gradient.
EQUIVARIANT: dict[str, tuple[Maker, dict[str, Any]]] = {
    "shampoo": (steepest.Shampoo, {"graft": None}),
    "one-sided": (steepest.OneSidedShampoo, {}),
    "kl-shampoo": (steepest.KLShampoo, {"betas": (0.9, 0.9)}),
    "soap": (steepest.SOAP, {}),
    "soap, authors": (steepest.SOAP, {"parity": "authors"}),
    "soap, spectral": (steepest.SOAP, {"norm": "spectral", "polar": "svd"}),
    "kl-soap": (steepest.KLSOAP, {}),
    "splus": (steepest.SPlus, {}),
}


def gap_of_rotated(cls: Maker, options: dict[str, Any], skipped: int = 0) -> float:
    """Between the path of W and that of Q_L W Q_R turned back, from step `skipped` on, over 30 steps."""
    n, left, right = 6, torch.linalg.qr(gaussian(6, 6, seed=50)).Q, torch.linalg.qr(gaussian(6, 6, seed=51)).Q
    paths = []
    for turn in (lambda t: t, lambda t: left @ t @ right):
        p = torch.nn.Parameter(turn(gaussian(n, n, seed=9)).clone())
        optimizer = cls([p], lr=0.1, weight_decay=0.0 if skipped else 0.1, precondition_frequency=5, **options)
        start = p.detach().clone()
        for step, g in enumerate(gradients(30, n, n)):
            start = p.detach().clone() if step == skipped else start
            p.grad = turn(g)
            optimizer.step()
        paths.append(p.detach() - start)
    return gap(left.mT @ paths[1] @ right.mT, paths[0])


@pytest.mark.parametrize("refresh", [slow("eigh"), "auto"])
@pytest.mark.parametrize("name", EQUIVARIANT)
def test_orthogonal_equivariance(name: str, refresh: str) -> None:
    """SPlus begins with the sign of the gradient's own entries."""
    cls, options = EQUIVARIANT[name]
    assert gap_of_rotated(cls, {"refresh": refresh, **options}, skipped=cls is steepest.SPlus) < 1e-8


@pytest.mark.parametrize("cls", [steepest.SOAP, steepest.SPlus])
def test_without_bases_there_is_no_orthogonal_equivariance(cls: Maker) -> None:
    assert gap_of_rotated(cls, WITHOUT, skipped=1) > 1e-2


# ---- refreshes ------------------------------------------------------------------------------------------------------


def watch(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of which a refresh is asked from now on."""
    asked: list[tuple[int, ...]] = []

    def counting(refresh: Callable[..., Any], p: Tensor, q: Tensor, **how: Any) -> Any:
        asked.append(tuple(p.shape))
        return refresh(p, q, **how)

    for name in ("eigh_refresh", "tracked"):
        monkeypatch.setattr(rotated, name, functools.partial(counting, getattr(rotated, name)))
    return asked


def test_factors_of_one_size_are_refreshed_together_and_only_when_due(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = watch(monkeypatch)
    params = [torch.nn.Parameter(gaussian(*shape)) for shape in ((8, 5), (5, 8), (5, 5), (8, 8), (3, 8, 5))]
    groups = [{"params": params[:4]}, {"params": params[4:], "batch_dims": 1}]
    optimizer = steepest.SOAP(groups, precondition_frequency=4)
    due = []
    for step in range(10):
        for i, p in enumerate(params):
            p.grad = gaussian(*p.shape, seed=10 * step + i)
        asked.clear()
        optimizer.step()
        if asked:
            due.append(step)
            assert sorted(asked) == [(3, 5, 5), (3, 8, 8), (4, 5, 5), (4, 8, 8)]
    assert due == [0, 4, 8]


@every_class
@pytest.mark.parametrize("every", [1, 3])
def test_the_first_refreshes_are_exact(cls: Maker, every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, refresh = [], rotated.eigh_refresh

    def watched(p: Tensor, q: Tensor, *, method: str) -> Any:
        asked.append(method)
        return refresh(p, q, method=method)

    monkeypatch.setattr(rotated, "eigh_refresh", watched)
    grads = (gaussian(6, 6, seed=step) for step in range(10))
    options = {"precondition_frequency": every, "exact_refreshes": 2, "refresh": "jr"}
    trained(cls, grads, gaussian(6, 6, seed=9), **options)
    assert asked[:3] == ["eigh", "eigh", "jr"]
    assert set(asked[3:]) == {"jr"}


@every_class
def test_when_bases_are_refreshed(cls: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first step, then every fourth one, of which SOAP and KL-Shampoo do not count the first."""
    asked, steps = watch(monkeypatch), []
    p, moved = torch.nn.Parameter(gaussian(5, 4)), []
    optimizer = cls([p], precondition_frequency=4, weight_decay=0.1)
    for step in range(1, 14):
        before = p.detach().clone()
        p.grad = gaussian(5, 4, seed=step)
        asked.clear()
        optimizer.step()
        steps += [step] if asked else []
        moved += [step] if not torch.equal(p, before) else []
    skips = cls in (steepest.SOAP, steepest.KLSOAP, steepest.KLShampoo)
    assert steps == ([1, 5, 9, 13] if skips else [1, 4, 8, 12])
    assert moved == list(range(2 if skips else 1, 14))
    assert optimizer.state[p][CLOCK] == 13


SIXTEEN = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("cls", [steepest.SOAP, steepest.KLSOAP])
def test_what_16_bits_round_off_the_momentum_is_not_divided_by_next_to_nothing(cls: Maker, dtype: torch.dtype) -> None:
    """Gradients that stay in one direction leave v empty in the others. In fp32 a longest step is some tens of lr."""
    p = torch.nn.Parameter(noise((8, 5), 0, dtype))
    optimizer = cls([p], lr=0.02, weight_decay=0.0)
    for _ in range(15):
        before = p.detach().clone()
        p.grad = (noise((8, 1), 5) @ noise((1, 5), 6)).to(dtype)
        optimizer.step()
        assert float((p.detach() - before).float().norm()) < 2
    assert optimizer.state[p]["momentum_buffer"].dtype is torch.float32


def test_a_first_step_in_the_order_of_emerging_optimizers_is_usual_in_bf16() -> None:
    p = torch.nn.Parameter(noise((8, 5), 0, torch.bfloat16))
    options: dict[str, Any] = {"parity": "emerging-optimizers", "precondition_frequency": 1}
    optimizer = steepest.SOAP([p], lr=0.02, weight_decay=0.0, **options)
    before, p.grad = p.detach().clone(), noise((8, 5), 1, torch.bfloat16)
    optimizer.step()
    assert float((p.detach() - before).float().norm()) < 2
    for narrow in ({"momentum_dtype": torch.bfloat16}, {"state_bits": 8}):
        with pytest.raises(
            ValueError, match=f"divides what {next(iter(narrow))}=.* would round off .*: keep the momentum"
        ):
            steepest.SOAP([p], **options, **narrow)


def test_a_momentum_of_another_dtype_is_what_was_asked_for() -> None:
    for asked, kept in ((torch.bfloat16, torch.bfloat16), (torch.float64, torch.float64), (None, torch.float32)):
        p = torch.nn.Parameter(noise((8, 5), 0, torch.bfloat16))
        p.grad, optimizer = noise((8, 5), 1, torch.bfloat16), steepest.SOAP([p], momentum_dtype=asked)
        optimizer.step()
        assert optimizer.state[p]["momentum_buffer"].dtype is kept
