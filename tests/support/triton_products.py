"""Problems for Triton's batched products, which the interpreter, a GPU and the simulator of PTX solve."""

from __future__ import annotations

import ctypes
import mmap
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from steepest.kernels import symm_gemm as kernels

NAN = float("nan")
H, B, F = torch.float16, torch.bfloat16, torch.float32
GUARD = 7.0  # around the output


@dataclass
class Case:
    """Operands of one call. place: of c, "absent", "apart" or "out"; symmetric: the product is. beta may be None."""

    a: Tensor
    b: Tensor
    c: Tensor
    place: str
    alpha: Tensor | float
    beta: Tensor | float | None
    gamma: Tensor | float
    symmetric: bool
    padding: int  # elements between the rows of the output
    precision: kernels.Precision = "ieee"
    chosen: kernels.Configuration | None = None  # in place of the model's choice

    def __str__(self) -> str:
        numbers = "/".join("tensor" if isinstance(x, Tensor) else str(x) for x in (self.alpha, self.beta, self.gamma))
        strides = [x.stride() for x in (self.a, self.b, self.c)]
        operands = f"{[*self.a.shape]} x {[*self.b.shape]}, strides {strides}, c {self.place}, {numbers}"
        return f"{operands}, {self.symmetric=}, {self.precision}, {self.chosen}"

    def part(self, matrices: slice) -> Case:
        def of(x: Tensor | float | None) -> Any:
            return x[matrices] if isinstance(x, Tensor) else x

        named = ("a", "b", "c", "alpha", "beta", "gamma")
        return replace(self, **{name: of(getattr(self, name)) for name in named})

    def run(self) -> Tensor:
        """The kernel's result; what surrounds it in memory must stay."""
        batch, m, n = self.c.shape
        room = torch.full((batch, m + 2, n + self.padding), GUARD, dtype=self.c.dtype, device=self.c.device)
        out = room[:, 1 : m + 1, :n]
        out.copy_(self.c) if self.place == "out" else out.fill_(NAN)
        c = {"absent": None, "apart": self.c, "out": out}[self.place]
        numbers = (self.alpha, self.beta, self.gamma)
        options: dict[str, Any] = {"precision": self.precision, "chosen": self.chosen}
        kernels.product(self.a, self.b, c, *numbers, out, symmetric=self.symmetric, **options)
        result = out.clone()
        out.fill_(GUARD)
        assert bool((room == GUARD).all()), f"{self}: written outside the output"
        return result

    def exact(self) -> tuple[Tensor, Tensor]:
        """The result in fp64 and the magnitude of what was added up for it."""
        a, b, c = self.a.double(), self.b.double(), self.c.double()
        if self.symmetric:
            c = c.tril() + c.tril(-1).mT
        if self.place == "absent" or (isinstance(self.beta, float) and self.beta == 0):
            c = torch.zeros_like(c)
        eye = torch.eye(*c.shape[1:], dtype=torch.float64, device=c.device)
        numbers: list[Any] = [self.alpha, self.beta, self.gamma]
        alpha, beta, gamma = (x.double().view(-1, 1, 1) if isinstance(x, Tensor) else x for x in numbers)
        magnitude = abs(alpha) * (a.abs() @ b.abs()) + abs(gamma) * eye
        if beta is None:  # the difference from c is rounded as well
            magnitude, beta = magnitude + abs(alpha) * c.abs(), 1 - alpha
        return alpha * (a @ b) + beta * c + gamma * eye, magnitude + abs(beta) * c.abs()

    def bound(self, wanted: Tensor, magnitude: Tensor) -> Tensor:
        """One rounding to the output's type, and sums in fp32; fp16 has no number between 0 and 6e-8."""
        dtype = self.c.dtype
        of_a_term = 2.0**-9 if self.precision == "tf32" else 2.0**-17
        return torch.finfo(dtype).eps / 2 * wanted.abs() + of_a_term * magnitude + (3e-8 if dtype == H else 1e-30)

    def check(self, result: Tensor) -> None:
        wanted, magnitude = self.exact()
        error, bound = (result.double() - wanted).abs(), self.bound(wanted, magnitude)
        assert bool((error <= bound).all()), f"{self}: off by {error.max()}, {(error / bound).max()} times what may be"
        if self.symmetric:
            assert torch.equal(result, result.mT), f"{self}: not symmetric"


def operand(batch: int, rows: int, columns: int, by_rows: bool, padding: int) -> Tensor:
    """Standard normal fp32 numbers of contiguous rows, or columns, that lie so many elements apart."""
    if not by_rows:
        return operand(batch, columns, rows, True, padding).mT
    return torch.randn(batch, rows + padding % 3, columns + padding)[:, :rows, :columns]


def before_a_wall(x: Tensor) -> Tensor:
    """The same numbers and strides in memory after which comes a page that nobody may touch."""
    extent = (1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride()))) * x.itemsize if x.numel() else 0
    end = -(-extent // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, end + mmap.PAGESIZE)
    wall = ctypes.addressof(ctypes.c_char.from_buffer(memory, end))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(wall), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    begin = end - -(-extent // 16) * 16
    room = torch.frombuffer(memory, dtype=torch.uint8)[begin : begin + extent].view(x.dtype)
    return room.as_strided(x.shape, x.stride()).copy_(x)


def cases(device: torch.device, dtype: torch.dtype, count: int, largest: int) -> Iterator[Case]:
    """All layouts, places of c and ways to give numbers in turn, sizes at random."""
    torch.manual_seed(0)
    draw = random.Random(0)
    for turn in range(count):
        symmetric = turn % 2 == 0
        step = draw.choice([1, 1, 8])  # sizes that are multiples of 8 go another way
        m, n, k = (draw.randint(1, largest // step) * step for _ in range(3))
        m, k = {0: (m, 0), 6: (1, k), 7: (1, 1)}.get(turn, (m, k))
        n = m if symmetric else n
        batch = (3, 1, 3, 0, 2)[turn % 5]
        padding = draw.choice([0, 1, 7]) if step == 1 else draw.choice([0, 8])
        yield make_case(draw, turn, dtype, (batch, m, n, k), symmetric, padding, device)


def make_case(
    draw: random.Random,
    turn: int,
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int],  # of the batch, m, n, k
    symmetric: bool,
    padding: int,
    device: torch.device,
    into: torch.dtype | None = None,
) -> Case:
    """Layouts, the place of c and the way to give numbers are those of the turn. into: of c and the output."""
    batch, m, n, k = sizes
    by_rows = [bool(turn // 2 & 1), bool(turn // 4 & 1), bool(turn // 8 & 1)]
    a = operand(batch, m, k, by_rows[0], padding)
    b = operand(batch, k, n, by_rows[1], padding)
    c = operand(batch, m, n, by_rows[2], padding)
    a, b, c = ((x * k**-0.25 if k else x).to(dtype).to(device) for x in (a, b, c))
    c = c if into is None else c.to(into)
    alpha, beta, gamma = (draw.choice([1.0, -0.5, 3.25]) for _ in range(3))
    given: tuple[Any, ...] = (alpha, draw.choice([beta, 0.0]), draw.choice([gamma, 0.0]) if m == n else 0.0)
    table = torch.randn(max(batch, 1), 16, device=device)
    columns = (table[:batch, 3], table[:batch, 5], table[:1, 7].expand(batch))
    if turn % 3 == 1:
        given = (*columns[:2], columns[2] if m == n else 0.0)
    elif turn % 6 == 2:
        given = (alpha, table[0].view(16)[:batch], 0.0) if batch > 1 else given
    if device.type == "cpu":
        a, b, c = map(before_a_wall, (a, b, c))
    if symmetric:
        b.copy_(a.mT)
        c.masked_fill_(torch.ones(m, m, dtype=torch.bool, device=device).triu(1), NAN)
    place = ("absent", "apart", "out")[turn // 2 % 3]
    if isinstance(given[1], float) and given[1] == 0:
        c.fill_(NAN)
    return Case(a, b, c, place, *given, symmetric, padding)


def compare(device: torch.device, dtype: torch.dtype, count: int, largest: int) -> None:
    for case in cases(device, dtype, count, largest):
        found = case.run()
        case.check(found)
        for i in range(len(found)):
            assert torch.equal(case.part(slice(i, i + 1)).run(), found[i : i + 1]), f"{case}: {i} differs when alone"
        if len(found) > 1:
            case.a[1] = NAN
            again = case.run()
            kept = [i for i in range(len(found)) if i != 1]
            assert torch.equal(again[kept], found[kept]), f"{case}: a NaN spreads to other matrices"
            assert bool(again[1].isnan().all()) or case.a.shape[2] == 0, f"{case}: a NaN is lost"


def tma_changes_no_bit(device: torch.device, dtype: torch.dtype, count: int, largest: int) -> None:
    """Whatever configuration it goes with."""
    described: list[Any] = []
    choose, boxes = kernels._choose, kernels._boxes

    def describe(*given: Any) -> Any:
        described.append(boxes(*given))
        return described[-1]

    for case in cases(device, dtype, count, largest):
        by_address = case.run()
        try:
            kernels._choose = lambda *asked: replace(choose(*asked), tma=True)
            kernels._boxes = describe
            by_tma = case.run()
        finally:
            kernels._choose, kernels._boxes = choose, boxes
        assert torch.equal(by_address.view(torch.uint8), by_tma.view(torch.uint8)), str(case)
    assert len(described) > count // 4, f"{len(described)} of {2 * count} operands had descriptors"


def far_apart(device: torch.device) -> None:
    """Matrices, rows of one tile and rows of two, 2^31 elements apart in memory of which only theirs is touched."""
    room = torch.empty(2**31 + 256, device=device)
    for shape, strides in (((2, 3, 5), (2**31, 5, 1)), ((1, 3, 5), (0, 2**30, 1)), ((1, 33, 5), (0, 2**26, 1))):
        for rows in (True, False):
            a = room.as_strided(shape, strides)
            a.copy_(torch.arange(a.numel()).view(shape))
            b = torch.eye(5).expand(shape[0], 5, 5).to(device)
            a, b, m, n = (a, b, *shape[1:]) if rows else (b, a.mT, 5, shape[1])
            out = torch.zeros(shape[0], m, n, device=device)
            kernels.product(a, b, None, 1.0, 0.0, 0.0, out, symmetric=False)
            assert torch.equal(out, torch.bmm(a, b)), f"{shape}, {strides}, {rows=}: {out}"
        out = room.as_strided(shape, strides)
        a = torch.randn(shape, device=device)
        kernels.product(a, torch.eye(5).expand(shape[0], 5, 5).to(device), a, 1.0, 1.0, 0.0, out, symmetric=False)
        assert torch.equal(out, 2 * a)
