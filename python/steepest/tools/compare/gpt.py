"""A small GPT over bytes: pre-norm blocks of causal attention and a GELU MLP, learned positions, untied head.

Every hidden weight matrix is an nn.Linear of its own, so that a matrix method sees query, key and value apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

EMBEDDING_STD = 0.1  # of 0.02, 0.1 and smaller layers, what AdamW does best with


@dataclass(frozen=True)
class Shape:
    """Sizes of a GPT; `width` is a multiple of `heads`, `context` is the longest input."""

    layers: int = 4
    width: int = 128
    heads: int = 2
    context: int = 128
    vocabulary: int = 256


class Attention(nn.Module):
    """Causal self-attention. x: (batch, time, width), returned in the same shape."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.query = nn.Linear(shape.width, shape.width, bias=False)
        self.key = nn.Linear(shape.width, shape.width, bias=False)
        self.value = nn.Linear(shape.width, shape.width, bias=False)
        self.output = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self._split(project(x)) for project in (self.query, self.key, self.value))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)  # (batch, heads, time, width / heads)
        return self.output(mixed.transpose(1, 2).reshape(x.shape))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class MLP(nn.Module):
    """x: (batch, time, width), returned in the same shape; 4 * width inside."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.up = nn.Linear(shape.width, 4 * shape.width, bias=False)
        self.down = nn.Linear(4 * shape.width, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.gelu(self.up(x)))


class Block(nn.Module):
    """x <- x + attention(norm(x)); x <- x + mlp(norm(x)). x: (batch, time, width)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.width)
        self.attention = Attention(shape)
        self.mlp_norm = nn.RMSNorm(shape.width)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """Next-byte model. tokens: (batch, time) int64 with time <= context; -> logits (batch, time, vocabulary).

    `GPT.create(shape, seed)` gives the same weights for the same seed and leaves the global generator alone.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.position_embedding = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width)
        self.lm_head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        self._initialize(shape)

    @classmethod
    def create(cls, shape: Shape, seed: int) -> GPT:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(shape)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(positions)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy in nats per byte, a 0-d tensor."""
        return functional.cross_entropy(self(tokens).flatten(0, 1), targets.flatten())

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The weight matrices of the blocks: what Muon is meant for."""
        return [p for p in self.blocks.parameters() if p.ndim == 2]

    def _initialize(self, shape: Shape) -> None:
        """Normal, 1 / sqrt(fan_in); layers that end in the residual stream 1 / sqrt(2 layers) smaller, as in GPT-2."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=EMBEDDING_STD)
            elif isinstance(module, nn.Linear):
                residual = (2 * shape.layers) ** -0.5 if name.endswith(("attention.output", "mlp.down")) else 1.0
                nn.init.normal_(module.weight, std=residual * module.in_features**-0.5)
