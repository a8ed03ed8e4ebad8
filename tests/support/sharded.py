"""A small GPT of every kind of parameter, its batches, and how it is trained: whole in one process, or sharded.

What is expected of sharded parameters is always a run of the same class in one process, on whole tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import steepest
from steepest.optimizer import MatrixOptimizer
from support.training import made

__all__ = ["GPT", "HEADS", "backward", "different", "digest", "full", "optimizer", "shard", "train", "whole"]

WIDTH, HEADS, VOCABULARY, TOKENS, BATCH = 12, 3, 37, 9, 4
#: The first fused projection is nine matrices, the next three whose rows lie head by head, the one back three, side by
#: side; the gate is one of a single row.
OVERRIDES: dict[Any, Any] = {
    "*.0.qkv.weight": {"split_sizes": (WIDTH,) * 3, "num_heads": HEADS},
    "*.qkv.weight": {"split_sizes": (WIDTH,) * 3, "interleaved": HEADS},
    "*.proj.weight": {"num_heads": HEADS, "split_columns": True},
    "*.gate": "matrix",
}
VALUES = {"lr": 0.02, "weight_decay": 0.1, "adamw_weight_decay": 0.1, "adamw_lr": 0.01}


class Block(nn.Module):
    """Attention of a fused projection, then a layer of uneven rows, a convolution over time and stacked experts."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 34), nn.Linear(34, WIDTH)
        self.conv = nn.Conv1d(WIDTH, 6, 3, padding=1)
        self.gate = nn.Parameter(torch.ones(1, 6))
        self.experts = nn.Parameter(torch.randn(3, 6, WIDTH) / 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.ln_1(x)).unflatten(-1, (3, HEADS, -1)).unbind(-3)
        attended = nn.functional.scaled_dot_product_attention(*(t.transpose(-2, -3) for t in (q, k, v)), is_causal=True)
        x = x + self.proj(attended.transpose(-2, -3).flatten(-2))
        h = self.ln_2(x)
        x = x + self.down(torch.relu(self.up(h)))
        c = torch.tanh(self.conv(h.mT).mT) * self.gate
        return x + torch.einsum("btc,ecd->btd", c, self.experts) / 3


class GPT(nn.Module):
    """tied: the head is the embedding."""

    def __init__(self, blocks: int = 2, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(blocks)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def shard(model: GPT, **options: Any) -> GPT:
    """The model under `fully_shard`, block by block; options: of it."""
    for block in model.blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)
    return model


def optimizer(cls: type[MatrixOptimizer], model: nn.Module, **values: Any) -> MatrixOptimizer:
    """The class for this model, with the values that it takes. Fromage measures whole tensors, without splits."""
    overrides = {"*.gate": "matrix"} if cls is steepest.Fromage else OVERRIDES
    return made(cls, steepest.param_groups(model, overrides=overrides), **{**VALUES, **values})


def backward(model: nn.Module, step: int, of: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """The loss of the batch of this step, the same on all ranks, after its backward. of: calls the model otherwise."""
    tokens = torch.randint(VOCABULARY, (BATCH, TOKENS + 1), generator=torch.Generator().manual_seed(100 + step))
    logits = (of or model)(tokens[:, :-1])
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    return loss.detach()


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: Iterable[int] = range(6),
    before: Callable[[nn.Module, int], object] = lambda model, step: None,
) -> list[float]:
    """The losses. before: called with the gradients, before the step."""
    losses = []
    for step in steps:
        optimizer.zero_grad()
        losses.append(float(backward(model, step)))
        before(model, step)
        optimizer.step()
    return losses


def full(model: nn.Module) -> dict[str, Tensor]:
    """Whole weights by name, on every rank."""
    return {name: whole(p).detach().clone() for name, p in model.named_parameters()}


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bits."""
    found = hashlib.sha256()
    for name, t in weights.items():
        found.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        found.update(t.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def different(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """Which weights differ in their bits, and by how much; "" where none does."""
    if list(weights) != list(wanted):
        return f"other names: {list(weights)} and {list(wanted)}"
    lines = []
    for name, t in weights.items():
        if digest({name: t}) != digest({name: wanted[name]}):
            gap = (t.double() - wanted[name].double()).abs().max() if t.shape == wanted[name].shape else "shapes"
            lines.append(f"{name} {tuple(t.shape)} {t.dtype}: {gap}")
    return "\n".join(lines)
