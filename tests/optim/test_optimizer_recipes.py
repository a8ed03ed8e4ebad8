"""The optimizers do what `step_one` says: AdamW on any layout, the matrix methods on every shape class."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import steepest
from steepest.matrices import pieces
from steepest.parts import Diagonal, Frobenius, Hyper, Momentum
from steepest.recipe import ADAMW, Recipe, State, step_one
from support.problems import ADAM_AVERAGE, RECIPES, SHAPES, SVD, TOLERANCE, gap, gaussian, refer
from support.slow import slow
from support.training import KRONECKER


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_adamw_takes_any_shape_and_layout(dtype: torch.dtype) -> None:
    """Scalars, vectors, transposes and strides: torch's fused kernel and the parts give one answer."""
    start = [gaussian(dtype=dtype), gaussian(5, dtype=dtype), gaussian(4, 6, dtype=dtype)]
    start += [gaussian(6, 4, dtype=dtype).mT, gaussian(4, 12, dtype=dtype)[:, ::3], gaussian(2, 3, 4, 4, dtype=dtype)]
    start[5] = start[5].contiguous(memory_format=torch.channels_last)
    params = [torch.nn.Parameter(w) for w in start]
    optimizer = steepest.MuAdam([{"params": params, "use_muon": False, "lr": 0.02, "weight_decay": 0.1}])
    wanted, states = [p.detach().clone() for p in params], [ADAMW.init(p.detach()) for p in params]
    for step in range(5):
        for i, p in enumerate(params):
            p.grad = torch.empty_like(p).copy_(gaussian(*p.shape, seed=10 * step + i))
            wanted[i], states[i] = refer_vector(wanted[i], p.grad, states[i])
        optimizer.step()
    for p, w in zip(params, wanted):
        assert gap(p.detach(), w) < TOLERANCE[dtype]


def refer_vector(p: Tensor, g: Tensor, state: State) -> tuple[Tensor, State]:
    row = {key: t.reshape(1, -1) if key != "step" else t for key, t in state.items()}
    w, after = step_one(ADAMW, p.reshape(1, -1), g.reshape(1, -1), row, Hyper(0.02, 0.1, 0.9, 0.95, 1e-8))
    return w.reshape(p.shape), {key: t.reshape(state[key].shape) for key, t in after.items()}


def test_adamw_with_eps_zero_leaves_alone_what_never_had_a_gradient() -> None:
    """0/0 = 0 on the fused path too: rows of an embedding that no token has named yet."""
    p = torch.nn.Parameter(gaussian(4, 3))
    before = p.detach().clone()
    p.grad = torch.zeros_like(p)
    p.grad[1] = 1.0
    optimizer = steepest.MuAdam([{"params": [p], "use_muon": False, "lr": 0.1, "eps": 0.0}])
    optimizer.step()
    assert torch.equal(p.detach()[[0, 2, 3]], before[[0, 2, 3]])
    assert gap(p.detach()[1], before[1] - 0.1) < 1e-12


OPTIMIZERS = {
    "muon": (steepest.Muon, {}),
    "muon, no nesterov": (steepest.Muon, {"nesterov": False, "adjust_lr_fn": "match_rms_adamw"}),
    "muadam": (steepest.MuAdam, {"weight_decay": 0.1}),
    "muadam, jordan": (steepest.MuAdam, {"polar": "jordan", "adjust_lr_fn": "none"}),
    "muadam_sania": (steepest.MuAdamSANIA, {"betas": (0.8, 0.9), "eps": 0.0}),
    "bf16 momentum": (steepest.MuAdam, {"momentum_dtype": torch.bfloat16}),
}


@pytest.mark.parametrize("cautious_wd, maximize", [(False, False), (True, True), slow(False, True), slow(True, False)])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_is_its_recipe(name: str, cautious_wd: bool, maximize: bool) -> None:
    """Every layout, and parameters whose first gradient comes late or whose gradient is missing for a while."""
    kind, options = OPTIMIZERS[name]
    options = {"polar": "svd", "lr": 0.02, "cautious_wd": cautious_wd, "maximize": maximize, **options}
    layouts = {name: entry for name, entry in SHAPES.items() if name != "empty"}
    params = [torch.nn.Parameter(gaussian(*shape, seed=i)) for i, (shape, _) in enumerate(layouts.values())]
    groups = [{"params": [p], "use_muon": True, **how} for p, (_, how) in zip(params, layouts.values())]
    optimizer = kind(groups, **options)
    recipes = [optimizer.recipe(group) for group in optimizer.param_groups]
    hypers = [optimizer.hyper(group) for group in optimizer.param_groups]
    read = [pieces(shape, **how) for shape, how in layouts.values()]
    wanted, states = [p.detach().clone() for p in params], [r.init(p.detach()) for r, p in zip(recipes, params)]
    for step in range(8):
        for i, p in enumerate(params):
            p.grad = None if step < i % 3 or step == 5 + i % 2 else gaussian(*p.shape, seed=100 * step + i)
            if p.grad is not None:
                g = -p.grad if maximize else p.grad
                wanted[i], states[i] = refer(recipes[i], hypers[i], wanted[i], g, states[i], read[i])
        optimizer.step()
    for i, p in enumerate(params):
        assert gap(p.detach(), wanted[i]) < 1e-11, tuple(p.shape)
        assert optimizer.state[p].keys() == set(recipes[i].keys)


@pytest.mark.parametrize("use_muon", [True, False])
@pytest.mark.parametrize("kind", [steepest.MuAdam, steepest.MuAdamSANIA, *KRONECKER])
def test_numbers_may_be_tensors(kind: type[steepest.MuAdam], use_muon: bool) -> None:
    numbers = {"lr": 0.02, "weight_decay": 0.1, "eps": 1e-6}
    tensors = {key: torch.tensor(value, dtype=torch.float64) for key, value in numbers.items()}
    betas = (0.8, 0.9), tuple(torch.tensor(b, dtype=torch.float64) for b in (0.8, 0.9))
    params = [torch.nn.Parameter(gaussian(5, 3)) for _ in range(2)]
    for p, group in zip(params, ({**numbers, "betas": betas[0]}, {**tensors, "betas": betas[1]})):
        optimizer = kind([{"params": [p], "use_muon": use_muon, **group}], polar="svd")
        for step in range(4):
            p.grad = gaussian(5, 3, seed=step)
            optimizer.step()
    assert gap(params[1].detach(), params[0].detach()) < 1e-13


def test_the_named_methods_are_the_recipes_of_the_table() -> None:
    p = torch.nn.Parameter(gaussian(4, 3))
    for kind, name in ((steepest.Muon, "muon"), (steepest.MuAdam, "muadam"), (steepest.MuAdamSANIA, "muadam_sania")):
        optimizer = kind([p], polar="svd")
        capped = replace(SVD, max_workspace_bytes=1 << 30)
        assert optimizer.recipe(optimizer.param_groups[0]) == replace(RECIPES[name], direction=capped)
    assert RECIPES["muadam"] == Recipe(ADAM_AVERAGE, Diagonal(0.25), SVD, adjust_lr="original")
    first = Momentum(bias_correction=True, key="exp_avg")
    assert Recipe(first, Diagonal(0.25, eps_inside=False), Frobenius(), "dual") == ADAMW
