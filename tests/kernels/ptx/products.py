"""Lists of grouped products as csrc/symm_gemm takes them, on guarded memory, with what fp64 makes of them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from ptx.kernels import Kernels

KK, MNMN, KMN = range(3)  # Majors
DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}
WEIGHTS = {"f32": torch.float32, **DTYPES}
NUMBERS = [torch.float32, torch.bfloat16, torch.float16]  # in the order of steepest::Dtype


@dataclass(frozen=True)
class Shape:
    """As params.h has it; where no strides are given, rows in memory begin at multiples of 8 elements."""

    batch: int
    m: int
    n: int
    k: int
    majors: int = KK
    symmetric: bool = True
    a: tuple[int, int] | None = None
    b: tuple[int, int] | None = None
    c: tuple[int, int] | None = None
    d: tuple[int, int] | None = None
    has_c: bool = False

    def memory(self) -> dict[str, tuple[int, int]]:
        """Rows and columns in memory of each matrix."""
        a = (self.k, self.m) if self.majors == MNMN else (self.m, self.k)
        b = (self.n, self.k) if self.majors == KK else (self.k, self.n)
        return {"a": a, "b": b, "c": (self.m, self.n), "d": (self.m, self.n)}

    def strides(self, name: str) -> tuple[int, int]:
        rows, columns = self.memory()[name]
        given: tuple[int, int] | None = getattr(self, name)
        row = -(-columns // 8) * 8
        return given if given is not None else (row, rows * row)

    def numbers(self) -> list[int]:
        strides = [each for name in "abcd" for each in self.strides(name)]
        return [*map(int, astuple(self)[:6]), *strides, int(self.has_c)]


def room(rows: int, columns: int, batch: int, strides: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """NaN with 64 elements more at both ends, and the matrices in it."""
    row, matrix = strides
    whole = torch.full((64 + (batch - 1) * matrix + (rows - 1) * row + columns + 64,), torch.nan, dtype=dtype)
    return whole, whole.as_strided((batch, rows, columns), (matrix, row, 1), 64)


class Product:
    """One problem: what nobody may write is NaN before and after."""

    def __init__(
        self,
        shape: Shape,
        dtype: str,
        seed: int = 1,
        *,
        in_place: bool = False,
        tallies: bool = False,
        weights: str | None = None,
    ) -> None:
        self.shape, self.dtype, self.tallies = shape, DTYPES[dtype], tallies
        generator = torch.Generator().manual_seed(seed)
        self.rooms = {
            name: room(*shape.memory()[name], shape.batch, shape.strides(name), self.dtype) for name in "abcd"
        }
        for _, inside in self.rooms.values():
            inside.copy_(torch.randn(inside.shape, generator=generator))
        a, b = self.rooms["a"][1], self.rooms["b"][1]
        self.A = a.mT if shape.majors == MNMN else a
        if shape.symmetric:  # A B is a Gram product
            b.copy_(self.A if shape.majors == KK else self.A.mT)
        self.B = b.mT if shape.majors == KK else b
        self.D = self.rooms["d"][1]
        self.C = self.D if in_place else self.rooms["c"][1]
        if shape.symmetric:
            self.C.copy_(self.C.tril() + self.C.tril(-1).mT)
        self.before = self.C.double().clone()
        if shape.symmetric:  # above the diagonal nobody looks
            self.C.masked_fill_(torch.ones(self.C.shape[1:], dtype=torch.bool).triu(1), torch.nan)
        if not in_place:
            self.D.fill_(torch.nan)
        self.scalars = [torch.randn(shape.batch, generator=generator) for _ in range(3)]
        self.weights: list[tuple[Tensor, Tensor]] = []
        if weights is not None:
            sizes = (shape.m, shape.n, 1, shape.strides("d"), WEIGHTS[weights])
            self.weights = [room(*sizes) for _ in range(shape.batch)]
            for _, inside in self.weights:
                inside.copy_(torch.randn(inside.shape, generator=generator))
            self.weights_before = [inside.double().clone() for _, inside in self.weights]
            self.eta = torch.randn(shape.batch, generator=generator)
            if shape.batch > 1:  # the last is not taken, whatever the product is
                a[-1], self.eta[-1], self.scalars[1][-1] = torch.nan, 0, 1

    def make_tallies(self, partials: int) -> None:
        shape = self.shape
        self.partials = torch.full((shape.batch, partials), torch.nan)
        self.diagonal = torch.full((shape.batch, shape.m), torch.nan)

    def check(self) -> None:
        """D, or the weights, and what is left beside them."""
        if self.weights:
            self._check_weights()
        else:
            self._check_stored()

    def _check_stored(self) -> None:
        shape = self.shape
        alpha, beta, gamma = (each.double()[:, None, None] for each in self.scalars)
        product = self.A.double() @ self.B.double()
        exact = alpha * product + gamma * torch.eye(shape.m, shape.n, dtype=torch.float64)
        size = alpha.abs() * (self.A.double().abs() @ self.B.double().abs()) + gamma.abs()
        if shape.has_c:
            exact, size = exact + beta * self.before, size + (beta * self.before).abs()
        # One rounding of D, and fp32 for the sums.
        bound = exact.abs() * torch.finfo(self.dtype).eps * 0.5 + size * shape.k**0.5 * 2**-23 + 1e-7
        assert ((self.D.double() - exact).abs() <= bound).all()
        assert_untouched(*self.rooms["d"])
        if shape.symmetric:
            assert torch.equal(self.D, self.D.mT), "symmetric to the bit"
        if self.tallies:
            diagonal = exact.diagonal(dim1=-2, dim2=-1)
            length = diagonal.shape[-1]
            torch.testing.assert_close(self.diagonal[:, :length].double(), diagonal, rtol=1e-5, atol=1e-3)
            off = exact.square().sum((-2, -1)) - diagonal.square().sum(-1)
            torch.testing.assert_close(self.partials.double().sum(-1), off, rtol=1e-5, atol=1e-6)

    def _check_weights(self) -> None:
        """W <- beta W + alpha eta A B in place, each W in memory of its own."""
        shape = self.shape
        for i, ((whole, inside), before) in enumerate(zip(self.weights, self.weights_before)):
            assert_untouched(whole, inside)
            if shape.batch > 1 and i == shape.batch - 1:
                assert torch.equal(inside.double(), before)
                continue
            factor, beta = (self.scalars[0][i] * self.eta[i]).double(), self.scalars[1][i].double()
            A, B = self.A[i].double(), self.B[i].double()
            exact = beta * before + factor * (A @ B)
            size = factor.abs() * (A.abs() @ B.abs()) + before.abs()
            bound = exact.abs() * torch.finfo(inside.dtype).eps * 0.5 + size * shape.k**0.5 * 2**-22 + 1e-7
            assert ((inside.double() - exact).abs() <= bound).all()


def assert_untouched(whole: Tensor, inside: Tensor) -> None:
    outside = torch.ones_like(whole, dtype=torch.bool)
    outside.as_strided(inside.shape, inside.stride(), inside.storage_offset()).fill_(False)
    assert whole[outside].isnan().all(), "written beside a matrix"


class _Product(ctypes.Structure):
    """`Product` in door.cpp."""

    _fields_ = (
        ("shape", ctypes.c_int64 * 15),
        *((name, ctypes.c_void_p) for name in "abcd"),
        *((name, ctypes.c_void_p) for name in ("alpha", "beta", "gamma", "eta")),
        *((name, ctypes.c_void_p) for name in ("partials", "diagonal")),
        ("weights", ctypes.c_void_p),
        ("weights_dtype", ctypes.c_int32),
    )


@dataclass(frozen=True)
class Launches:
    """Of a list, and how many of them cut tiles."""

    count: int
    cut: int


def multiply(kernels: Kernels, products: Sequence[Product]) -> Launches:
    """Runs a list of problems of one type; fails where a kernel does."""
    library = kernels.library
    library.door_products.restype = ctypes.c_char_p
    packed = (_Product * len(products))()
    partials, launches, cut = (ctypes.c_int64 * len(products))(), ctypes.c_int(), ctypes.c_int()
    dtype = NUMBERS.index(products[0].dtype)
    kept = []

    def call(run: bool) -> str | None:
        numbers = (packed, len(products), dtype, run, partials, ctypes.byref(launches), ctypes.byref(cut))
        error = library.door_products(*numbers)
        return None if error is None else error.decode()

    def known(t: Tensor, written: bool) -> int:
        reach = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride()))
        library.door_remember(ctypes.c_void_p(t.data_ptr()), ctypes.c_uint64(reach * t.element_size()), written)
        return t.data_ptr()

    for to, product in zip(packed, products):
        to.shape[:] = product.shape.numbers()
        if product.weights:
            to.weights = 1  # only whether there are any
    assert (error := call(False)) is None, error
    for to, product, count in zip(packed, products, partials):
        for name in "ab":
            setattr(to, name, known(product.rooms[name][1], False))
        to.alpha, to.beta, to.gamma = (known(each, False) for each in product.scalars)
        if product.weights:
            addresses = (ctypes.c_void_p * product.shape.batch)(*(known(w, True) for _, w in product.weights))
            kept.append(addresses)
            to.weights, to.eta = ctypes.addressof(addresses), known(product.eta, False)
            to.weights_dtype = NUMBERS.index(product.weights[0][1].dtype)
            continue
        to.d = known(product.D, True)
        to.c = known(product.C, False) if product.shape.has_c else None
        if product.tallies:
            product.make_tallies(count)
            to.partials, to.diagonal = known(product.partials, True), known(product.diagonal, True)
    error = call(True)
    if error is not None:
        raise RuntimeError(error)
    return Launches(launches.value, cut.value)
