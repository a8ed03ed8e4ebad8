"""The methods with bases against their published rules, written here from the formulas, and what theory says of them.

fp64 and the exact polar factor throughout, but for what is about rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from support.problems import SHAPES, gap, gaussian, polar_by_svd
from support.training import KRONECKER

Maker = type[KroneckerOptimizer]
every_class = pytest.mark.parametrize("cls", KRONECKER)


def gradients(steps: int, *shape: int, seed: int = 0) -> Iterator[Tensor]:
    """Noise whose rows and columns have scales of their own, so that eigenvalues are far apart."""
    rows, cols = (torch.logspace(0, -1, n, dtype=torch.float64) for n in shape[-2:])
    left, right = (torch.linalg.qr(gaussian(n, n, seed=seed + 7 + n)).Q for n in shape[-2:])
    for step in range(steps):
        yield left @ (rows[:, None] * gaussian(*shape, seed=1000 * seed + step) * cols) @ right


def trained(cls: Callable[..., Any], grads: Iterator[Tensor], start: Tensor, **options: Any) -> Tensor:
    p = torch.nn.Parameter(start.clone())
    optimizer = cls([p], **options)
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
    return p.detach()


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


def own_state(state: State, recipe: Recipe, number: int, view: Callable[[Tensor], Tensor], p: Tensor) -> State:
    """The state of one piece, as `step_one` names and shapes it."""
    names = recipe.names(number)
    shared = {key: t for key, t in state.items() if key in recipe.keys and key not in names}
    return {
        **{key: view(t) if t.shape == p.shape else t for key, t in shared.items()},
        **{key: state[name] for key, name in names.items()},
    }


@pytest.mark.parametrize("name", HOW)
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
    for step in range(20):
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


# ---- parity with the published rules --------------------------------------------------------------------------------

SIZES = pytest.mark.parametrize("shape", [(8, 5), (5, 8), (6, 6)], ids=str)
STEPS, EVERY = 50, 7


def eigenbasis(factor: Tensor) -> Tensor:
    """Columns in the order of falling eigenvalues."""
    return torch.linalg.eigh(factor).eigenvectors.flip(-1)


def iterated(factor: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """(one sorted step of orthogonal iteration, the order of the old columns)."""
    order = (basis.mT @ factor @ basis).diagonal().argsort(descending=True)
    return torch.linalg.qr(factor @ basis[:, order]).Q, order


def eigenbases_of(state: State, factors: Sequence[Tensor]) -> list[Tensor]:
    """The library's, after a look at them: a longer side has a null space, every basis of which is as good."""
    bases = [state[key][0].clone() for key in rotated.BASES]
    for basis, factor in zip(bases, factors):
        assert gap(basis.mT @ basis, torch.eye(len(basis))) < 1e-12
        turned = basis.mT @ factor @ basis
        assert gap(turned, torch.linalg.eigvalsh(factor).flip(-1).diag()) < 1e-12
    return bases


def in_basis(q: Tensor, factor: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    """The function of what the factor is in this basis, off the diagonal excepted."""
    return q @ f((q.mT @ factor @ q).diagonal()).diag() @ q.mT


@SIZES
@pytest.mark.parametrize("graft", ["adam", None])
@pytest.mark.parametrize("beta", [1.0, 0.97])
@pytest.mark.parametrize("parity", [None, "authors"])
def test_shampoo_is_the_published_rule(
    shape: tuple[int, int], beta: float, graft: str | None, parity: str | None
) -> None:
    """L^-1/4 m R^-1/4 with roots of every EVERY steps; without parity only the bases are so old.

    1e-12 and 1e-6 of the largest eigenvalue are added.
    """
    w, lr, wd, b1, b2, eps = gaussian(*shape, seed=9), 0.02, 0.1, 0.9, 0.99, 1e-12
    p, m, v = torch.nn.Parameter(w.clone()), torch.zeros_like(w), torch.zeros_like(w)
    options = {"shampoo_beta": beta, "graft": graft, "betas": (b1, b2), "refresh": "eigh", "parity": parity}
    optimizer = steepest.Shampoo([p], lr=lr, weight_decay=wd, precondition_frequency=EVERY, **options)
    factors, roots = [w.new_zeros(n, n) for n in shape], [w.new_zeros(n, n) for n in shape]
    bases: list[Tensor] = []

    def inverse_root(values: Tensor) -> Tensor:
        return (values.clamp(min=0) + eps + 1e-6 * values.max()) ** -0.25

    for t, g in enumerate(gradients(STEPS, *shape), 1):
        p.grad = g
        optimizer.step()
        for i, product in enumerate((g @ g.mT, g.mT @ g)):
            factors[i] = factors[i] + product if beta == 1 else beta * factors[i] + (1 - beta) * product
        corrected = [factor if beta == 1 else factor / (1 - beta**t) for factor in factors]
        if t == 1 or t % EVERY == 0:
            bases = list(map(eigenbasis, corrected)) if parity else eigenbases_of(optimizer.state[p], corrected)
            roots = [in_basis(q, factor, inverse_root) for q, factor in zip(bases, corrected)]
        elif parity is None:
            roots = [in_basis(q, factor, inverse_root) for q, factor in zip(bases, corrected)]
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        u = roots[0] @ m @ roots[1] / (1 - b1**t)
        if graft:
            adam = m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + eps)
            u = u * adam.norm() / u.norm()
        w = (1 - lr * wd) * w - lr * u
    assert gap(p.detach(), w) < 1e-9


@SIZES
@pytest.mark.parametrize("parity", [None, "authors"])
def test_one_sided_shampoo_is_the_published_rule(shape: tuple[int, int], parity: str | None) -> None:
    """The inverse square root of the smaller side's factor; averages are divided by their weights."""
    w, lr, wd, b1, b2, eps = gaussian(*shape, seed=9), 0.02, 0.1, 0.9, 0.95, 1e-8
    start, left = w, shape[0] <= shape[1]
    m, (factor, root, basis) = torch.zeros_like(w), w.new_zeros(3, min(shape), min(shape))
    for t, g in enumerate(gradients(STEPS, *shape), 1):
        factor = b2 * factor + (1 - b2) * (g @ g.mT if left else g.mT @ g)
        due = t == 1 or t % EVERY == 0
        basis = eigenbasis(factor) if due else basis
        if due or parity is None:
            root = in_basis(basis, factor / (1 - b2**t), lambda d: 1 / (d.sqrt() + eps))
        m = b1 * m + (1 - b1) * g
        u = m / (1 - b1**t)
        w = (1 - lr * wd) * w - lr * (root @ u if left else u @ root)
    found = trained(
        steepest.OneSidedShampoo,
        gradients(STEPS, *shape),
        start,
        lr=lr,
        weight_decay=wd,
        precondition_frequency=EVERY,
        refresh="eigh",
        parity=parity,
    )
    assert gap(found, w) < 1e-9


def kl_factors(factors: list[Tensor], g: Tensor, bases: list[Tensor], s: list[Tensor], beta: float) -> list[Tensor]:
    """Each in the metric of the other, whose inverse square root has eigenvalues s."""
    m, n = g.shape
    left, right = (g @ bases[1]) * s[1], (g.mT @ bases[0]) * s[0]
    products = left @ left.mT / n, right @ right.mT / m
    return [beta * factor + (1 - beta) * product for factor, product in zip(factors, products)]


def kl_values(values: list[Tensor], g: Tensor, bases: list[Tensor], s: list[Tensor], beta: float) -> list[Tensor]:
    turned = bases[0].mT @ g @ bases[1]
    means = (turned * s[1]).square().mean(1), (turned * s[0][:, None]).square().mean(0)
    return [beta * value + (1 - beta) * mean for value, mean in zip(values, means)]


def whitening(values: list[Tensor]) -> list[Tensor]:
    return [(1 / value.sqrt()).clamp(max=max(10, min(len(value), 4000))) for value in values]


@SIZES
@pytest.mark.parametrize("scale", [1.0, 0.01], ids=["plain", "clamped"])
def test_kl_shampoo_is_the_authors_rule(shape: tuple[int, int], scale: float) -> None:
    w, lr, wd, b1, b2, eps = gaussian(*shape, seed=9), 0.01, 0.1, 0.9, 0.9, 1e-8
    p, m = torch.nn.Parameter(w.clone()), torch.zeros_like(w)
    options = {"betas": (b1, b2), "precondition_frequency": EVERY, "parity": "authors"}
    optimizer = steepest.KLShampoo([p], lr=lr, weight_decay=wd, **options)
    values = [torch.full((n,), 0.1, dtype=torch.float64) for n in shape]
    factors: list[Tensor] = []
    bases: list[Tensor] = []
    for step, g in enumerate(gradients(STEPS, *shape)):
        p.grad = g = g * scale
        optimizer.step()
        if step == 0:
            factors = [(1 - b2) * g @ g.mT, (1 - b2) * g.mT @ g]
            bases = eigenbases_of(optimizer.state[p], factors)
            continue
        s = whitening(values)
        m = b1 * m + (1 - b1) * g
        joint = s[0][:, None] * s[1]
        u = bases[0] @ ((bases[0].mT @ m @ bases[1]) * joint / (1 + eps * joint)) @ bases[1].mT
        factors = kl_factors(factors, g, bases, s, b2)
        values = kl_values(values, g, bases, s, b2)
        if step % EVERY == 0:
            for i in range(2):
                bases[i], order = iterated(factors[i], bases[i])
                values[i] = values[i][order]
        w = (w - lr * u) * (1 - lr * wd)
    assert gap(p.detach(), w) < 1e-9


@SIZES
@pytest.mark.parametrize("cls", [steepest.SOAP, steepest.KLSOAP])
def test_soap_is_the_authors_rule(shape: tuple[int, int], cls: Maker) -> None:
    """The first step makes the bases; the moment in them; sorted orthogonal iteration with v permuted; decay last."""
    w, lr, wd, b1, b2, eps = gaussian(*shape, seed=9), 0.01, 0.1, 0.95, 0.9, 1e-8
    p, turned, v = torch.nn.Parameter(w.clone()), torch.zeros_like(w), torch.zeros_like(w)
    options = {"betas": (b1, b2), "precondition_frequency": EVERY, "parity": "authors"}
    optimizer = cls([p], lr=lr, weight_decay=wd, **options)
    factors: list[Tensor] = []
    bases: list[Tensor] = []
    values = [torch.full((n,), 0.1, dtype=torch.float64) for n in shape]
    for step, g in enumerate(gradients(STEPS, *shape)):
        p.grad = g
        optimizer.step()
        if step == 0:
            factors = [(1 - b2) * g @ g.mT, (1 - b2) * g.mT @ g]
            bases = eigenbases_of(optimizer.state[p], factors)
            continue
        own = bases[0].mT @ g @ bases[1]
        turned, v = b1 * turned + (1 - b1) * own, b2 * v + (1 - b2) * own**2
        u = bases[0] @ (turned / (v.sqrt() + eps)) @ bases[1].mT
        w = (w - lr * (1 - b2**step) ** 0.5 / (1 - b1**step) * u) * (1 - lr * wd)
        if cls is steepest.KLSOAP:
            s = whitening(values)
            factors = kl_factors(factors, g, bases, s, b2)
            values = kl_values(values, g, bases, s, b2)
        else:
            factors = [b2 * f + (1 - b2) * product for f, product in zip(factors, (g @ g.mT, g.mT @ g))]
        if step % EVERY == 0:
            m = bases[0] @ turned @ bases[1].mT
            bases[0], rows = iterated(factors[0], bases[0])
            bases[1], cols = iterated(factors[1], bases[1])
            v, values = v[rows][:, cols], [values[0][rows], values[1][cols]]
            turned = bases[0].mT @ m @ bases[1]
    assert gap(p.detach(), w) < 1e-9


@pytest.mark.parametrize("parity", [None, "authors"])
@SIZES
def test_splus_is_the_authors_rule(shape: tuple[int, int], parity: str | None) -> None:
    """Bases of the refresh before the step, the identity at first; the average of the iterates, its weights 1."""
    w, lr, wd, b1, b2, rate = gaussian(*shape, seed=9), 0.1, 0.1, 0.9, 0.9, 0.95
    m, average, length = torch.zeros_like(w), torch.zeros_like(w), lr * 2 / sum(shape)
    bases = [torch.eye(n, dtype=torch.float64) for n in shape]
    factors = [torch.zeros(n, n, dtype=torch.float64) for n in shape]
    p = torch.nn.Parameter(w.clone())
    optimizer = steepest.SPlus(
        [p],
        lr=lr,
        weight_decay=wd,
        betas=(b1, b2),
        average_rate=rate,
        precondition_frequency=EVERY,
        parity=parity,
    )
    for t, g in enumerate(gradients(STEPS, *shape), 1):
        m = b1 * m + (1 - b1) * g
        u = bases[0] @ (bases[0].mT @ m @ bases[1]).sign() @ bases[1].mT
        w = (w - length * u) * (1 - length * wd) if parity else (1 - length * wd) * w - length * u
        average = rate * average + (1 - rate) * w
        factors = [b2 * f + (1 - b2) * product for f, product in zip(factors, (g @ g.mT, g.mT @ g))]
        p.grad = g
        optimizer.step()
        if t == 1:
            bases = eigenbases_of(optimizer.state[p], [g @ g.mT, g.mT @ g])
        elif t % EVERY == 0:
            bases = [eigenbasis(factor) for factor in factors]
    assert gap(p.detach(), w) < 1e-9
    optimizer.eval()
    assert gap(p.detach(), average / (1 - rate**STEPS)) < 1e-9
    optimizer.train()
    assert gap(p.detach(), w) < 1e-9


# ---- identities -----------------------------------------------------------------------------------------------------

WITHOUT = {"max_preconditioner_dim": 1}


def test_soap_without_factors_is_adam_after_the_first_step() -> None:
    grads = list(gradients(STEPS, 8, 5))
    start = gaussian(8, 5, seed=9)
    found = trained(steepest.SOAP, iter(grads), start, lr=0.01, betas=(0.9, 0.95), eps=0.0, weight_decay=0.1, **WITHOUT)
    wanted = trained(torch.optim.AdamW, iter(grads[1:]), start, lr=0.01, betas=(0.9, 0.95), eps=0.0, weight_decay=0.1)
    assert gap(found, wanted) < 1e-12


def test_kl_soap_without_factors_is_soap() -> None:
    found, wanted = (
        trained(cls, gradients(20, 8, 5), gaussian(8, 5, seed=9), **WITHOUT) for cls in (steepest.KLSOAP, steepest.SOAP)
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


@pytest.mark.parametrize("refresh", ["eigh", "auto"])
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
    """The shapes of which eigh_refresh is asked from now on."""
    asked, refresh = [], rotated.eigh_refresh

    def counting(p: Tensor, q: Tensor, **how: Any) -> Any:
        asked.append(tuple(p.shape))
        return refresh(p, q, **how)

    monkeypatch.setattr(rotated, "eigh_refresh", counting)
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
