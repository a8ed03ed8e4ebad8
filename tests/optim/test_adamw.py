"""The AdamW groups of every optimizer are `torch.optim.AdamW`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steepest.optimizer import MatrixOptimizer
from support.training import OPTIMIZERS, all_same_bits, copies, give_gradients, noise, parameters, train

SHAPES = ((7,), (30, 4), (), (3, 2, 2), (0,))
VALUES: dict[str, Any] = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}

every_optimizer = pytest.mark.parametrize("cls", OPTIMIZERS)


def aux(cls: type[MatrixOptimizer], params: list[nn.Parameter], **values: Any) -> MatrixOptimizer:
    return cls([{"params": params, "use_muon": False, **VALUES, **values}])


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("fused", [False, True], ids=["loop", "fused"])
@pytest.mark.parametrize(
    "options",
    [{}, {"maximize": True}, {"lr": torch.tensor(3e-3, dtype=torch.float64)}],
    ids=["plain", "up", "tensor"],
)
def test_equal_to_torch_within_rounding(
    cls: type[MatrixOptimizer], dtype: torch.dtype, options: dict[str, Any], fused: bool
) -> None:
    ours, theirs = parameters(SHAPES, dtype), parameters(SHAPES, dtype)
    train(aux(cls, ours, **options), ours, range(6))
    train(torch.optim.AdamW(theirs, fused=fused, foreach=False, **{**VALUES, **options}), theirs, range(6))
    tight = 4 * torch.finfo(dtype).eps
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tight, atol=tight)


class AdamWInSingle:
    """AdamW with fp32 averages of bf16 gradients, and one rounding when the weight is stored."""

    def __init__(self, params: list[Tensor]) -> None:
        self.params = params
        self.m = [torch.zeros_like(p) for p in params]
        self.v = [torch.zeros_like(p, dtype=torch.float32) for p in params]
        self.t = 0

    def step(self, grads: list[Tensor]) -> None:
        lr, (beta1, beta2), eps, decay = (VALUES[k] for k in ("lr", "betas", "eps", "weight_decay"))
        self.t += 1
        for i, g in enumerate(grads):
            self.m[i] = (beta1 * self.m[i].float() + (1 - beta1) * g.float()).to(g.dtype)
            self.v[i] = beta2 * self.v[i] + (1 - beta2) * g.float() ** 2
            denominator = (self.v[i] / (1 - beta2**self.t)).sqrt() + eps
            update = self.m[i].float() / (1 - beta1**self.t) / denominator
            self.params[i] = (self.params[i].float() * (1 - lr * decay) - lr * update).to(g.dtype)


@every_optimizer
def test_bf16_within_one_rounding_of_the_formula(cls: type[MatrixOptimizer]) -> None:
    params = [nn.Parameter(0.1 * p.detach()) for p in parameters(SHAPES, torch.bfloat16)]
    optimizer, exact = aux(cls, params), AdamWInSingle(copies(params))
    for step in range(6):
        give_gradients(params, step)
        exact.step([p.grad for p in params])
        optimizer.step()
    for p, wanted in zip(params, exact.params, strict=True):
        torch.testing.assert_close(p.detach(), wanted, rtol=2**-7, atol=2e-3)


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_strided_gradient_is_a_dense_one(cls: type[MatrixOptimizer], dtype: torch.dtype) -> None:
    dense, strided = parameters([(6, 4)], dtype), parameters([(6, 4)], dtype)
    optimizers = aux(cls, dense), aux(cls, strided)
    for step in range(5):
        g = noise((4, 6), step, dtype).T
        dense[0].grad, strided[0].grad = g.contiguous(), g
        for optimizer in optimizers:
            optimizer.step()
    assert all_same_bits(dense, strided)
