"""The grouped products of Hopper: ten kernels, both tiles, a cluster of two with multicast, cut tiles, long lists."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ptx.kernels import Kernels
from ptx.products import DTYPES, KK, KMN, MNMN, WEIGHTS, Product, Shape, multiply

pytestmark = pytest.mark.kernels

tiles = pytest.mark.parametrize("tile", ["wide", "small"])

#: Of every pair of majors one that fits and one that does not; more than a tile and a k tile, padding, one row.
STORED = {
    "one tile": (Shape(1, 128, 128, 64), "f16"),
    "less than a chunk": (Shape(2, 40, 40, 24, MNMN, has_c=True), "bf16"),
    "ragged": (Shape(1, 328, 328, 72, KK, has_c=True), "bf16"),
    "padded": (Shape(2, 136, 136, 24, KMN, c=(144, 20000), d=(152, 21000), has_c=True), "f16"),
    "several k tiles": (Shape(1, 136, 136, 328, MNMN, has_c=True), "f16"),
    "tall": (Shape(1, 403, 72, 33, KK, symmetric=False, a=(40, 16120), b=(40, 2880), has_c=True), "f16"),
    "flat": (Shape(1, 72, 520, 33, KMN, symmetric=False, a=(40, 2880)), "bf16"),
    "transposed": (Shape(1, 136, 264, 96, MNMN, symmetric=False), "bf16"),
}


@tiles
@pytest.mark.parametrize("case", STORED)
def test_a_product(case: str, tile: str, kernels: Kernels) -> None:
    """D, its sums of squares, its diagonal and its sums of rows."""
    kernels.plan(tile, "never")
    product = Product(*STORED[case], tallies=True)
    multiply(kernels, [product])
    product.check()


@tiles
@pytest.mark.parametrize("case", ["less than a chunk", "padded", "tall"])
def test_in_place(case: str, tile: str, kernels: Kernels) -> None:
    shape, dtype = STORED[case]
    kernels.plan(tile, "never")
    product = Product(replace(shape, c=shape.d), dtype, seed=2, in_place=True)
    multiply(kernels, [product])
    product.check()


#: Products whose tiles are cut, the tile, and multiprocessors.
CUT = {
    "fewer tiles than clusters": (
        Shape(1, 200, 200, 700, KK, a=(704, 140800), b=(704, 140800), has_c=True),
        "small",
        8,
    ),
    "streams within a tile": (Shape(1, 64, 64, 1000, MNMN), "small", 5),
    "a wave and a half": (Shape(2, 200, 200, 400, MNMN, has_c=True), "small", 4),
    "wide": (Shape(1, 264, 264, 448, KK), "wide", 4),
    "not symmetric": (Shape(1, 140, 264, 520, KMN, symmetric=False, has_c=True), "wide", 6),
}


@pytest.mark.parametrize("case", CUT)
def test_cut_tiles_do_not_depend_on_who_is_last(case: str, kernels: Kernels) -> None:
    shape, tile, multiprocessors = CUT[case]
    seen = []
    for seed in (1, 2, 3):
        kernels.reset(seed=seed, multiprocessors=multiprocessors)
        kernels.plan(tile, "always")
        product = Product(shape, "f16", seed=3, tallies=True)
        assert multiply(kernels, [product]).cut == 1
        product.check()
        seen.append((product.D.clone(), product.partials, product.diagonal, product.row_sums))
    for other in seen[1:]:
        for a, b in zip(seen[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_c_does_not_count_where_beta_is_zero(beta: float, kernels: Kernels) -> None:
    kernels.plan("small", "never")
    product = Product(Shape(1, 64, 64, 16, has_c=True), "bf16", seed=4)
    product.scalars[1].fill_(beta)
    product.C.fill_(torch.nan)
    multiply(kernels, [product])
    assert bool(product.D.isnan().all()) == (beta != 0)
    assert bool(product.D.isnan().any()) == (beta != 0)


@tiles
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("majors", [KK, KMN, MNMN])
def test_many_shapes_in_a_launch(majors: int, dtype: str, tile: str, kernels: Kernels) -> None:
    """Of the arguments of a launch the first problems lie in its first 4 KB; the longest sums come first."""
    sizes = ((40, 40, 72), (64, 24, 136), (136, 40, 8), (8, 8, 8), (24, 136, 64), (72, 64, 24), (16, 128, 200))
    shapes = [Shape(1 + i % 2, *size, majors, symmetric=False) for i, size in enumerate(sizes)]
    products = [Product(shape, dtype, seed=i, tallies=True) for i, shape in enumerate(shapes)]
    kernels.plan(tile, "never")
    assert multiply(kernels, products).count == 1
    for product in products:
        product.check()


UPDATES = {
    "ragged": Shape(2, 203, 72, 33, KK, symmetric=False, a=(40, 8120), b=(40, 2880)),
    "tiles across": Shape(2, 72, 328, 40, KMN, symmetric=False),
    "padded": Shape(3, 130, 136, 64, KMN, symmetric=False, d=(152, 152 * 130)),
}


@tiles
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", UPDATES)
def test_update(case: str, dtype: str, weights: str, tile: str, kernels: Kernels) -> None:
    kernels.plan(tile, "never")
    product = Product(UPDATES[case], dtype, seed=5, weights=weights)
    multiply(kernels, [product])
    product.check()


@tiles
@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_cut_update(weights: str, tile: str, kernels: Kernels) -> None:
    kernels.plan(tile, "always")
    rows = 200 if tile == "wide" else 300  # a tile of a cluster of two; six tiles for four blocks
    product = Product(Shape(1, rows, 136, 520, KMN, symmetric=False), "bf16", seed=6, weights=weights)
    assert multiply(kernels, [product]).cut == 1
    product.check()
