"""The methods of Table 1 without bases, Scion and the trust region's relatives in the optimizer's shell.

What `test_checkpoint.py`, `test_citizenship.py` and others ask of Muon, once for every class.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from steepest.matrices import pieces
from steepest.optimizer import MatrixOptimizer
from steepest.zoo.adaptive_muon import NAMO, AdaMuon, NorMuon
from steepest.zoo.muadam import MuAdam
from steepest.zoo.scion import Scion
from steepest.zoo.trust_region import NIGT, Fromage, OrthogonalSGDM, TrustRegion
from steepest.zoo.vector import MADGRAD, AdaGrad, Adam, AdamSANIA, NormalizedSGD, SignSGD
from support.problems import SHAPES, gap, gaussian, refer
from support.slow import slow
from support.training import (
    KINDS,
    all_same_bits,
    copies,
    give_gradients,
    parameters,
    relative,
    same_states,
    state_copies,
    train,
)

Made = dict[str, tuple[type[MatrixOptimizer], dict[str, Any]]]
METHODS: Made = {
    "NormalizedSGD": (NormalizedSGD, {"nesterov": True, "weight_decay": 0.1}),
    "SignSGD": (SignSGD, {"weight_decay": 0.1}),
    "AdaGrad": (AdaGrad, {"weight_decay": 0.1}),
    "Adam": (Adam, {"weight_decay": 0.1}),
    "MADGRAD": (MADGRAD, {"weight_decay": 0.1}),
    "AdamSANIA": (AdamSANIA, {"weight_decay": 0.1, "eps": 1e-2}),
    "Scion": (Scion, {"radius": 2.0}),
    "Scion, rows": (Scion, {"radius": 2.0, "norm": "rows", "constrained": False}),
    "TrustRegion": (TrustRegion, {"weight_decay": 0.1}),
    "TrustRegion, ridge": (TrustRegion, {"weight_decay": 0.1, "norm": "frobenius", "composite": "ridge"}),
    "OrthogonalSGDM": (OrthogonalSGDM, {"weight_decay": 0.1}),
    "NIGT": (NIGT, {"weight_decay": 0.1}),
    "Fromage": (Fromage, {}),
    "NorMuon": (NorMuon, {"nesterov": True}),
    "AdaMuon": (AdaMuon, {}),
    "NAMO": (NAMO, {"adjust_lr_fn": "original"}),
    "MuAdam, rows": (MuAdam, {"after": "rows"}),
}
#: All of them, and of what is no method's concern those of a class of each kind.
every_method = pytest.mark.parametrize("name", METHODS)
every_kind = pytest.mark.parametrize(
    "name", [name if cls in KINDS else slow(name) for name, (cls, _) in METHODS.items()]
)
MATRICES = ((8, 5), (5, 8), (6, 6), (8, 5))


def made(name: str, dtype: torch.dtype = torch.float32, **extra: Any) -> tuple[MatrixOptimizer, list[nn.Parameter]]:
    """A group of the method and one of AdamW."""
    params = parameters((*MATRICES, (7,), (4, 3)), dtype)
    cls, options = METHODS[name]
    groups = [{"params": params[:4]}, {"params": params[4:], "use_muon": False}]
    return cls(groups, **{"lr": 0.02, **options, **extra}), params


@every_method
@pytest.mark.parametrize("maximize", [False, slow(True)])
def test_an_optimizer_is_its_recipe_for_every_layout(name: str, maximize: bool) -> None:
    """And for parameters whose first gradient comes late or whose gradient is missing for a while."""
    cls, options = METHODS[name]
    layouts = {key: entry for key, entry in SHAPES.items() if key != "empty"}
    if cls is Fromage:
        layouts = {key: (shape, how) for key, (shape, how) in layouts.items() if not how}
    if cls is NIGT:
        pytest.skip("its weights are ahead of the recipe's")
    if cls in (Scion, TrustRegion, OrthogonalSGDM, NorMuon, AdaMuon, NAMO, MuAdam):
        options = {"polar": "svd", **options}
    params = [nn.Parameter(gaussian(*shape, seed=i + 1)) for i, (shape, _) in enumerate(layouts.values())]
    matrices = [{"params": [p], "use_muon": True, **how} for p, (_, how) in zip(params, layouts.values())]
    optimizer = cls(matrices, maximize=maximize, **options)
    groups, read = optimizer.param_groups, [pieces(shape, **how) for shape, how in layouts.values()]
    wanted = copies(params)
    states = [optimizer.recipe(g).init(p.detach(), pieces=some) for g, p, some in zip(groups, params, read)]
    for step in range(8):
        for i, (p, group) in enumerate(zip(params, groups)):
            p.grad = None if step < i % 3 or step == 5 + i % 2 else gaussian(*p.shape, seed=100 * step + i + 50)
            if p.grad is not None:
                g, recipe = -p.grad if maximize else p.grad, optimizer.recipe(group)
                wanted[i], states[i] = refer(recipe, optimizer.hyper(group), wanted[i], g, states[i], read[i])
        optimizer.step()
    assert max(gap(p.detach(), w) for p, w in zip(params, wanted)) < 1e-11


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_run_is_the_run(name: str, dtype: torch.dtype) -> None:
    options = {"keep_mantissa": True, "momentum_dtype": torch.bfloat16} if dtype is torch.bfloat16 else {}
    (optimizer, params), (resumed, others) = (made(name, dtype, **options) for _ in range(2))
    train(optimizer, params, range(3))
    for p, q in zip(params, others):
        q.data.copy_(p.data)
    resumed.load_state_dict(optimizer.state_dict())
    for instance, own in ((optimizer, params), (resumed, others)):
        train(instance, own, range(3, 6))
    assert all_same_bits(params, others)
    assert same_states(state_copies(optimizer), state_copies(resumed))


@every_kind
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_gradient_stays_where_it_is(name: str, bad: float) -> None:
    (optimizer, params), (clean, others) = (made(name) for _ in range(2))
    for instance, own in ((optimizer, params), (clean, others)):
        train(instance, own, range(2))
    before, state = copies(params), state_copies(optimizer)
    for own in (params, others):
        give_gradients(own, 2)
    params[1].grad[2, 3] = bad  # type: ignore[index]
    optimizer.step()
    clean.step()
    assert all_same_bits(params[1:2], before[1:2])
    assert same_states(state_copies(optimizer)[1:2], state[1:2])
    rest = [i for i in range(len(params)) if i != 1]
    assert all(relative(params[i].detach(), others[i].detach()) < 1e-5 for i in rest)
    assert int(optimizer.skipped_updates()[torch.device("cpu")]) == 1


@every_kind
def test_bf16_with_the_mantissa_kept_follows_fp32(name: str) -> None:
    (optimizer, params), (wide, others) = made(name, torch.bfloat16, keep_mantissa=True), made(name)
    for p, q in zip(params, others):
        q.data.copy_(p.data)
    for step in range(5):
        for p, q in zip(params, others):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + p.numel())).bfloat16()
            q.grad = p.grad.float()
        optimizer.step()
        wide.step()
    assert all(relative(p.detach(), q.detach()) < 2e-2 for p, q in zip(params, others))
