"""What references restated from papers are written with: fp64, plain torch, nothing of the package."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gap(found: Tensor, wanted: Tensor) -> float:
    """Largest difference relative to the largest wanted entry; infinite where only one of the two is finite."""
    if wanted.numel() == 0:
        return 0.0
    difference = (found.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp(min=1e-300)
    return float(difference.nan_to_num(nan=float("inf")))


def polar_by_svd(x: Tensor) -> Tensor:
    """U V^T, zero singular values dropped, written apart from the library."""
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    kept = s > 1e-12 * s.amax(dim=-1, keepdim=True)
    return (u * kept.unsqueeze(-2)) @ vt


def largest_entry(x: Tensor) -> Tensor:
    one = torch.zeros_like(x).flatten()
    k = int(x.abs().argmax())
    one[k] = x.flatten()[k].sign()
    return one.reshape(x.shape)


def leading_pair(x: Tensor) -> Tensor:
    u, _, vt = torch.linalg.svd(x, full_matrices=False)
    return u[:, :1] @ vt[:1]


#: norm: steepest direction
DIRECTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "spectral": polar_by_svd,
    "frobenius": lambda x: x / x.norm(),
    "sign": torch.sgn,
    "rows": lambda x: x / x.norm(dim=1)[:, None],
    "columns": lambda x: x / x.norm(dim=0),
    "nuclear": leading_pair,
    "one_hot": largest_entry,
}


def gradients(steps: int, *shape: int, seed: int = 0) -> Iterator[Tensor]:
    """Noise whose rows and columns have scales of their own, so that eigenvalues of its factors are far apart."""
    rows, cols = (torch.logspace(0, -1, n, dtype=torch.float64) for n in shape[-2:])
    left, right = (torch.linalg.qr(gaussian(n, n, seed=seed + 7 + n)).Q for n in shape[-2:])
    for step in range(steps):
        yield left @ (rows[:, None] * gaussian(*shape, seed=1000 * seed + step) * cols) @ right


def unequal_gradients(steps: int, shape: Sequence[int], seed: int = 0) -> list[Tensor]:
    """Noise that is a tenth, one and ten times as large in turn."""
    return [gaussian(*shape, seed=100 * seed + step + 1) * 10.0 ** (step % 3 - 1) for step in range(steps)]


def trajectory(optimizer: torch.optim.Optimizer, w: Tensor, grads: Iterable[Tensor]) -> list[Tensor]:
    """The weight after each step."""
    weights = []
    for g in grads:
        w.grad = g.clone()
        optimizer.step()
        weights.append(w.detach().clone())
    return weights


def trained(cls: Callable[..., Any], grads: Iterator[Tensor], start: Tensor, **options: Any) -> Tensor:
    """The weight after one step for each gradient."""
    p = torch.nn.Parameter(start.clone())
    trajectory(cls([{"params": [p], "use_muon": True}], **options), p, grads)
    return p.detach()


# ---- eigenbases ---------------------------------------------------------------------------------------------------


def eigenbasis(factor: Tensor) -> Tensor:
    """Columns in the order of falling eigenvalues."""
    return torch.linalg.eigh(factor).eigenvectors.flip(-1)


def iterated(factor: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """(one sorted step of orthogonal iteration, the order of the old columns)."""
    order = (basis.mT @ factor @ basis).diagonal().argsort(descending=True)
    return torch.linalg.qr(factor @ basis[:, order]).Q, order


def eigenbases_of(state: dict[str, Tensor], factors: list[Tensor]) -> list[Tensor]:
    """An optimizer's, after a look at them: a longer side has a null space, every basis of which is as good."""
    bases = [state[f"{side}_basis"][0].clone() for side in ("left", "right")]
    for basis, factor in zip(bases, factors):
        assert gap(basis.mT @ basis, torch.eye(len(basis))) < 1e-12
        assert gap(basis.mT @ factor @ basis, torch.linalg.eigvalsh(factor).flip(-1).diag()) < 1e-9
    return bases


def in_basis(q: Tensor, factor: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    """The function of what the factor is in this basis, off the diagonal excepted."""
    return q @ f((q.mT @ factor @ q).diagonal()).diag() @ q.mT
