"""Which rows of which parameters make the queries and keys of an attention layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ..routing.architectures import TRANSPOSED
from ..routing.known import class_names

__all__ = ["AttentionLayer", "Projection", "ProjectionRows", "Rows", "read_projection"]

#: A module with a weight and perhaps a bias, or these themselves.
Projection: TypeAlias = nn.Module | Tensor | Sequence[Tensor]


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of one parameter: along `dim`, and for each which factor it takes, by number (`AttentionLayer`)."""

    parameter: Tensor
    dim: int
    factor: Tensor


@dataclass(frozen=True, eq=False)
class AttentionLayer:
    """The query and key rows of an attention layer; made by `separate`, `fused` or `latent`.

    num_heads: H, of queries.   num_kv_heads: G, of keys: key head j serves the H / G query heads from j H / G on.
    rows: of every parameter. The factors that they count are those of the H query heads, the G key heads, the rotated
    parts of the H query heads beside a shared key, and 1 for all else.

    Where the methods take a projection it is a module with a weight and perhaps a bias, a weight, or (weight, bias).
    transposed: whether weights are stored in x out; None: as the module's class says (Conv1D).
    ValueError, with the shape, where heads and rows do not fit.
    """

    num_heads: int
    num_kv_heads: int
    rows: tuple[Rows, ...]

    def __repr__(self) -> str:
        """The numbers of heads, and of the query and key rows of every parameter."""
        parts = []
        for rows in self.rows:
            queries, keys = self.num_heads, self.num_heads + self.num_kv_heads
            q = ((rows.factor < queries) | ((rows.factor >= keys) & (rows.factor < keys + queries))).sum()
            k = ((rows.factor >= queries) & (rows.factor < keys)).sum()
            parts.append(f"{tuple(rows.parameter.shape)} with {q} query and {k} key rows of {len(rows.factor)}")
        return f"AttentionLayer(num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}: {'; '.join(parts)})"

    @classmethod
    def separate(
        cls,
        query: Projection,
        key: Projection,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        transposed: bool | None = None,
    ) -> AttentionLayer:
        """The layer of two projections, (H size, width) and (G size, width); num_kv_heads: None is num_heads."""
        heads, groups = _counts(num_heads, num_kv_heads)
        q, k = read_projection("query", query, transposed), read_projection("key", key, transposed)
        sizes = q.size_of(heads, "num_heads"), k.size_of(groups, "num_kv_heads")
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"query heads have {sizes[0]} rows and key heads {sizes[1]}, with num_heads={heads} and "
                f"num_kv_heads={groups}: their products need as many"
            )
        q_factor, k_factor = (torch.arange(n).repeat_interleave(sizes[0]) for n in (heads, groups))
        return cls(heads, groups, (*q.rows(q_factor), *k.rows(heads + k_factor)))

    @classmethod
    def fused(
        cls,
        projection: Projection,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        interleaved: bool = False,
        transposed: bool | None = None,
    ) -> AttentionLayer:
        """The layer of one projection, ((H + 2 G) size, width).

        Its rows are all queries, all keys, all values; interleaved: key head by key head, the H / G queries that it
        serves, itself and its value (GPT-NeoX, BLOOM, Falcon, Megatron).
        """
        heads, groups = _counts(num_heads, num_kv_heads)
        qkv = read_projection("fused", projection, transposed)
        size = qkv.size_of(heads + 2 * groups, "num_heads + 2 num_kv_heads")
        q, k = torch.arange(heads), heads + torch.arange(groups)
        v = torch.full((groups,), 2 * heads + groups)
        if interleaved:
            blocks = torch.cat([q.view(groups, -1), k[:, None], v[:, None]], 1).flatten()
        else:
            blocks = torch.cat([q, k, v])
        return cls(heads, groups, qkv.rows(blocks.repeat_interleave(size)))

    @classmethod
    def latent(
        cls,
        query: Projection,
        key_value: Projection,
        num_heads: int,
        nope_size: int,
        rope_size: int,
        *,
        transposed: bool | None = None,
    ) -> AttentionLayer:
        """The layer of latent attention (MLA): the projections out of the latents, head by head.

        query: rows of a head are nope_size without and rope_size with rotation.   key_value: nope_size of the key, then
        those of the value. The rotated part of the key is shared by all heads, in a weight that is left as it is.
        """
        heads, _ = _counts(num_heads, None)
        q, kv = read_projection("query", query, transposed), read_projection("key and value", key_value, transposed)
        if q.size_of(heads, "num_heads") != nope_size + rope_size:
            raise ValueError(
                f"query heads have {q.size_of(heads, 'num_heads')} rows with num_heads={heads}, which is not "
                f"nope_size + rope_size, {nope_size} + {rope_size}"
            )
        value_size = kv.size_of(heads, "num_heads") - nope_size
        if value_size < 0:
            raise ValueError(f"heads of the key and value projection have fewer rows than nope_size={nope_size}")
        q_parts = torch.arange(heads)[:, None] + torch.tensor([0] * nope_size + [2 * heads] * rope_size)
        k_parts = torch.full((heads, nope_size + value_size), 3 * heads)
        k_parts[:, :nope_size] = heads + torch.arange(heads)[:, None]
        return cls(heads, heads, (*q.rows(q_parts.flatten()), *kv.rows(k_parts.flatten())))


@dataclass(frozen=True)
class ProjectionRows:
    """The parameters of a projection, each with the dimension of its rows; name: which it is, for messages."""

    name: str
    parameters: tuple[tuple[Tensor, int], ...]

    @property
    def length(self) -> int:
        weight, dim = self.parameters[0]
        return weight.shape[dim]

    def size_of(self, heads: int, called: str) -> int:
        """The rows of each of so many heads."""
        if not self.length or self.length % heads:
            raise ValueError(
                f"the {self.name} projection of shape {tuple(self.parameters[0][0].shape)} has {self.length} rows "
                f"(outputs), which {called} = {heads} does not divide"
            )
        return self.length // heads

    def rows(self, factor: Tensor) -> tuple[Rows, ...]:
        return tuple(Rows(p, dim, factor) for p, dim in self.parameters)


def read_projection(name: str, projection: Projection, transposed: bool | None = None) -> ProjectionRows:
    """The parameters of a projection. name: which it is, for messages. TypeError or ValueError where it is none."""
    if isinstance(projection, nn.Module):
        tensors = [getattr(projection, leaf, None) for leaf in ("weight", "bias")]
        transposed = not TRANSPOSED.isdisjoint(class_names(projection)) if transposed is None else transposed
    else:
        tensors = [projection] if isinstance(projection, Tensor) else list(projection)
    given = [t for t in tensors if t is not None]
    if not given or not all(isinstance(t, Tensor) for t in given):
        raise TypeError(
            f"the {name} projection should be a module with a weight, a weight or (weight, bias) but is: {projection!r}"
        )
    if [t.ndim for t in given] not in ([2], [2, 1]):
        raise ValueError(
            f"the {name} projection should be a matrix, perhaps with a bias, but has shapes "
            f"{', '.join(str(tuple(t.shape)) for t in given)}"
        )
    read = ProjectionRows(name, tuple((t, 1 if transposed and t.ndim > 1 else 0) for t in given))
    if len(given) > 1 and len(given[1]) != read.length:
        raise ValueError(
            f"the bias of the {name} projection has {len(given[1])} numbers and its weight of shape "
            f"{tuple(given[0].shape)} {read.length} rows: say transposed=True for a weight stored in x out"
        )
    return read


def _counts(num_heads: int, num_kv_heads: int | None) -> tuple[int, int]:
    groups = num_heads if num_kv_heads is None else num_kv_heads
    for name, value in (("num_heads", num_heads), ("num_kv_heads", groups)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} should be a whole number of at least 1 but is: {value!r}")
    if num_heads % groups:
        raise ValueError(f"num_kv_heads={groups} does not divide num_heads={num_heads}")
    return num_heads, groups
