"""A symmetric product X X^T: `steepest.ops.symm_gemm` and the peers' kernels beside the full one of torch.bmm.

Where there are compiled kernels, their product stands there by itself (`steepest.ops.grouped_gemm`), and as one of many
in a call, by the difference of a long and a short chain.
Half the full work counts as the symmetric one's. What is written into is NaN before each call.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from steepest.linalg.chain import Apply, Chain, Node, Product
from steepest.ops import polar_chain
from steepest.ops.grouped_gemm import grouped_gemm
from steepest.ops.symm_gemm import gemm

from ...shapes import matrices, parse, spelled
from .. import peers
from ..case import OK, Case, Job, Row, Settings, Variant, measure, rates
from ..ceilings import Ceilings
from .common import dtypes, name_of, sizes, stacks

SHAPES = ("32x1024x1024", "1024x1024", "8x2048x2048", "2048x2048", "4096x4096", "8192x8192")
QUICK = SHAPES[:-1]
CPU = ("2x64x64", "512x512")
BMM = "torch.bmm"
LONG, SHORT = 10, 2  # products of the two chains
CHAINS = {f"chain of {length}": length for length in (LONG, SHORT)}
ONE = "one of a chain"
# A product rounds once (half a unit), and the second of two in a row multiplies what the first has rounded; fp32
# products of this many terms err by less than one in fp16.
UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-11}


def symm_gemm(settings: Settings) -> Iterator[Job]:
    for each in sizes(settings, SHAPES, QUICK, CPU):
        for name in spelled(matrices(parse(each))):
            for dtype in dtypes(settings):
                run = functools.partial(_rows, name, dtype, settings)
                yield Job("symm_gemm", name, name_of(dtype), run)


def _rows(name: str, dtype: torch.dtype, settings: Settings, ceilings: Ceilings) -> list[Row]:
    case = _case(name, dtype, settings)
    rows = measure(case, settings, ceilings)
    flop = case.variants["symm_gemm"].flop
    assert flop is not None
    return rows + one_of_a_chain(rows, flop, ceilings)


@torch.no_grad()
def _case(name: str, dtype: torch.dtype, settings: Settings) -> Case:
    (x,) = stacks(name, dtype, settings.device)
    if x.shape[1] != x.shape[2]:
        raise ValueError(f"symm_gemm takes square matrices, as in 8x2048x2048, but got {name}")
    count, m, _ = x.shape
    x.div_(m**0.5)
    out, full, moved = torch.empty_like(x), 2.0 * count * m**3, 2.0 * x.nbytes
    square = x[0].double() @ x[0].double().mT
    bounds = {"relative_error": 2 * UNIT[dtype]}
    errors = functools.partial(_errors, square)

    def half(run: Callable[[], Any], version: str) -> Variant:
        return Variant(run, version=version, errors=errors, bounds=bounds, flop=full / 2, bytes=moved)

    variants = {
        BMM: Variant(
            lambda: torch.bmm(x, x.mT), version=torch.__version__, errors=errors, bounds=bounds, flop=full, bytes=moved
        ),
        "symm_gemm": Variant(
            lambda: gemm(x, x.mT, out=out, symmetric=True),
            ours=True,
            errors=functools.partial(_errors, square, symmetric=True),
            bounds={**bounds, "asymmetry": 0.0},
            before=lambda: out.fill_(math.nan),
            flop=full / 2,
            bytes=moved,
        ),
    }
    if polar_chain.supports(x, ((1.0,),)):
        variants["grouped_gemm"] = replace(variants["symm_gemm"], run=functools.partial(alone, x, out))
        ys = torch.empty_like(x)
        cubed = square @ square @ x[0].double()
        for chain, length in CHAINS.items():
            variants[chain] = Variant(
                functools.partial(run_chain, x, ys, length),
                ours=True,
                errors=functools.partial(_errors, cubed),
                bounds=bounds,
                before=lambda: ys.fill_(math.nan),
            )
    if settings.peers:
        variants |= {
            peer.name: half(functools.partial(peer.make(), x), peer.version) for peer in peers.installed("gram")
        }
    return Case("symm_gemm", name, name_of(dtype), variants, BMM)


def _errors(exact: Tensor, results: Tensor | list[Tensor], symmetric: bool = False) -> dict[str, float]:
    y = results[0].double()
    relative = {"relative_error": ((y - exact).norm() / exact.norm()).item()}
    return relative | ({"asymmetry": (y - y.mT).abs().max().item()} if symmetric else {})


@functools.cache
def chain_of(length: int) -> Chain:
    """``length`` equal products of the Gram product with itself, and the last times X."""
    squared: Node = Product("t", "gram", "gram", "gram", 1.0, 0.0)
    return Chain(((squared,) * length) + (Apply("y", "t", "x", 1.0, 0.0),), ((1.0,),), (0,), "y")


def alone(x: Tensor, out: Tensor) -> Tensor:
    """X X^T, into out, which is returned."""
    grouped_gemm([x], [x.mT], out=[out], symmetric=True)
    return out


def run_chain(x: Tensor, y: Tensor, length: int) -> Tensor:
    """(X X^T)^2 X, into y, which is returned."""
    products = chain_of(length)
    slack = torch.empty(len(x), device=x.device)
    numbers = (products.packed, products.constants, products.powers, ())
    polar_chain.polar_chain([x], [y], [slack], *numbers, tight=False, eps=0.0, chunks=1)
    return y


def one_of_a_chain(rows: list[Row], flop: float, ceilings: Ceilings) -> list[Row]:
    """The row of one product more, from those of the two chains."""
    measured: Mapping[str, Row] = {row["variant"]: row for row in rows if row["status"] == OK}
    (long, short), steps = CHAINS, LONG - SHORT
    if long not in measured or short not in measured:
        return []
    row: Row = {key: measured[long][key] for key in ("suite", "case", "dtype", "ours", "version", "relative_error")}
    product_ms = (measured[long]["ms"] - measured[short]["ms"]) / steps
    if product_ms <= 0:
        return [row | {"variant": ONE, "status": "failed: less than the noise"}]
    spread = (measured[long]["spread_ms"] + measured[short]["spread_ms"]) / steps
    row |= {"variant": ONE, "status": OK, "ms": round(product_ms, 5), "spread_ms": round(spread, 5)}
    if BMM in measured:
        row |= {"base": BMM, "ratio": round(measured[BMM]["ms"] / product_ms, 3)}
    return [row | rates(Variant(list, flop=flop), product_ms / 1e3, row["dtype"], ceilings)]
