"""The largest logit of every head, without the matrix of all logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..sharding.local import is_sharded

__all__ = ["max_logits"]

#: How many logits are computed at a time.
ENTRIES = 1 << 25


@torch.no_grad()
def max_logits(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """max of scale q_i . k_j over the batch and the pairs (i, j) that attend, one number a query head.

    query: (..., heads, L, size).   key: (..., key heads, S, size), of which each serves heads / key heads query heads
    in a row, as with enable_gqa.   attn_mask, is_causal, scale: as of torch.nn.functional.scaled_dot_product_attention;
    scale is 1 / sqrt(size) unless it is given. What a mask adds is no part of a logit: -inf, or as good as that, says
    that a pair does not attend. A head without such a pair has -inf.

    Returns (heads,), fp32 (fp64 of fp64). The products are in the dtype of the queries, as in attention itself, rows of
    queries one part after another: no more than 2^25 logits are there at a time, or those of one row. No gradient.
    ValueError for other shapes.
    """
    _check(query, key)
    heads, length, size = query.shape[-3:]
    if attn_mask is not None and attn_mask.ndim > 4:
        attn_mask = attn_mask.expand(*query.shape[:-3], *attn_mask.shape[-3:]).flatten(0, -4)
    query, key = (t.flatten(0, -4) if t.ndim > 3 else t[None] for t in (query, key))
    query = query * (size**-0.5 if scale is None else scale)
    rows = max(1, ENTRIES // max(1, query.shape[0] * heads * key.shape[-2]))
    if is_causal:  # in parts, of which all but the last have fewer keys
        rows = min(rows, max(64, -(-length // 8)))
    largest = query.new_full((heads,), -torch.inf, dtype=torch.promote_types(query.dtype, torch.float32))
    for first in range(0, length, rows):
        logits = _attending(query[:, :, first : first + rows], key, attn_mask, is_causal, first)
        if logits.numel():
            largest = torch.maximum(largest, logits.amax((0, 2, 3)).to(largest.dtype))
    return largest


def _check(query: Tensor, key: Tensor) -> None:
    shapes = f"queries of shape {tuple(query.shape)} and keys of shape {tuple(key.shape)}"
    if query.ndim < 3 or query.ndim != key.ndim:
        raise ValueError(f"max_logits takes (..., heads, tokens, size) of both but got {shapes}")
    if query.shape[-1] != key.shape[-1] or query.shape[:-3] != key.shape[:-3]:
        raise ValueError(f"{shapes} differ in the size of a head or in their batch")
    if not key.shape[-3] or query.shape[-3] % key.shape[-3]:
        raise ValueError(f"{shapes}: the number of key heads does not divide that of query heads")


def _attending(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, first: int) -> Tensor:
    """(batch, heads, rows, keys), the logits of rows that begin with number `first`, -inf where a pair does not attend;
    is_causal: without the keys behind all of them.
    """
    logits = _logits(query, key[:, :, : first + query.shape[2]] if is_causal else key)
    if is_causal:
        last = logits[..., first:]
        last.masked_fill_(last.new_ones(last.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    if mask is not None:
        logits.masked_fill_(~_attends(mask, logits, first), -torch.inf)
    return logits


def _logits(query: Tensor, key: Tensor) -> Tensor:
    """(batch, heads, rows, keys). The queries that share a key head are rows of one product: no key is repeated."""
    batch, heads, rows, size = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, size)
    return _product(grouped, key.mT).view(batch, heads, rows, key.shape[2])


def _product(a: Any, b: Any) -> Tensor:
    """a @ b, (batch, heads, ., .). Of DTensors that are cut alike along these each part by itself: torch 2.10 flattens
    batch and heads for it, and refuses cut heads.
    """
    if not is_sharded(a) or not is_sharded(b) or a.placements != b.placements or any(map(_cuts_matrices, a.placements)):
        return a @ b  # type: ignore[no-any-return]
    shape = torch.Size((*a.shape[:-1], b.shape[-1]))
    stride = torch.empty(shape, device="meta").stride()
    part = a.to_local() @ b.to_local()
    return type(a).from_local(part, a.device_mesh, a.placements, run_check=False, shape=shape, stride=stride)


def _cuts_matrices(placement: Any) -> bool:
    return placement.is_partial() or (placement.is_shard() and placement.dim > 1)


def _attends(mask: Tensor, logits: Tensor, first: int) -> Tensor:
    """What of a mask belongs to these logits, whose rows begin with number `first`; True where a pair attends."""
    if mask.shape[-2] > 1:
        mask = mask.narrow(-2, first, logits.shape[-2])
    if mask.shape[-1] > 1:
        mask = mask.narrow(-1, 0, logits.shape[-1])
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
