"""Runs the nodes of a chain on a batch of matrices, product by product, on any backend that has products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.polar_chain import Update
from ..ops.symm_gemm import Workspace, gemm, linear
from ..ops.weight_update import weight_update
from .chain import Apply, Column, Gram, Node, Number, Product, Sum, multiplication


class Runner:
    """The buffers and numbers of a batch X, (batch, m, n); called with a node, it does what the node says.

    "x" is X itself, other buffers are the workspace's: "y" and "w" of X's shape, the rest squares of its short side. A
    tall X is handled as X^T X and X Q, without a transpose in memory; tall: None where it has more rows than columns.
    """

    def __init__(self, x: Tensor, workspace: Workspace, tall: bool | None = None) -> None:
        self.x, self.workspace = x, workspace
        self.tall = x.shape[-2] > x.shape[-1] if tall is None else tall
        self.numbers: Tensor | None = None

    def __getitem__(self, name: str) -> Tensor:
        if name == "x":
            return self.x
        m = self.x.shape[-1] if self.tall else self.x.shape[-2]
        return self.workspace.get(name, self.x.shape if name in ("y", "w") else (len(self.x), m, m), self.x)

    def __call__(self, node: Node) -> Tensor:
        """The node's buffer, filled."""
        if isinstance(node, Sum):
            alpha, beta = self._value(node.alpha), self._value(node.beta)
            c = self[node.c] if node.beta else None
            return linear(self[node.a], c, alpha=alpha, beta=beta, gamma=node.gamma, out=self[node.out])
        return self._multiply(node, node.c if isinstance(node, Product) else node.x)

    def gram(self, out: str, x: str) -> Tensor:
        """X X^T, or X^T X of a tall X."""
        return self(Gram(out, x))

    def multiply(
        self, out: str, a: str, b: str, c: str = "", *, alpha: float = 1.0, beta: float = 0.0, shift: float = 0.0
    ) -> Tensor:
        """alpha A B + beta C + shift I of symmetric matrices that commute."""
        result = self._multiply(Product(out, a, b, c, alpha, beta), c)
        if shift:
            result.diagonal(dim1=-2, dim2=-1).add_(shift)
        return result

    def apply(self, out: str, q: str, x: str, c: str = "", *, beta: float = 0.0) -> Tensor:
        """Q X + beta C, or X Q + beta C of a tall X."""
        return self._multiply(Apply(out, q, x, 1.0, beta), c)

    def update(self, node: Node, update: Update) -> None:
        """The last node of a chain, whose product goes into weights: W <- beta W + eta Q X."""
        assert isinstance(node, Apply)
        assert node.beta == 0
        alpha = torch.where(update.eta == 0, 0, update.eta * self._value(node.alpha))  # of NaN too
        factors = self._factors(node)
        weight_update(*factors, update.weights, alpha=alpha, beta=update.beta, workspace=self.workspace)

    def _multiply(self, node: Gram | Product | Apply, added: str) -> Tensor:
        """The product of a node, with beta times the buffer ``added``."""
        options: dict[str, Any] = {"out": self[node.out], "symmetric": not isinstance(node, Apply)}
        if isinstance(node, Gram):
            return gemm(*self._factors(node), **options)
        c = self[added] if node.beta else None
        alpha, beta = self._value(node.alpha), self._value(node.beta)
        return gemm(*self._factors(node), c, alpha=alpha, beta=beta, workspace=self.workspace, **options)

    def _factors(self, node: Gram | Product | Apply) -> tuple[Tensor, Tensor]:
        rows, columns = self.x.shape[-2:]
        product = multiplication(node, rows, columns, self.tall)
        a, b = (self[side.buffer].mT if side.transposed else self[side.buffer] for side in (product.a, product.b))
        return a, b

    def _value(self, number: Number) -> float | Tensor:
        if not isinstance(number, Column):
            return number
        assert self.numbers is not None
        return self.numbers[:, number.index]
