"""The compiled chain of products for Hopper: two steps of a polar iteration, stack by stack, against torch's products.

Small tiles that are cut, wide tiles of a cluster, sums that are shared among blocks of either, more stacks than a
launch's first parameters hold; wide, tall and square stacks, a matrix with a NaN, and a chain that ends in weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..chain_numbers import _numbers
from ..polar_chain import Update, device_reason, polar_chain
from ..selfcheck import Check
from .comparison import Comparison

H, B, F = torch.float16, torch.bfloat16, torch.float32
Shape = tuple[int, int, int]
#: Stacks of one call each. `symm_gemm_plan` of the compiled library says what they are cut into.
SMALL = ((3, 136, 264), (2, 264, 136), (2, 72, 72), (1, 64, 328), (1, 40, 64), (1, 200, 8), (1, 136, 136))
STREAMED = ((1, 256, 2048),)
WIDE = ((4, 1032, 1032),)
WIDE_STREAMED = ((2, 2048, 4096),)
#: The coefficients of both steps, and tables of what is divided by powers of the norm: that of small slacks is last.
FIRST, SECOND = (3.0, -3.2, 1.2), (1.875, -1.25, 0.375)
POWERS = (4, 2, 1)
CONSTANTS = ((FIRST[2], FIRST[1], 1.0), (0.5 * FIRST[2], 0.5 * FIRST[1], 0.5))
LEAST = (1.5,)
#: As `Chain.packed`: kind, out, a, b, c, columns of alpha and beta; alpha, beta, gamma. Kinds are gram, product, sum,
#: apply; buffers x, y, gram, z, t, q.
NODES = (
    ((1, 3, 2, 2, 2, 0, 1), (0.0, 0.0, 0.0)),  # z = c gram gram + b gram
    ((3, 1, 3, 0, 0, -1, -1), (1.0, FIRST[0], 0.0)),  # y = z x + a x
    ((0, 2, 1, 1, 1, -1, -1), (1.0, 0.0, 0.0)),  # gram = y y^T
    ((2, 4, 2, 2, 2, -1, -1), (0.125, 0.0, 0.0)),  # t = gram / 8
    ((1, 3, 4, 4, 4, -1, -1), (SECOND[2] / 4, SECOND[1] / 2, 0.0)),  # z = c' t t + b' t
    ((2, 5, 3, 3, 4, -1, -1), (1.0, 0.25, SECOND[0])),  # q = z + t / 4 + a' I
    ((3, 0, 5, 1, 1, 2, -1), (0.0, 0.0, 0.0)),  # x = alpha q y
)


def run(backend: str, comparison: Comparison) -> None:
    check(polar_chain, comparison, (SMALL, STREAMED, WIDE, WIDE_STREAMED))


def check(chain: Callable[..., None], comparison: Comparison, calls: Sequence[Sequence[Shape]]) -> None:
    """chain: `steepest.ops.polar_chain.polar_chain`."""
    for turn, shapes in enumerate(calls):
        for dtype in (H, B) if turn == 0 else (H,):
            _expect(chain, comparison, shapes, dtype, into_weights=False)
    _expect(chain, comparison, calls[0], H, into_weights=True)


def _expect(
    chain: Callable[..., None], comparison: Comparison, shapes: Sequence[Shape], dtype: torch.dtype, into_weights: bool
) -> None:
    xs = [comparison.normal(*shape, dtype=dtype, scale=shape[2] ** -0.5) for shape in shapes]
    if len(xs[0]) > 1:
        xs[0][1, -1, -1] = torch.nan
        xs[0][-1] += 2 * shapes[0][2] ** -0.5  # a large singular value: its slack is below that of the first table
    given = [x.clone() for x in xs]
    ys = [comparison.empty(*x.shape, dtype=dtype) for x in xs]
    slacks = [comparison.empty(len(x), dtype=F) for x in xs]
    updates = [_update(comparison, x) for x in xs] if into_weights else []
    old = [[w.clone() for w in update.weights] for update in updates]
    nodes = ([i for ints, _ in NODES for i in ints], [v for _, floats in NODES for v in floats])
    more = {"tight": True, "eps": 1e-7, "updates": updates}
    chain(xs, ys, slacks, nodes, CONSTANTS, POWERS, LEAST, **more)
    for i, x in enumerate(given):
        what = f"{'weights after ' if updates else ''}a chain on {tuple(x.shape)}, {str(dtype).removeprefix('torch.')}"
        clean = [j for j in range(len(x)) if i or len(x) == 1 or j != 1]
        wanted, slack = reference(x[clean])
        comparison.expect(f"slack of {what}", slacks[i][clean], slack, slack * torch.finfo(dtype).eps)
        # What is rounded the other way in one product moves the next by as much.
        bound = wanted.abs().amax((-2, -1), keepdim=True) * 8 * torch.finfo(dtype).eps
        if not updates:
            comparison.expect(what, xs[i][clean], wanted, bound)
            if len(clean) < len(x):
                comparison.expect(f"NaN of {what}", xs[i][1].isnan().all(), 1.0)
            continue
        eta, beta = updates[i].eta[clean, None, None], updates[i].beta[clean, None, None]
        weights = torch.stack([updates[i].weights[j] for j in clean]).float()
        before = torch.stack([old[i][j] for j in clean]).float()
        eps = torch.finfo(updates[i].weights[0].dtype).eps
        moved = beta * before + eta * wanted
        comparison.expect(what, weights, moved, eta.abs() * bound + eps * moved.abs() + 1e-6)


def _update(comparison: Comparison, x: Tensor) -> Update:
    dtype = (F, B, H)[min(x.shape[1:]) % 3]
    weights = [comparison.normal(*x.shape[1:], dtype=dtype) for _ in x]
    eta = comparison.numbers([0.25 * (i + 1) for i in range(len(x))])
    return Update(weights, comparison.place(eta), comparison.place(torch.full_like(eta, 0.75)))


def reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """The last product and the slacks, with every stored product rounded as it is."""
    dtype, tall = x.dtype, x.shape[1] > x.shape[2]

    def stored(t: Tensor) -> Tensor:
        return t.to(dtype).float()

    x = x.float().mT if tall else x.float()
    gram = stored(x @ x.mT)
    slack = x.new_empty(len(x))
    numbers = _numbers(gram, CONSTANTS, POWERS, LEAST, True, 1e-7, slack)
    c, b, alpha = (column[:, None, None] for column in numbers.unbind(1))
    y = stored(stored(c * (gram @ gram) + b * gram) @ x + FIRST[0] * x)
    t = stored(stored(y @ y.mT) * 0.125)
    z = stored(SECOND[2] / 4 * (t @ t) + SECOND[1] / 2 * t)
    q = stored(z + 0.25 * t + SECOND[0] * torch.eye(len(z[0]), dtype=F, device=z.device))
    out = alpha * (q @ y)
    return out.mT if tall else out, slack


CHECK = Check(lambda backend, device: device_reason(device), run)
