"""`steepest.Muon` in the place of `torch.optim.Muon` and of KellerJordan's MuonWithAuxAdam."""

from __future__ import annotations

import inspect
import itertools
import math

import pytest
import torch
from torch import Tensor, nn

import steepest
from support.training import copies, give_gradients, moved, noise, parameters, relative, same_bits, train

JORDAN = (3.4445, -4.7750, 2.0315)
SHAPES = {"tall": (48, 16), "wide": (16, 48), "square": (32, 32)}


def orthogonalized(x: Tensor, steps: int = 5) -> Tensor:
    """The quintic Newton-Schulz iteration in fp64, written apart from the library."""
    a, b, c = JORDAN
    x = x.double() / x.double().norm()
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class MuonInDouble:
    """Muon as its paper states it, in fp64 throughout: the trajectory that both implementations round."""

    def __init__(self, start: Tensor, lr: float, decay: float, momentum: float, nesterov: bool, ratio: float) -> None:
        self.w, self.m = start.double().clone(), torch.zeros_like(start, dtype=torch.float64)
        self.lr, self.decay, self.momentum, self.nesterov, self.ratio = lr, decay, momentum, nesterov, ratio

    def step(self, g: Tensor) -> None:
        g = g.double()
        self.m = self.momentum * self.m + (1 - self.momentum) * g
        u = (1 - self.momentum) * g + self.momentum * self.m if self.nesterov else self.m
        self.w = (1 - self.lr * self.decay) * self.w - self.lr * self.ratio * orthogonalized(u)


def torch_aliases_the_buffer(dtype: torch.dtype, nesterov: bool) -> bool:
    """Before PyTorch PR 194664, Muon normalized a bf16 momentum buffer in place when it was not copied for Nesterov."""
    if nesterov or dtype != torch.bfloat16:
        return False
    p = nn.Parameter(noise((4, 4), 0, dtype))
    give_gradients([p], 0)
    optimizer = torch.optim.Muon([p], nesterov=False)
    optimizer.step()
    return not torch.allclose(optimizer.state[p]["momentum_buffer"].float(), 0.05 * p.grad.float(), rtol=0.05)


def test_the_first_nine_parameters_are_torchs() -> None:
    ours = list(inspect.signature(steepest.Muon).parameters.values())
    theirs = list(inspect.signature(torch.optim.Muon).parameters.values())
    assert [(p.name, p.kind, p.default) for p in ours[:9]] == [(p.name, p.kind, p.default) for p in theirs[:9]]
    assert all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in ours[9:])


def test_group_and_state_keys_are_torchs_and_more() -> None:
    params = parameters([(4, 3)]), parameters([(4, 3)])
    ours, theirs = steepest.Muon(params[0]), torch.optim.Muon(params[1])
    for optimizer, ps in zip((ours, theirs), params, strict=True):
        train(optimizer, ps, range(1))
    group, their_group = ours.param_groups[0], theirs.param_groups[0]
    assert {key: group[key] for key in their_group if key != "params"} == {
        key: value for key, value in their_group.items() if key != "params"
    }
    assert list(ours.state[params[0][0]]) == list(theirs.state[params[1][0]]) == ["momentum_buffer"]


@pytest.mark.parametrize("adjust_lr_fn", [None, "original", "match_rms_adamw"])
@pytest.mark.parametrize(
    "nesterov,dtype",
    [(nesterov, dtype) for nesterov in (True, False) for dtype in (torch.float32, torch.bfloat16, torch.float64)],
    ids=lambda value: {True: "nesterov", False: "plain"}.get(value, str(value)),
)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_trajectory(shape: tuple[int, int], nesterov: bool, adjust_lr_fn: str | None, dtype: torch.dtype) -> None:
    if torch_aliases_the_buffer(dtype, nesterov):
        pytest.skip("this torch modifies its bf16 momentum buffer when nesterov=False (fixed by PyTorch PR 194664)")
    start = noise(shape, 7, dtype) * 0.05
    lr, decay, momentum, steps = 0.2, 0.1, 0.9, 12  # long steps, next to which the rounding of bf16 weights is small
    m, n = shape
    ratio = 0.2 * math.sqrt(max(m, n)) if adjust_lr_fn == "match_rms_adamw" else math.sqrt(max(1, m / n))
    exact = MuonInDouble(start, lr, decay, momentum, nesterov, ratio)
    p, q = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    ours = steepest.Muon([p], lr, decay, momentum, nesterov, adjust_lr_fn=adjust_lr_fn)
    theirs = torch.optim.Muon([q], lr, decay, momentum, nesterov, adjust_lr_fn=adjust_lr_fn)
    for step in range(steps):
        give_gradients([p], step)
        q.grad = p.grad.clone()
        exact.step(p.grad)
        ours.step()
        theirs.step()
    mine, torchs, wanted = moved([p], [start]), moved([q], [start]), moved([exact.w], [start])
    assert relative(mine, torchs) <= 3e-2
    assert torch.cosine_similarity(mine, torchs, dim=0) >= 0.999
    assert relative(mine, wanted) <= 1.5 * relative(torchs, wanted)


def test_a_bf16_momentum_buffer_is_the_average_without_nesterov() -> None:
    p = nn.Parameter(noise((6, 4), 0, torch.bfloat16))
    give_gradients([p], 0)
    optimizer = steepest.Muon([p], momentum=0.5, nesterov=False)
    optimizer.step()
    assert torch.equal(optimizer.state[p]["momentum_buffer"], p.grad * 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_checkpoint_of_torch_loads_and_goes_back(dtype: torch.dtype) -> None:
    params = [nn.Parameter(0.05 * p.detach()) for p in parameters(SHAPES.values(), dtype)]
    theirs = torch.optim.Muon(params, lr=0.2, momentum=0.9, ns_steps=4)
    train(theirs, params, range(4))

    ours = steepest.Muon([nn.Parameter(p) for p in copies(params)])
    ours.load_state_dict(theirs.state_dict())
    group = ours.param_groups[0]
    assert (group["lr"], group["momentum"], group["ns_steps"]) == (0.2, 0.9, 4)
    for p, q in zip(params, group["params"], strict=True):
        assert same_bits(theirs.state[p]["momentum_buffer"], ours.state[q]["momentum_buffer"])

    start = copies(params)
    train(theirs, params, range(4, 8))
    train(ours, group["params"], range(4, 8))
    assert relative(moved(group["params"], start), moved(params, start)) <= 3e-2

    back = torch.optim.Muon(params)
    back.load_state_dict(ours.state_dict())
    for p, q in zip(params, group["params"], strict=True):
        assert same_bits(back.state[p]["momentum_buffer"], ours.state[q]["momentum_buffer"])
    train(back, params, range(8, 9))


def test_groups_of_muon_with_aux_adam() -> None:
    """github.com/KellerJordan/Muon: groups of exactly these keys, and the two rules of its README, in fp64."""
    matrices, vectors = parameters(SHAPES.values(), torch.float64), parameters([(9,), (30, 4)], torch.float64)
    muon = {"params": matrices, "lr": 0.02, "momentum": 0.9, "weight_decay": 0.01, "use_muon": True}
    adam = {"params": vectors, "lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.1, "use_muon": False}
    ratios = [math.sqrt(max(1, p.shape[0] / p.shape[1])) for p in matrices]
    exact = [MuonInDouble(p, 0.02, 0.01, 0.9, True, ratio) for p, ratio in zip(matrices, ratios, strict=True)]
    w = copies(vectors)
    m, v = [torch.zeros_like(p) for p in w], [torch.zeros_like(p) for p in w]

    optimizer = steepest.Muon([adam, muon])
    for step in range(1, 9):
        give_gradients([*matrices, *vectors], step)
        optimizer.step()
        for rule, p in zip(exact, matrices, strict=True):
            rule.step(p.grad)
        for i, p in enumerate(vectors):
            m[i] = 0.9 * m[i] + 0.1 * p.grad
            v[i] = 0.95 * v[i] + 0.05 * p.grad**2
            update = m[i] / (1 - 0.9**step) / ((v[i] / (1 - 0.95**step)).sqrt() + 1e-10)
            w[i] = w[i] * (1 - 3e-3 * 0.1) - 3e-3 * update
    for found, wanted in itertools.chain(zip(matrices, (e.w for e in exact)), zip(vectors, w)):
        torch.testing.assert_close(found.detach(), wanted, rtol=1e-5, atol=1e-6)
    assert [set(optimizer.state[p]) for p in (matrices[0], vectors[0])] == [
        {"momentum_buffer"},
        {"exp_avg", "exp_avg_sq", "step"},
    ]


def test_a_checkpoint_of_muon_with_aux_adam_loads() -> None:
    """Its state counts steps in a Python int, and its groups hold nothing but the keys it documents."""
    matrix, vector = parameters([(6, 4), (5,)])
    saved = {
        "state": {
            0: {"exp_avg": torch.ones(5), "exp_avg_sq": torch.ones(5), "step": 3},
            1: {"momentum_buffer": torch.ones(6, 4)},
        },
        "param_groups": [
            {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0, "use_muon": False, "params": [0]},
            {"lr": 0.02, "momentum": 0.95, "weight_decay": 0, "use_muon": True, "params": [1]},
        ],
    }
    optimizer = steepest.Muon([{"params": [vector], "use_muon": False}, {"params": [matrix]}], lr=1.0)
    optimizer.load_state_dict(saved)
    assert optimizer.state[vector]["step"].item() == 3.0
    assert [group["lr"] for group in optimizer.param_groups] == [3e-4, 0.02]
    train(optimizer, [matrix, vector], range(1))
    assert optimizer.state[vector]["step"].item() == 4.0
