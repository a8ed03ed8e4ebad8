"""The polar factors of matrices whose long side lies on several ranks, by the Gram form.

    X = [X_1; ...; X_P]        rank i has X_i, (m_i, n), m = sum m_i >= n, and gets D_i of D = polar(X)

    R = sum_i X_i^T X_i        one all_reduce
    Q = q(R)                   the polynomial of `steepest.linalg.chain`, on every rank the same
    X_i <- X_i Q               without communication; the end, or a restart: R anew

So the ranks talk once a restart and not once a step of the iteration; and so for columns, X = [X_1, ..., X_P] and Q
X_i. R is symmetric: block rows at and below the diagonal travel, (b + 1) / 2b of n^2 numbers for b of them, at most 8.
Before R they sum one fp64 number a matrix, its size, because a power of two brings X to order 1 and has to be the same
everywhere. All stacks of a call travel together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from ...ops.chain_numbers import chain_numbers
from ...ops.symm_gemm import Workspace, mirror_
from ..chain import Gram, chain
from ..coefficients import Coefficients
from ..runner import Runner
from ..scaling import PowerOfTwo, inverse_power_of_two, largest_entry
from .choice import Choice, choose_sharded
from .factors import check, slack_buffer

#: Sums a contiguous tensor over the ranks, in place; after it the ranks have the same bits.
AllReduce = Callable[[Tensor], object]

ROWS, COLUMNS = -2, -1
MOST_BLOCK_ROWS = 8
LEAST_BLOCK = 32


@torch.no_grad()
def sharded_polars(
    xs: Sequence[Tensor],
    dims: Sequence[int],
    all_reduce: AllReduce,
    preset: str = "auto",
    *,
    coefficients: Coefficients | None = None,
    steps: int | None = None,
    eps: float = 1e-7,
    dtype: torch.dtype | None = None,
    restarts: Collection[int] | None = None,
    slacks: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """This rank's part of the polar factor of every matrix of every x, in x's shape and dtype.

    xs: (..., m_i, n) where dims says -2, the rows lie on several ranks, (..., m, n_i) where it says -1, the columns;
    floating, all on one device. The m_i may differ, and be 0. The other side is the short one: where it is longer the
    work and what travels are larger, and a tight norm bound is looser. Every rank calls with the same stacks in order.

    all_reduce: sums a contiguous tensor over the ranks in place, and leaves the same bits on all of them; it is called
    once with fp64, (matrices of all xs,), and then, for each compute dtype and number of restarts among xs (one, as a
    rule), 1 + restarts times with fp32 (fp64 for fp64), `gram_elements` of every stack.

    preset to restarts: as in `steepest.polar`, all presets but "svd". dtype: by default fp16 on a GPU where the short
    side is at least 128, else fp32, and fp64 for fp64. slacks: filled as by `polar`, on every rank.

    A result differs from the preset's polynomial of the exact singular values by at most 1e-11 in fp64, 1e-4 in fp32
    (1e-3 for "turbo", which takes no restart) and .06 in fp16 (.1 for "turbo", .2 for "tight_4e-3"), and from `polar`
    of the whole matrix by twice that: ||.||_F over sqrt n, over the spectra that `polar` is tested on, of any rank.
    Rounding of vanishing singular values is lifted by the preset's gain. Largest singular values stay below 1.3.
    The scale does not matter, and a zero matrix gives zero. A matrix with an entry that is not finite on one rank gives
    NaN on all, and leaves the rest of its batch alone. Deterministic, no host synchronisation.

    All matrices are worked on at once, which takes three times X_i, six squares of the short side in the compute dtype
    and two as they travel, for each; cut a long list into several calls.

    Raises:
        ValueError: "svd", dims that are not -2 or -1, lists of different lengths, and as `polar`.
        TypeError: as `polar`.
    """
    if len(dims) != len(xs) or (slacks is not None and len(slacks) != len(xs)):
        counts = f"{len(xs)} stacks, {len(dims)} dims" + (f" and {len(slacks)} slacks" if slacks is not None else "")
        raise ValueError(f"every stack has a sharded dimension, and a slack where there are slacks, got {counts}")
    for x, dim in zip(xs, dims, strict=True):
        check(x, preset, dtype, "gram", eps, None)
        if dim not in (ROWS, COLUMNS):
            raise ValueError(f"the sharded dimension is -2 (rows) or -1 (columns) of (..., m, n), got {dim}")
    optional: Sequence[Tensor | None] = [None] * len(xs) if slacks is None else slacks
    shards = []
    for x, dim, slack in zip(xs, dims, optional, strict=True):
        choice = choose_sharded(
            x.shape[_other(dim)],
            preset,
            device=x.device,
            coefficients=coefficients,
            steps=steps,
            x_dtype=x.dtype,
            dtype=dtype,
            restarts=restarts,
        )
        shards.append(_Shard(x, dim, choice, slack_buffer(x, slack)))
    live = [shard for shard in shards if shard.count and shard.short]
    if live:
        _scale(live, all_reduce)
    alike: dict[tuple[torch.dtype, tuple[int, ...]], list[_Shard]] = {}
    for shard in live:
        alike.setdefault((shard.choice.dtype, shard.choice.restarts), []).append(shard)
    for some in alike.values():
        _iterate(some, all_reduce, eps)
    return [shard.result for shard in shards]


def gram_elements(short: int) -> int:
    """The numbers of a symmetric short x short matrix that travel: block rows at and below the diagonal."""
    edges = _edges(short)
    return sum((high - low) * high for low, high in zip(edges[:-1], edges[1:], strict=True))


class _Shard:
    """A rank's part of a stack on its way from x to the result."""

    def __init__(self, x: Tensor, dim: int, choice: Choice, slack: Tensor) -> None:
        self.x = x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])
        self.choice, self.slack = choice, slack
        self.tall = dim == ROWS
        self.count, self.short = len(self.x), x.shape[_other(dim)]
        self.result = torch.empty_like(x)
        self.run = Runner(self.x, Workspace(), self.tall)

    def size(self) -> Tensor:
        """(batch,) fp64, of which the sum over ranks is the size of X: ||X||_F^2 for fp16, else the largest entries."""
        if not self.x.numel():
            return self.x.new_zeros(self.count, dtype=torch.float64)
        if self.choice.dtype == torch.float16:
            return torch.linalg.vector_norm(self.x, dim=(-2, -1), dtype=torch.float64).square()
        return largest_entry(self.x).flatten().double()

    def scale(self, size: Tensor) -> None:
        """X in its compute dtype, its entries of order 1; in fp16 the mean eigenvalue of R in [1/4, 1)."""
        if self.choice.dtype == torch.float16:
            size = (size / self.short).sqrt()
        wide = torch.promote_types(self.x.dtype, torch.float32)
        power = inverse_power_of_two(size[:, None, None])
        x = PowerOfTwo(power.first.to(wide), power.second.to(wide)).times(self.x.to(wide))
        self.run.x = x.to(self.choice.dtype).contiguous()

    @property
    def elements(self) -> int:
        return self.count * gram_elements(self.short)

    def gram_into(self, flat: Tensor, buffer: str) -> None:
        """This rank's addend of R of a buffer, block row by block row."""
        x = self.run[buffer]
        left, right = (x.mT, x) if self.tall else (x, x.mT)
        for rows, low, high in self._block_rows(flat):
            _wide_product(left[:, low:high], right[..., :high], rows)

    def gram_from(self, flat: Tensor) -> Tensor:
        """R, (batch, n, n), as wide as it travelled."""
        gram = flat.new_empty(self.count, self.short, self.short)
        for rows, low, high in self._block_rows(flat):
            gram[:, low:high, :high] = rows
        return mirror_(gram, _edges(self.short))

    def _block_rows(self, flat: Tensor) -> list[tuple[Tensor, int, int]]:
        """The part of ``flat`` of every block row, (batch, rows, columns up to the diagonal), and its edges."""
        edges = _edges(self.short)
        pairs = list(zip(edges[:-1], edges[1:], strict=True))
        sizes = [self.count * (high - low) * high for low, high in pairs]
        parts = zip(flat.split(sizes), pairs, strict=True)
        return [(part.view(self.count, high - low, high), low, high) for part, (low, high) in parts]


def _scale(shards: Sequence[_Shard], all_reduce: AllReduce) -> None:
    sizes = torch.cat([shard.size() for shard in shards])
    all_reduce(sizes)
    for shard, size in zip(shards, sizes.split([shard.count for shard in shards]), strict=True):
        shard.scale(size)


def _iterate(shards: Sequence[_Shard], all_reduce: AllReduce, eps: float) -> None:
    """The chain of all shards, node by node; they share schedule, restarts and compute dtype."""
    schedule, tight = shards[0].choice.schedule, shards[0].choice.schedule.norm == "tight"
    products = chain(schedule, shards[0].choice.restarts)
    numbers = (products.constants, products.powers, schedule.slacks)
    for shard, gram in zip(shards, _grams(shards, "x", all_reduce), strict=True):
        shard.run["gram"].copy_(gram)
        shard.run.numbers = chain_numbers(gram, *numbers, tight=tight, eps=eps, slack=shard.slack)
    for node in products.nodes:
        if isinstance(node, Gram):
            for shard, gram in zip(shards, _grams(shards, node.x, all_reduce), strict=True):
                shard.run[node.out].copy_(gram)
        else:
            for shard in shards:
                shard.run(node)
    for shard in shards:
        shard.result.view(shard.x.shape).copy_(shard.run[products.result])


def _grams(shards: Sequence[_Shard], buffer: str, all_reduce: AllReduce) -> list[Tensor]:
    """R of every shard's buffer, summed over the ranks in one message."""
    wide = torch.promote_types(shards[0].choice.dtype, torch.float32)
    sizes = [shard.elements for shard in shards]
    flat = torch.empty(sum(sizes), dtype=wide, device=shards[0].x.device)
    for shard, part in zip(shards, flat.split(sizes), strict=True):
        shard.gram_into(part, buffer)
    all_reduce(flat)
    return [shard.gram_from(part) for shard, part in zip(shards, flat.split(sizes), strict=True)]


def _wide_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """a b of 16-bit or wider factors, summed and written in out's dtype."""
    if a.dtype == out.dtype:
        torch.bmm(a, b, out=out)
    elif a.is_cuda:
        torch.bmm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.bmm(a.to(out.dtype), b.to(out.dtype), out=out)


def _edges(short: int) -> tuple[int, ...]:
    """The edges of block rows: equal ones, a multiple of 32, and what remains."""
    block = LEAST_BLOCK * -(-short // (LEAST_BLOCK * MOST_BLOCK_ROWS))
    return (*range(0, short, block), short)


def _other(dim: int) -> int:
    return COLUMNS if dim == ROWS else ROWS
