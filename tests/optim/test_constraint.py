"""`constraint`: every matrix keeps the norm that it began with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest
from steepest.optimizer import MatrixOptimizer
from support.problems import gap, polar_by_svd
from support.slow import slow
from support.training import (
    EVERY,
    MATRICES,
    all_same_bits,
    both_backends,
    both_kinds,
    build,
    check_compiled_step,
    check_resume_and_bad_gradients,
    copies,
    give_gradients,
    name_of,
    noise,
    parameters,
    train,
)

REFUSING = (steepest.Scion, steepest.ProdigyMuon, steepest.Fromage)
#: NIGT's parameters are ahead of its weights, which are constrained.
TAKING = [cls for cls in EVERY if cls not in (*REFUSING, steepest.NIGT)]
SOME = [steepest.Muon, steepest.MuAdam, steepest.SOAP, steepest.MuonMax]
CONSTRAINTS = ("frobenius", "spectral")
every_constraint = pytest.mark.parametrize("constraint", CONSTRAINTS)


def norm(w: Tensor, constraint: str) -> Tensor:
    w = w.detach().double()
    return torch.linalg.svdvals(w)[..., 0] if constraint == "spectral" else w.square().sum((-2, -1)).sqrt()


def options(constraint: str, **more: Any) -> dict[str, Any]:
    return {"constraint": constraint, "weight_decay": 0.0, **more}


# ---- the equations --------------------------------------------------------------------------------------------------


@both_backends
@every_constraint
def test_muon_on_a_sphere(constraint: str, backend: str) -> None:
    """W <- R W / ||W|| after each step, of every head, split and expert by itself."""
    shapes: dict[tuple[int, ...], dict[str, Any]] = {
        (7, 5): {},
        (9, 4): {"split_sizes": (4, 3, 2)},
        (6, 5): {"num_heads": 2},
        (3, 4, 5): {"batch_dims": 1},
    }
    cuts = ([7], [4, 3, 2], [3, 3], None)
    params = [nn.Parameter(noise(shape, i, torch.float64)) for i, shape in enumerate(shapes)]
    groups = [{"params": [p], **how} for p, how in zip(params, shapes.values(), strict=True)]
    values: dict[str, Any] = {"lr": 0.1, "momentum": 0.8, "nesterov": False, "polar": "svd", "adjust_lr_fn": "none"}
    optimizer = steepest.Muon(groups, backend=backend, **options(constraint, **values))

    def split(t: Tensor, rows: list[int] | None) -> list[Tensor]:
        return list(t.unbind() if rows is None else t.split(rows))

    wanted = [[w.clone() for w in split(p.detach(), cut)] for p, cut in zip(params, cuts, strict=True)]
    radii = [[norm(w, constraint) for w in some] for some in wanted]
    momenta = [[torch.zeros_like(w) for w in some] for some in wanted]
    for step in range(10):
        give_gradients(params, step)
        for i, (p, cut) in enumerate(zip(params, cuts, strict=True)):
            assert p.grad is not None
            for k, g in enumerate(split(p.grad, cut)):
                momenta[i][k] = 0.8 * momenta[i][k] + 0.2 * g
                w = wanted[i][k] - 0.1 * polar_by_svd(momenta[i][k])
                wanted[i][k] = w * (radii[i][k] / norm(w, constraint))
        optimizer.step()
    for i, (p, cut) in enumerate(zip(params, cuts, strict=True)):
        for k, found in enumerate(split(p.detach(), cut)):
            assert gap(found, wanted[i][k]) < (1e-10 if constraint == "frobenius" else 1e-6)
        assert gap(optimizer.state[p]["radius"], torch.stack(radii[i])) < 1e-10


@pytest.mark.parametrize(
    "backend, constraint", [("auto", "spectral"), ("torch", "frobenius"), slow("auto", "frobenius")]
)
@pytest.mark.parametrize("cls", TAKING, ids=name_of)
def test_every_class_stays_and_adamw_does_not(cls: type[MatrixOptimizer], constraint: str, backend: str) -> None:
    optimizer, params = both_kinds(cls, torch.float64, backend=backend, **options(constraint))
    plain, others = both_kinds(cls, torch.float64, backend=backend, weight_decay=0.0)
    start = copies(params)
    train(optimizer, params, range(4))
    train(plain, others, range(4))
    for p, w in list(zip(params, start, strict=True))[: len(MATRICES)]:
        assert gap(norm(p, constraint), norm(w, constraint)) < 1e-9
        assert gap(p.detach(), w) > 1e-3
    coupled = optimizer.couples()  # where the other layers' steps depend on where the matrices are
    assert coupled or all_same_bits(params[len(MATRICES) :], others[len(MATRICES) :])
    assert not all_same_bits(params[:1], others[:1])


def test_the_spectral_norm_is_at_least_998_thousandths() -> None:
    """Of matrices whose largest singular values are near one another, too."""
    u, v = (torch.linalg.qr(noise((48, 48), seed, torch.float64))[0] for seed in (1, 2))
    for values in (torch.linspace(1, 0.99, 48), torch.ones(48), torch.logspace(0, -6, 48)):
        p = nn.Parameter((u * values.double()) @ v.mT)
        optimizer = steepest.Muon([p], lr=0.01, constraint="spectral", weight_decay=0.0)
        train(optimizer, [p], range(3))
        radius = float(optimizer.state[p]["radius"])
        assert 0.998 <= radius <= 1 + 1e-9
        assert 0.998 <= float(norm(p, "spectral")) <= 1 / 0.998


# ---- what every option must do ---------------------------------------------------------------------------------------


@every_constraint
@pytest.mark.parametrize("more", [{}, {"keep_mantissa": True}, {"stochastic_rounding": True}], ids=str)
def test_bf16_weights_do_not_drift(more: dict[str, Any], constraint: str) -> None:
    """With kept bits the radius is exact to fp32, and without them to bf16, after however many steps."""
    p = nn.Parameter(noise((24, 16), 1, torch.bfloat16))
    before = norm(p, constraint)
    optimizer = steepest.Muon([p], lr=0.02, **options(constraint, **more))
    train(optimizer, [p], range(60))
    recipe = optimizer._recipe(optimizer.param_groups[0])
    value = recipe.rounding.value(p.detach(), optimizer.state[p])
    assert gap(norm(value, constraint), before) < (1e-5 if more.get("keep_mantissa") else 3e-3)


@every_constraint
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cls", SOME, ids=name_of)
def test_resume_and_bad_gradients(cls: type[MatrixOptimizer], dtype: torch.dtype, constraint: str) -> None:
    check_resume_and_bad_gradients(lambda: both_kinds(cls, dtype, **options(constraint)))


def test_a_group_says_its_own() -> None:
    params = parameters([(6, 4), (6, 4)])
    groups = [{"params": params[:1], "constraint": "frobenius"}, {"params": params[1:]}]
    optimizer = steepest.Muon(groups, lr=0.1, weight_decay=0.0)
    before = [norm(p, "frobenius") for p in params]
    train(optimizer, params, range(3))
    assert [gap(norm(p, "frobenius"), b) < 1e-6 for p, b in zip(params, before, strict=True)] == [True, False]
    assert ["radius" in optimizer.state[p] for p in params] == [True, False]


def test_a_constraint_may_begin_later_and_end() -> None:
    optimizer, params = both_kinds(steepest.Muon, weight_decay=0.0)
    train(optimizer, params, range(2))
    optimizer.param_groups[0]["constraint"] = "frobenius"
    before = norm(params[0], "frobenius")
    train(optimizer, params, range(2, 4))
    assert gap(norm(params[0], "frobenius"), before) < 1e-6
    optimizer.param_groups[0]["constraint"] = None
    train(optimizer, params, range(4, 6))
    assert gap(norm(params[0], "frobenius"), before) > 1e-4


def test_averages_and_hooks_get_constrained_weights() -> None:
    optimizer, params = both_kinds(steepest.Muon, torch.float64, average=0.5, **options("frobenius"))
    before, seen = norm(params[0], "frobenius"), []
    optimizer.register_weight_hook(lambda weights: seen.append(norm(weights.value(params[0]), "frobenius")))
    train(optimizer, params, range(1))
    assert gap(seen[0], before) < 1e-12
    assert gap(norm(optimizer.state[params[0]]["average"], "frobenius"), before / 2) < 1e-12


@pytest.mark.slow
@every_constraint
@pytest.mark.parametrize("cls", [steepest.Muon, steepest.MuAdam], ids=name_of)
def test_a_compiled_step(cls: type[MatrixOptimizer], constraint: str) -> None:
    check_compiled_step(lambda: both_kinds(cls, backend="torch", **options(constraint)))


# ---- what is refused -------------------------------------------------------------------------------------------------


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "a name": (
        lambda: build(steepest.Muon, **options("row")),
        "constraint 'row' is not known; use 'frobenius' or 'spectral', or None",
    ),
    "decay": (
        lambda: build(steepest.Muon, constraint="spectral"),
        "constraint='spectral' keeps a norm that weight_decay=0.1 would shrink: use weight_decay=0",
    ),
    "schedule-free": (
        lambda: build(steepest.Muon, average="schedule_free", **options("frobenius")),
        "such points are not on the sphere of a constraint",
    ),
    "Scion": (lambda: build(steepest.Scion, **options("frobenius")), "Scion has its ball: constrained=False"),
    "ProdigyMuon": (lambda: build(steepest.ProdigyMuon, **options("frobenius")), "how far steps lead from the start"),
    "Fromage": (lambda: build(steepest.Fromage, constraint="frobenius"), "Fromage has a rule of its own for norms"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_constrained_says_why(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()


@every_constraint
def test_a_matrix_of_zeros_has_no_sphere(constraint: str) -> None:
    p = nn.Parameter(torch.cat([noise((3, 4), 1), torch.zeros(3, 4)]))
    optimizer = steepest.Muon([{"params": [p], "num_heads": 2}], lr=0.1, **options(constraint))
    before = p.detach().clone()
    p.grad = noise((6, 4), 2)
    with pytest.raises(ValueError, match=r"shape \(6, 4\) has a matrix of norm 0, .* a group with constraint=None"):
        optimizer.step()
    assert torch.equal(p, before)
    assert not optimizer.state[p]


def test_radii_of_another_model_are_refused() -> None:
    optimizer, params = both_kinds(steepest.Muon, **options("frobenius"))
    train(optimizer, params, range(1))
    saved = optimizer.state_dict()
    saved["state"][0]["radius"] = torch.ones(3, dtype=torch.float64)
    second, _ = both_kinds(steepest.Muon, **options("frobenius"))
    with pytest.raises(ValueError, match=r"'radius' of parameter 0 has shape \(3,\), not \(1,\): it is of another"):
        second.load_state_dict(saved)


def test_scion_without_its_ball_takes_it() -> None:
    optimizer, params = both_kinds(steepest.Scion, torch.float64, constrained=False, **options("spectral"))
    before = norm(params[0], "spectral")
    train(optimizer, params, range(3))
    assert gap(norm(params[0], "spectral"), before) < 1e-9
