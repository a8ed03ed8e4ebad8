"""Runs the nodes of a chain on a batch of matrices, product by product, on any backend that has products."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.polar_chain import Update
from ..ops.symm_gemm import Workspace, gemm, linear
from ..ops.weight_update import weight_update
from .chain import Apply, Column, Gram, Node, Number, Product, Sum, multiplication


class Runner:
    """The buffers and numbers of a batch X, (batch, m, n); called with a node, it does what the node says.

    "x" is X itself, other buffers are the workspace's: "y" and "w" of X's shape, the rest squares of its short side. A
    tall X is handled as X^T X and X Q, without a transpose in memory.
    """

    def __init__(self, x: Tensor, workspace: Workspace) -> None:
        self.x, self.workspace = x, workspace
        self.numbers: Tensor | None = None

    def __getitem__(self, name: str) -> Tensor:
        if name == "x":
            return self.x
        m = min(self.x.shape[-2:])
        return self.workspace.get(name, self.x.shape if name in ("y", "w") else (len(self.x), m, m), self.x)

    def __call__(self, node: Node) -> Tensor:
        """The node's buffer, filled."""
        out = self[node.out]
        if isinstance(node, Gram):
            return gemm(*self._factors(node), out=out, symmetric=True)
        alpha, beta = self._value(node.alpha), self._value(node.beta)
        if isinstance(node, Sum):
            c = self[node.c] if node.beta else None
            return linear(self[node.a], c, alpha=alpha, beta=beta, gamma=node.gamma, out=out)
        c = self[node.c if isinstance(node, Product) else node.x] if node.beta else None
        symmetric = isinstance(node, Product)
        factors = self._factors(node)
        return gemm(*factors, c, alpha=alpha, beta=beta, out=out, symmetric=symmetric, workspace=self.workspace)

    def update(self, node: Node, update: Update) -> None:
        """The last node of a chain, whose product goes into weights: W <- beta W + eta Q X."""
        assert isinstance(node, Apply)
        assert node.beta == 0
        alpha = torch.where(update.eta == 0, 0, update.eta * self._value(node.alpha))  # of NaN too
        factors = self._factors(node)
        weight_update(*factors, update.weights, alpha=alpha, beta=update.beta, workspace=self.workspace)

    def _factors(self, node: Gram | Product | Apply) -> tuple[Tensor, Tensor]:
        product = multiplication(node, *self.x.shape[-2:])
        a, b = (self[side.buffer].mT if side.transposed else self[side.buffer] for side in (product.a, product.b))
        return a, b

    def _value(self, number: Number) -> float | Tensor:
        if not isinstance(number, Column):
            return number
        assert self.numbers is not None
        return self.numbers[:, number.index]
