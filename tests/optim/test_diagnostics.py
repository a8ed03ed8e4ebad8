"""`steepest.diagnostics` against formulas in fp64 and against what is known of the methods."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest
from steepest import diagnostics
from steepest.matrices import pieces
from steepest.parts import Frobenius, Sign, Spectral
from support.problems import gap, gaussian, polar_by_svd

# ---- angle, norms and steepness ----------------------------------------------------------------------------------


def test_cosine_and_inner_are_those_of_the_entries() -> None:
    u, g = gaussian(7, 3, seed=1), gaussian(7, 3, seed=2)
    found = diagnostics.measure(u, g, ["frobenius"])
    inner = float((u * g).sum())
    assert float(found["inner"]) == pytest.approx(inner, rel=1e-14)
    assert float(found["cosine"]) == pytest.approx(inner / float(u.norm() * g.norm()), rel=1e-14)
    assert found["cosine"] == diagnostics.cosine(u, g) == found["cosine"].clamp(-1, 1)
    assert float(found["frobenius_steepness"]) == pytest.approx(float(found["cosine"]), rel=1e-12)


def test_cosine_of_tiny_and_huge_tensors() -> None:
    g = gaussian(5, 4, seed=3)
    assert float(diagnostics.cosine(1e-30 * g.float(), 1e30 * g.float())) == pytest.approx(1.0, abs=1e-7)
    assert diagnostics.cosine(torch.zeros(3), torch.ones(3)).isnan()


@pytest.mark.parametrize(
    "name, direction", [("frobenius", Frobenius()), ("spectral", Spectral("svd")), ("sign", Sign())]
)
def test_dual_norms_are_those_of_the_directions(name: str, direction: Any) -> None:
    """Two ways to N*(g): by the formula, and as what the unit step reaches."""
    g = gaussian(6, 9, seed=4)
    d, dual = direction(g)
    assert float(diagnostics.dual_norms(g)[name]) == pytest.approx(float(dual), rel=1e-13)
    assert float(diagnostics.norms_of(d)[name]) == pytest.approx(1.0, rel=1e-13)
    assert float(diagnostics.steepness(3 * d, g, name)) == pytest.approx(1.0, rel=1e-13)
    for seed in range(20):
        assert float(diagnostics.steepness(gaussian(6, 9, seed=50 + seed), g, name)) < 0.9


def test_a_parameter_of_several_matrices_has_the_largest_norm_and_the_sum_of_the_dual_norms() -> None:
    g = gaussian(6, 5, seed=5)
    own = pieces(g.shape, num_heads=2)
    singular = [torch.linalg.svdvals(half) for half in g.split(3)]
    assert diagnostics.norms_of(g, ["spectral"], own)["spectral"] == max(s.max() for s in singular)
    assert diagnostics.dual_norms(g, ["spectral"], own)["spectral"] == pytest.approx(
        float(sum(s.sum() for s in singular))
    )


def test_a_vector_is_a_column() -> None:
    x = gaussian(8, seed=6)
    found = diagnostics.norms_of(x)
    assert float(found["spectral"]) == pytest.approx(float(x.norm()), rel=1e-14)
    assert float(diagnostics.dual_norms(x)["spectral"]) == pytest.approx(float(x.norm()), rel=1e-14)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 3\) and the gradient \(3, 2\)"):
        diagnostics.cosine(torch.ones(2, 3), torch.ones(3, 2))
    with pytest.raises(ValueError, match="norm 'ky fan' is not known; use some of frobenius, spectral, sign"):
        diagnostics.dual_norms(torch.ones(2, 3), ["ky fan"])


# ---- the best metric ---------------------------------------------------------------------------------------------


def dense(apply: Callable[[Tensor], Tensor], n: int) -> Tensor:
    return torch.stack([apply(row) for row in torch.eye(n, dtype=torch.float64)], dim=1)


@pytest.mark.parametrize("seed", range(5))
def test_the_best_metric_explains_the_step_and_has_its_condition(seed: int) -> None:
    g, u = gaussian(6, seed=seed), gaussian(6, seed=100 + seed)
    u = u if (g * u).sum() > 0 else -u
    metric = diagnostics.best_metric(u, g)
    inverse = dense(metric.inverse, 6)
    eigenvalues = torch.linalg.eigvalsh(inverse)
    assert gap(metric.inverse(g), u) < 1e-14 + 1e-15 / float(metric.cosine)
    rounding = 1e-15 * float(metric.condition)
    assert gap(metric.times(u), g) < rounding
    assert gap(inverse @ dense(metric.times, 6), torch.eye(6, dtype=torch.float64)) < 10 * rounding
    assert gap(inverse, inverse.mT) < 1e-14
    assert eigenvalues[0] > 0
    assert float(eigenvalues[-1] / eigenvalues[0]) == pytest.approx(float(metric.condition), rel=rounding)
    cos = (g * u).sum() / (g.norm() * u.norm())
    sin = (1 - cos**2).sqrt()
    assert float(metric.condition) == pytest.approx(float((1 + sin) / (1 - sin)), rel=rounding)
    assert float(diagnostics.metric_condition(u, g)) == pytest.approx(float(metric.condition), rel=1e-13)


def test_no_other_metric_that_explains_the_step_is_better_conditioned() -> None:
    """Random members of the family u u^T / <u, g> + B C B^T with B a basis of what is orthogonal to g."""
    g, u = gaussian(4, seed=7), gaussian(4, seed=8)
    u = u if (g * u).sum() > 0 else -u
    least = float(diagnostics.metric_condition(u, g))
    basis = torch.linalg.qr(torch.cat([g[:, None], gaussian(4, 3, seed=9)], dim=1)).Q[:, 1:]
    closest = float("inf")
    for seed in range(300):
        root = basis @ (gaussian(3, 3, seed=1000 + seed) * (u.norm() / g.norm()).sqrt())
        inverse = torch.outer(u, u) / (u @ g) + root @ root.mT
        assert gap(inverse @ g, u) < 1e-12
        closest = min(closest, float(torch.linalg.cond(inverse)))
    assert least <= closest < 20 * least


def test_condition_at_the_ends() -> None:
    g = gaussian(3, 3, seed=10)
    assert float(diagnostics.metric_condition(0.1 * g, g)) == pytest.approx(1.0, abs=1e-7)
    assert diagnostics.metric_condition(-g, g) == float("inf")
    assert diagnostics.metric_condition(torch.zeros_like(g), g).isnan()
    metric = diagnostics.best_metric(0.1 * g, g)
    assert gap(metric.inverse(g), 0.1 * g) < 1e-13
    with pytest.raises(ValueError, match=r"cosine of update and gradient is -1: only a descent step has a metric"):
        diagnostics.best_metric(-g, g)


# ---- a real step -------------------------------------------------------------------------------------------------


def network(seed: int = 0) -> nn.Sequential:
    """In fp64, with every weight a hidden matrix to the router."""
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 7), nn.Tanh()).double()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(gaussian(*p.shape, seed=seed + i) / max(1, p.shape[-1]) ** 0.5)
    return model


def squares(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    return [(gaussian(20, 6, seed=200 + i), gaussian(20, 7, seed=300 + i)) for i in range(count)]


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.ndim == 2]


STEEPEST: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "frobenius": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    "spectral": lambda model: steepest.Muon(
        matrices(model), lr=0.1, momentum=0.0, weight_decay=0.0, polar="svd", adjust_lr_fn="none"
    ),
    "sign": lambda model: torch.optim.Adam(model.parameters(), lr=0.1, betas=(0.0, 0.0), eps=0.0),
}


@pytest.mark.parametrize("norm", STEEPEST)
def test_a_methods_first_step_is_steepest_in_its_norm_and_in_no_other(norm: str) -> None:
    model = network()
    optimizer = STEEPEST[norm](model)
    squares(model, batches(1)[0]).backward()
    before = copy.deepcopy(dict(model.named_parameters()))
    with diagnostics.record(optimizer, model, norms=list(STEEPEST)) as layers:
        optimizer.step()
    for name, p in model.named_parameters():
        if name not in layers:
            continue
        found = layers[name]
        assert p.grad is not None
        assert float(found["update_norm"]) == pytest.approx(float((p - before[name]).detach().norm()), rel=1e-12)
        assert float(found["gradient_norm"]) == pytest.approx(float(p.grad.norm()), rel=1e-13)
        assert float(found["weight_norm"]) == pytest.approx(float(before[name].detach().norm()), rel=1e-13)
        assert float(found[f"{norm}_steepness"]) == pytest.approx(1.0, rel=1e-9)
        if p.ndim == 2:
            assert all(float(found[f"{other}_steepness"]) < 0.99 for other in STEEPEST if other != norm)
    assert {"0.weight", "2.weight"} <= layers.keys()


def test_layers_have_the_polar_slack_of_their_own_matrices() -> None:
    """Two shapes in turn, so that the optimizer's buckets are not in the order of the parameters."""
    shapes = [(8, 6), (5, 7), (8, 6), (5, 7)]
    params = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for i, p in enumerate(params):
        p.grad = gaussian(*p.shape, seed=20 + i, dtype=torch.float32)
    optimizer = steepest.Muon([(f"w{i}", p) for i, p in enumerate(params)], polar="auto", nesterov=False)
    with diagnostics.record(optimizer) as layers:
        optimizer.step()
    alone = {}
    for i, p in enumerate(params):
        single = nn.Parameter(torch.zeros_like(p))
        single.grad = p.grad
        own = steepest.Muon([single], polar="auto", nesterov=False)
        own.step()
        alone[f"w{i}"] = float(own.metrics()["0/polar_slack"])
    assert len(set(alone.values())) == 4
    for name, value in alone.items():
        assert float(layers[name]["polar_slack"]) == pytest.approx(value, rel=1e-6)


# ---- invariance --------------------------------------------------------------------------------------------------


def sania(eps: float = 0.0) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: steepest.MuAdamSANIA(model, lr=1e-4, eps=eps, polar="svd")


SCALE: dict[str, tuple[Callable[[nn.Module], torch.optim.Optimizer], bool]] = {
    "sania": (sania(), True),
    "eps": (sania(1e-8), False),
    "muadam": (lambda model: steepest.MuAdam(model, lr=1e-2, eps=0.0, polar="svd"), False),
    "sgd": (lambda model: torch.optim.SGD(model.parameters(), lr=1e-9), False),
}


@pytest.mark.parametrize("name", SCALE)
def test_scale_invariance(name: str) -> None:
    make, invariant = SCALE[name]
    found = diagnostics.check_scale_invariance(network, make, squares, batches(15))
    assert found.changed == ("0.weight", "2.weight")
    assert set(found.weights) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    if invariant:
        assert found.moved > 1e-2
        assert found.worst < 1e-12
    else:
        assert not found.worst < 1e-6


AFFINE: dict[str, tuple[Callable[[nn.Module], torch.optim.Optimizer], float, bool]] = {
    "muon, orthogonal": (lambda model: steepest.Muon(model, lr=1e-2, polar="svd", weight_decay=0.0), 1.0, True),
    "sgd, orthogonal": (lambda model: torch.optim.SGD(model.parameters(), lr=0.1), 1.0, True),
    "adam, orthogonal": (lambda model: torch.optim.Adam(model.parameters(), lr=1e-2), 1.0, False),
    "muon, general": (lambda model: steepest.Muon(model, lr=1e-2, polar="svd", weight_decay=0.0), 10.0, False),
}


@pytest.mark.parametrize("name", AFFINE)
def test_affine_invariance(name: str) -> None:
    make, condition, invariant = AFFINE[name]
    found = diagnostics.check_affine_invariance(network, make, squares, batches(15), condition=condition)
    assert found.moved > 1e-2
    assert found.worst < 1e-11 if invariant else found.worst > 1e-3


def test_a_run_that_blows_up_is_no_gap_of_zero() -> None:
    found = diagnostics.check_scale_invariance(
        network, lambda model: torch.optim.SGD(model.parameters(), lr=1e3), squares, batches(30), spread=0.0
    )
    assert found.worst == 0.0 or found.worst != found.worst
    found = diagnostics.check_scale_invariance(
        lambda: nn.Linear(6, 7).double(), lambda m: torch.optim.SGD(m.parameters(), lr=1e30), squares, batches(30)
    )
    assert found.worst != found.worst


def test_what_cannot_be_checked_is_refused() -> None:
    make = SCALE["sgd"][0]
    with pytest.raises(ValueError, match="no batches to train on"):
        diagnostics.check_scale_invariance(network, make, squares, [])
    with pytest.raises(ValueError, match="no parameter would be written in other variables: say which with only="):
        diagnostics.check_affine_invariance(network, make, squares, batches(1), only=lambda name, p: False)
    with pytest.raises(ValueError, match="condition should be at least 1 but is: 0.5"):
        diagnostics.check_affine_invariance(network, make, squares, batches(1), condition=0.5)


# ---- splitting ---------------------------------------------------------------------------------------------------


def splittable(bias: bool, activation: nn.Module) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(5, 4, bias=bias), activation, nn.Linear(4, 3)).double()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(gaussian(*p.shape, seed=40 + i))
    return model


def split(model: nn.Sequential, neuron: int, direction: Tensor, epsilon: float) -> nn.Sequential:
    """The network in which that neuron is two, at theta + and - epsilon direction, of half the weight."""
    first, activation, second = model
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    wide = nn.Sequential(nn.Linear(5, 5, bias=first.bias is not None), activation, nn.Linear(5, 3)).double()
    with torch.no_grad():
        wide[0].weight.copy_(torch.cat([first.weight, first.weight[neuron : neuron + 1]]))
        wide[0].weight[neuron] += epsilon * direction[:5]
        wide[0].weight[4] -= epsilon * direction[:5]
        if first.bias is not None:
            wide[0].bias.copy_(torch.cat([first.bias, first.bias[neuron : neuron + 1]]))
            wide[0].bias[neuron] += epsilon * direction[5]
            wide[0].bias[4] -= epsilon * direction[5]
        wide[2].weight.copy_(torch.cat([second.weight, second.weight[:, neuron : neuron + 1]], dim=1))
        wide[2].weight[:, [neuron, 4]] /= 2
        wide[2].bias.copy_(second.bias)
    return wide


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [nn.Tanh(), nn.GELU(), nn.SiLU(inplace=True)], ids=["tanh", "gelu", "silu"])
def test_splitting_a_neuron_changes_the_loss_by_its_index(bias: bool, activation: nn.Module) -> None:
    model = splittable(bias, activation)
    x, y = gaussian(30, 5, seed=60), gaussian(30, 3, seed=61)

    def loss(net: nn.Module) -> Tensor:
        return (net(x) - y).square().mean()

    found = diagnostics.splitting(lambda: loss(model), model[0], activation)
    assert found.index.shape == (4,)
    assert found.direction.shape == (4, 6 if bias else 5)
    epsilon = 1e-3
    for neuron in range(4):
        with torch.no_grad():
            change = float(loss(split(model, neuron, found.direction[neuron], epsilon)) - loss(model))
        assert change == pytest.approx(0.5 * epsilon**2 * float(found.index[neuron]), rel=1e-3, abs=1e-12)
    assert all(p.grad is None for p in model.parameters())


def test_splitting_matrices_are_the_sum_over_the_rows() -> None:
    x, w, gradient = gaussian(11, 3, seed=70), gaussian(2, 3, seed=71), gaussian(11, 2, seed=72)
    z = x @ w.mT
    found = diagnostics.splitting_matrices(x, z, gradient, torch.tanh)
    second = -2 * torch.tanh(z) * (1 - torch.tanh(z) ** 2)
    wanted = sum(torch.outer(x[r], x[r]) * (gradient * second)[r][:, None, None] for r in range(11))
    assert isinstance(wanted, Tensor)
    assert gap(found, wanted) < 1e-13


def test_relu_has_nothing_to_split_and_a_wrong_pair_is_refused() -> None:
    model = splittable(True, nn.ReLU())
    x = gaussian(30, 5, seed=60)
    assert not diagnostics.splitting(lambda: model(x).square().mean(), model[0], model[1]).index.any()
    with pytest.raises(RuntimeError, match="does not go through this layer and then this activation"):
        diagnostics.splitting(lambda: model(x).square().mean(), model[2], model[1])
    with pytest.raises(RuntimeError, match="does not go through"):
        diagnostics.splitting(lambda: model[2].weight.square().sum(), model[0], model[1])


def test_the_polar_factor_is_what_muon_moves_by() -> None:
    """The update that `record` sees, against a polar factor written apart."""
    model = network()
    optimizer = STEEPEST["spectral"](model)
    squares(model, batches(1)[0]).backward()
    with diagnostics.record(optimizer, model) as layers:
        optimizer.step()
    weight = model[0].weight
    assert weight.grad is not None
    u = 0.1 * polar_by_svd(weight.grad)
    wanted = float((u * weight.grad).sum())
    assert float(layers["0.weight"]["inner"]) == pytest.approx(wanted, rel=1e-9)
    assert float(layers["0.weight"]["metric_condition"]) == pytest.approx(
        float(diagnostics.metric_condition(u, weight.grad)), rel=1e-6
    )


# ---- pictures ----------------------------------------------------------------------------------------------------


def test_draw_writes_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    history = [{"step": i, "a/cosine": 1 / (i + 1), "b.c/cosine": 0.5, "a/metric_condition": 10.0**i} for i in range(4)]
    diagnostics.draw(history, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="none of slack was logged; draw some of cosine, metric_condition"):
        diagnostics.draw(history, tmp_path / "picture.png", quantities=["slack"])
