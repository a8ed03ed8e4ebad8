"""What one real step did, layer by layer.

with diagnostics.record(optimizer, model) as layers:
    optimizer.step()
layers["hidden.weight"]["cosine"]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..matrices import LAYOUT_KEYS, Piece, pieces
from ..optimizer import MatrixOptimizer, unwrap
from ..sharding.local import whole_tensor
from .alignment import COMMON, measure

Layers = dict[str, dict[str, Tensor]]


@contextmanager
def record(optimizer: Optimizer, model: nn.Module | None = None, norms: Sequence[str] = COMMON) -> Iterator[Layers]:
    """Measures the one step taken inside the block; the dict is filled when the block ends.

    Keys are parameter names: those of model, else the optimizer's own, else "<group>.<number>". Of every parameter with
    a gradient: the names of `measure`, weight_norm (before the step) and, for what a matrix method of `steepest`
    stepped, polar_slack (the least of its matrices, NaN without a norm bound; see `MatrixOptimizer.metrics`). All are
    0-d fp64 tensors. The update is W before - W after and has weight decay in it; the gradient is what the parameter
    holds after the step. Holds a copy of every weight meanwhile. Sharded parameters are gathered, one after another, so
    that all ranks measure together.
    """
    layers: Layers = {}
    optimizer = unwrap(optimizer)
    before = copies(optimizer)
    yield layers
    layers.update(measured(optimizer, before, names_of(optimizer, model), norms))


def copies(optimizer: Optimizer) -> dict[Tensor, Tensor]:
    """The weights as they are."""
    return {p: p.detach().clone() for group in optimizer.param_groups for p in group["params"]}


def names_of(optimizer: Optimizer, model: nn.Module | None = None) -> dict[Tensor, str]:
    """A name for every parameter."""
    known = {p: name for name, p in model.named_parameters()} if model is not None else {}
    names = {}
    for number, group in enumerate(optimizer.param_groups):
        group_names = group.get("param_names") or [f"{number}.{i}" for i in range(len(group["params"]))]
        names.update({p: known.get(p, name) for p, name in zip(group["params"], group_names, strict=True)})
    return names


def measured(
    optimizer: Optimizer, before: Mapping[Tensor, Tensor], names: Mapping[Tensor, str], norms: Sequence[str]
) -> Layers:
    """What the step since `before` did to every parameter that has a gradient."""
    scale = getattr(optimizer, "grad_scale", None)  # of a GradScaler whose unscaling is left to the step
    slack = _slack(optimizer)
    layers: Layers = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is None or not p.numel():
                continue
            old, g = whole_tensor(before[p]), whole_tensor(p.grad.to_dense() if p.grad.is_sparse else p.grad)
            g = g if scale is None else g / scale
            u = old.double() - whole_tensor(p.detach()).double()
            measures = measure(u, g, norms, _pieces(p, group))
            measures["weight_norm"] = torch.linalg.vector_norm(old.double())
            layers[names[p]] = measures | ({"polar_slack": slack[p]} if p in slack else {})
    return layers


def _pieces(p: Tensor, group: Mapping[str, Any]) -> tuple[Piece, ...] | None:
    """How a matrix method's group reads p; None where nobody says."""
    if not group.get("use_muon") or p.ndim < 2:
        return None
    values = {key: group[key] for key in LAYOUT_KEYS if group.get(key) is not None}
    return pieces(p.shape, **values)


def _slack(optimizer: Optimizer) -> dict[Tensor, Tensor]:
    """The least slack of each parameter's matrices, where all that stepped have one."""
    if not isinstance(optimizer, MatrixOptimizer):
        return {}
    of_matrices: dict[Tensor, list[Tensor]] = {}
    metrics = optimizer.metrics()
    for number, group in enumerate(optimizer.param_groups):
        values = metrics.get(f"{number}/polar_slack")
        buckets: dict[tuple[object, ...], list[tuple[Tensor, int]]] = {}
        for p in group["params"]:
            for piece in (_pieces(p, group) or ()) if p.grad is not None and p.numel() else ():
                key = (piece.rows, piece.cols, p.grad.dtype)
                buckets.setdefault(key, []).append((p, piece.batch))
        owners = [p for bucket in buckets.values() for p, count in bucket for _ in range(count)]
        if values is not None and len(values) == len(owners):
            for p, value in zip(owners, values, strict=True):
                of_matrices.setdefault(p, []).append(value)
    return {p: torch.stack(slacks).amin().double() for p, slacks in of_matrices.items()}
