"""The grouped products of Hopper: ten kernels, both tiles, a cluster of two with multicast, cut tiles, long lists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ptx.kernels import Guards, Kernels
from ptx.products import DTYPES, KK, KMN, MNMN, WEIGHTS, Product, Shape, multiply
from steepest.ops import grouped_gemm

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
    """D, its sums of squares and its diagonal."""
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


@pytest.mark.orders(1)
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
        seen.append((product.D.clone(), product.partials, product.diagonal))
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


# ---- the op ----------------------------------------------------------------------------------------------------------

#: (batch, m, n, k): more than the first 4 KB of a launch's arguments hold, one tile and several, sums that are cut.
SEVEN = (
    (1, 136, 72, 200),
    (2, 40, 264, 72),
    (1, 264, 40, 136),
    (3, 24, 16, 8),
    (1, 8, 200, 520),
    (2, 72, 72, 64),
    (1, 203, 136, 400),
)
GRAMS = ((1, 40, 72), (2, 136, 24), (1, 200, 200), (1, 264, 400), (3, 8, 8), (1, 128, 65), (2, 72, 136))
LAYOUTS = ("a b", "a^T b", "a b^T", "x x^T", "x^T x")


class Call:
    """A call of the op on stacks between guards, in rows that are longer by 8 elements, with what fp64 makes of it."""

    def __init__(self, guards: Guards, layout: str, dtype: torch.dtype, *, scaled: bool, with_c: bool) -> None:
        self.guards, self.dtype, self.symmetric = guards, dtype, "x" in layout
        self.generator = torch.Generator().manual_seed(8)
        self.a: list[Tensor] = []
        self.b: list[Tensor] = []
        for batch, m, *n, k in GRAMS if self.symmetric else SEVEN:
            if layout.startswith(("a^T", "x^T")):
                self.a.append(self.stack(batch, k, m).mT)
            else:
                self.a.append(self.stack(batch, m, k))
            if self.symmetric:
                self.b.append(self.a[-1].mT)
            else:
                self.b.append(self.stack(batch, *n, k).mT if "b^T" in layout else self.stack(batch, k, *n))
        shapes = [(len(x), x.shape[1], y.shape[2]) for x, y in zip(self.a, self.b, strict=True)]
        self.out = [self.stack(*shape).fill_(torch.nan) for shape in shapes]
        self.c = [self.stack(*shape) for shape in shapes] if with_c else []
        if self.symmetric:
            for each in self.c:
                each.copy_(each.tril() + each.tril(-1).mT)
        numbers = [[torch.randn(len(x), generator=self.generator) for x in self.a] for _ in range(2)]
        self.alphas, self.betas = ([guards.twin(x) for x in some] if scaled else [] for some in numbers)

    def stack(self, batch: int, rows: int, columns: int) -> Tensor:
        x = torch.randn(batch, rows, -(-columns // 8) * 8 + 8, generator=self.generator).to(self.dtype)
        return self.guards.twin(x[..., :columns])

    def __call__(self, kernels: Kernels, tile: str, streams: str) -> None:
        lists = (self.a, self.b, self.c, self.out, self.alphas, self.betas)
        choices = (self.symmetric, grouped_gemm.TILES.index(tile), grouped_gemm.STREAMS.index(streams))
        kernels.ops.grouped_gemm(*lists, 0.75, -1.5, *choices)

    def check(self) -> None:
        for i, (a, b, out) in enumerate(zip(self.a, self.b, self.out, strict=True)):
            alpha, beta = (
                some[i].double()[:, None, None] if some else number
                for some, number in ((self.alphas, 0.75), (self.betas, -1.5))
            )
            exact, size = alpha * (a.double() @ b.double()), abs(alpha) * (a.double().abs() @ b.double().abs())
            if self.c:
                exact, size = exact + beta * self.c[i].double(), size + (beta * self.c[i].double()).abs()
            bound = exact.abs() * torch.finfo(self.dtype).eps * 0.5 + size * a.shape[2] ** 0.5 * 2**-23 + 1e-7
            assert ((out.double() - exact).abs() <= bound).all(), i
            if self.symmetric:
                assert torch.equal(out, out.mT), "symmetric to the bit"


@tiles
@pytest.mark.parametrize("streams", ["never", "always"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_op(layout: str, dtype: str, streams: str, tile: str, kernels: Kernels, guards: Guards) -> None:
    """Seven shapes in a launch. Numbers for each matrix, or one for all; with C, and without."""
    cut = streams == "always"
    call = Call(guards, layout, DTYPES[dtype], scaled=cut, with_c=cut == (dtype == "f16"))
    before = kernels.launches()
    call(kernels, tile, streams)
    assert kernels.launches() - before == 1
    call.check()


@pytest.mark.orders(1)
@pytest.mark.parametrize("layout", ["a b", "x x^T"])
def test_the_op_in_any_order(layout: str, kernels: Kernels, guards: Guards) -> None:
    """Cut sums are added up in one order, whoever comes last."""
    results: list[Sequence[Tensor]] = []
    for seed in (1, 2):
        kernels.seed(seed)
        call = Call(guards, layout, torch.float16, scaled=True, with_c=True)
        call(kernels, "small", "always")
        results.append(call.out)
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


def test_the_op_in_place(kernels: Kernels, guards: Guards) -> None:
    apart = Call(guards, "x^T x", torch.bfloat16, scaled=True, with_c=True)
    apart(kernels, "wide", "never")
    within = Call(guards, "x^T x", torch.bfloat16, scaled=True, with_c=True)
    within.out = within.c
    within(kernels, "wide", "never")
    for x, y in zip(apart.out, within.out, strict=True):
        assert torch.equal(x, y)
