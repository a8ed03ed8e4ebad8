"""Lists of products: on a CPU in torch and by the op's version for the host, on a GPU by the kernel for Hopper."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from steepest.ops import backend
from steepest.ops.grouped_gemm import STREAMS, TILES, _reason, grouped_gemm
from steepest.ops.polar_chain import hopper_reason

H, B, F, D = torch.float16, torch.bfloat16, torch.float32, torch.float64
needs_extension = pytest.mark.skipif(backend.extension is None, reason=f"{backend.extension_reason}")
CPU = torch.device("cpu")
#: Which way the factors lie, as csrc/symm_gemm/params.h has it: A by rows or columns, B by rows or columns.
MAJORS = {"kk": (True, False), "mnmn": (False, True), "kmn": (True, True)}
Sizes = Sequence[tuple[int, int, int, int]]  # (batch, m, n, k)


def stack(batch: int, m: int, n: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Made where it is used: gigabytes of normal numbers take a CPU seconds."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(batch, m, n, generator=generator, device=device).to(dtype)


class Problem:
    """A list of products with all that they may be given, and what they have to be."""

    def __init__(
        self, sizes: Sizes, dtype: torch.dtype, device: torch.device, *, majors: str = "kk", symmetric: bool = False
    ) -> None:
        make = functools.partial(stack, dtype=dtype, device=device)
        a_by_rows, b_by_rows = MAJORS[majors]
        self.symmetric, self.a, self.b, self.c, self.alpha, self.beta = symmetric, [], [], [], [], []
        for seed, (batch, m, n, k) in enumerate(sizes):
            a = make(batch, m, k, 4 * seed).div_(k**0.5)
            b = a.mT if symmetric else make(batch, k, n, 4 * seed + 1)
            c = make(batch, m, n, 4 * seed + 2)
            self.a.append(a if a_by_rows else a.mT.contiguous().mT)
            self.b.append(b.contiguous() if b_by_rows else b.mT.contiguous().mT)
            self.c.append(c.tril() + c.tril(-1).mT if symmetric else c)
            numbers = torch.randn(2, batch, generator=torch.Generator().manual_seed(4 * seed + 3)).to(device)
            self.alpha.append(numbers[0]), self.beta.append(numbers[1])

    def outs(self) -> list[Tensor]:
        return [torch.full_like(c, torch.nan) for c in self.c]

    def check(self, found: Sequence[Tensor], plain: bool = False, roundings: int = 1) -> None:
        """Against fp32 (fp64 for fp64), up to the roundings of what is stored and of sums in fp32; ``plain`` is A B."""
        for i, out in enumerate(found):
            wide = torch.promote_types(out.dtype, F)
            a, b, c = (x[i].to(wide) for x in (self.a, self.b, self.c))
            alpha, beta = (x[i][:, None, None].to(wide) for x in (self.alpha, self.beta))
            if plain:
                alpha, beta = torch.ones_like(alpha), torch.zeros_like(beta)
            product, rest = alpha * (a @ b), beta * c
            exact, size = product + rest, alpha.abs() * (a.abs() @ b.abs()) + rest.abs()
            unit = roundings * torch.finfo(out.dtype).eps / 2
            bound = unit * (product.abs() + rest.abs()) + 2.0**-14 * size + torch.finfo(out.dtype).smallest_normal
            error = (out.to(wide) - exact).abs()
            assert bool((error <= bound).all()), (i, tuple(out.shape), (error / bound).max())
            assert not self.symmetric or torch.equal(out, out.mT)


SMALL: Sizes = [(3, 24, 40, 16), (1, 8, 8, 72), (2, 72, 64, 8)]
SQUARE: Sizes = [(3, 24, 24, 40), (1, 72, 72, 16), (2, 8, 8, 8)]


@pytest.mark.parametrize("dtype", [H, B, F, D], ids=str)
def test_in_torch(dtype: torch.dtype) -> None:
    for symmetric, sizes in ((False, SMALL), (True, SQUARE)):
        problem = Problem(sizes, dtype, CPU, symmetric=symmetric)
        outs = problem.outs()
        grouped_gemm(
            problem.a,
            problem.b,
            problem.c,
            alpha=problem.alpha,
            beta=problem.beta,
            out=outs,
            symmetric=symmetric,
        )
        problem.check(outs, roundings=3)
        outs = problem.outs()
        grouped_gemm(problem.a, problem.b, out=outs, symmetric=symmetric)
        problem.check(outs, plain=True)


def compiled(problem: Problem, tile: str, streams: str) -> None:
    """What the op makes of a problem, by the version for its device: numbers of each matrix, a number, C in place."""
    op = functools.partial(
        torch.ops.steepest.grouped_gemm,
        symmetric=problem.symmetric,
        tile=TILES.index(tile),
        streams=STREAMS.index(streams),
    )
    outs = problem.outs()
    op(problem.a, problem.b, problem.c, outs, problem.alpha, problem.beta, 0.0, 0.0)
    problem.check(outs)
    plain = problem.outs()
    op(problem.a, problem.b, [], plain, [], [], 1.0, 0.0)
    problem.check(plain, plain=True)
    within = [c.clone() for c in problem.c]
    op(problem.a, problem.b, within, within, problem.alpha, problem.beta, 0.0, 0.0)
    assert all(torch.equal(x, y) for x, y in zip(within, outs, strict=True))


def of_a_device(sizes: Sizes, squares: Sizes, device: torch.device) -> None:
    """Every way that factors lie, both tiles, sums cut and whole."""
    for dtype in (H, B):
        for majors in MAJORS:
            for tile in ("wide", "small"):
                for streams in ("never", "always"):
                    compiled(Problem(sizes, dtype, device, majors=majors), tile, streams)
                    compiled(Problem(squares, dtype, device, majors=majors, symmetric=True), tile, streams)


@needs_extension
def test_the_op_on_the_host() -> None:
    of_a_device(SMALL, SQUARE, CPU)


def opcheck(problem: Problem) -> None:
    lists = (problem.a, problem.b, problem.c, problem.outs(), problem.alpha, problem.beta)
    for out in lists[3]:
        out.zero_()  # NaN is not equal to itself where opcheck compares
    torch.library.opcheck(
        torch.ops.steepest.grouped_gemm.default,
        (*lists, 1.0, 1.0, problem.symmetric),
        test_utils=("test_schema", "test_faketensor"),
    )


@needs_extension
def test_opcheck() -> None:
    opcheck(Problem(SQUARE, H, CPU, symmetric=True))


@needs_extension
@pytest.mark.parametrize(
    "change,message",
    [
        ({"b": []}, "go by one another"),
        ({"alphas": [torch.zeros(2)] * 2}, "go by one another"),
        ({"alphas": [torch.zeros(3)]}, "alphas must be a float32 tensor of 2 elements"),
        ({"a": [torch.zeros(2, 8, 8)]}, "a and b must be float16 or bfloat16"),
        ({"b": [torch.zeros(2, 8, 8, dtype=B)]}, "both of one type"),
        ({"b": [torch.zeros(2, 16, 8, dtype=H)]}, "stacks of matrices that make products"),
        ({"a": [torch.zeros(2, 8, 8, 2, dtype=H)[..., 0]]}, "the rows of a, and the rows or the columns of b"),
        ({"out": [torch.zeros(2, 8, 16, dtype=H)]}, r"out\[0\] must be of the type of a, of shape \(2, 8, 8\)"),
        ({"c": [torch.zeros(2, 8, 8)]}, r"c\[0\] must be of the type of a"),
        ({"symmetric": True, "b": [torch.zeros(2, 8, 16, dtype=H)]}, "it has 8 rows and 16 columns"),
        ({"a": [torch.zeros(0, 8, 8, dtype=H)], "b": [torch.zeros(0, 8, 8, dtype=H)]}, r"a\[0\] or b\[0\] is empty"),
        ({"tile": 3}, "tile is 3"),
        ({"streams": -1}, "streams is -1"),
    ],
)
def test_errors_of_the_op(change: dict[str, Any], message: str) -> None:
    square = torch.zeros(2, 8, 8, dtype=H)
    given: dict[str, Any] = {"a": [square], "b": [square], "c": [], "out": [square.clone()]}
    given |= {"alphas": [], "betas": [], "alpha": 1.0, "beta": 0.0, "symmetric": False, "tile": 0, "streams": 0}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.steepest.grouped_gemm(**(given | change))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"b": []}, "b has 0 tensors for 1 products"),
        ({"c": [torch.zeros(2, 8, 8)] * 2}, "c has 2 tensors for 1 products"),
        ({"alpha": [torch.zeros(3)]}, r"alpha\[0\] has shape \(3,\); it holds a number for each of 2"),
        ({"out": [torch.zeros(2, 8, 9)]}, r"do not fit as \(batch, m, k\), \(batch, k, n\): .*\(2, 8, 9\)"),
        ({"a": [torch.zeros(8, 8)]}, r"a\[0\], b\[0\] and out\[0\] do not fit"),
        ({"a": [torch.zeros(2, 16, 8)], "out": [torch.zeros(2, 16, 8)], "symmetric": True}, "square ones where symm"),
        ({"tile": "huge"}, "tile='huge' is not known; use one of auto, wide, small"),
        ({"streams": "maybe"}, "streams='maybe' is not known; use one of auto, never, always"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    square = torch.zeros(2, 8, 8)
    with pytest.raises(ValueError, match=message):
        grouped_gemm(**({"a": [square], "b": [square], "out": [square.clone()]} | change))


def test_no_products() -> None:
    grouped_gemm([], [], out=[])


def test_what_the_kernel_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing that the op refuses: `factors_reason` has a test of its own."""
    x, out, numbers = torch.zeros(2, 16, 24, dtype=H), torch.zeros(2, 16, 16, dtype=H), torch.zeros(2)
    assert "the tensor is on cpu" in str(_reason([x], [x.mT], [], [out]))
    monkeypatch.setattr("steepest.ops.grouped_gemm.hopper_reason", lambda x: None)
    assert _reason([x], [x.mT], [out[:1].expand(2, -1, -1)], [out], [numbers]) is None
    assert _reason([x.mT], [x], [], [torch.zeros(2, 24, 24, dtype=H)]) is None
    assert "torch.float32" in str(_reason([x], [x.mT.float()], [], [out]))
    assert "torch.bfloat16" in str(_reason([x], [x.mT], [], [out.bfloat16()]))
    assert "(0, 16, 24)" in str(_reason([x[:0]], [x[:0].mT], [], [out[:0]]))
    for other in (out.mT, out[..., ::2], out[:, :, :12].clone(), out[:, :1].expand(-1, 8, -1)):
        assert f"has strides {other.stride()}" in str(_reason([x], [x.mT], [other], [out]))
        assert f"has strides {other.stride()}" in str(_reason([x], [x.mT], [], [other]))
    assert "strides (0, 16, 1)" in str(_reason([x], [x.mT], [], [out[:1].expand(2, -1, -1)]))
    assert "strides (384, 1, 16)" in str(_reason([torch.zeros(2, 24, 16, dtype=H).mT], [x.mT], [], [out]))
    assert "16 bytes" in str(_reason([x], [x.mT], [], [torch.zeros(520, dtype=H)[1:513].view(2, 16, 16)]))
    assert "float32" in str(_reason([x], [x.mT], [], [out], [numbers.double()]))


# ---- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.fixture
def cuda() -> torch.device:
    """Where products in fp32, which others are held against, are fp32."""
    device = torch.device("cuda")
    if (reason := hopper_reason(torch.empty(1, device=device))) is not None:
        pytest.skip(reason)
    assert not torch.backends.cuda.matmul.allow_tf32
    return device


@pytest.mark.gpu
def test_tiny_products_on_a_gpu(cuda: torch.device) -> None:
    """Less than a tile, a tile and a bit more, parts of a sum in several blocks: what a sanitizer is to see."""
    sizes = [(3, 24, 40, 16), (1, 136, 264, 520), (2, 264, 136, 328)]
    of_a_device(sizes, [(3, 24, 24, 40), (1, 264, 264, 520), (2, 136, 136, 8)], cuda)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [H, B], ids=str)
@pytest.mark.parametrize("majors", ["kk", "mnmn"])
@pytest.mark.parametrize("sizes", [(1, 4096, 4096, 4096), (2, 2048, 2048, 8192)], ids=str)
def test_symmetric_streams_of_the_wide_tile(
    sizes: tuple[int, int, int, int], majors: str, dtype: torch.dtype, cuda: torch.device
) -> None:
    """What a single large matrix asks for: cut tiles, mirrored, in clusters of two; the same bits 200 times."""
    assert backend.extension is not None
    count = torch.cuda.get_device_properties(cuda).multi_processor_count
    (launch,) = backend.extension.symm_gemm_plan([(*sizes, majors, True)], count)["launches"]
    if count == 132:
        assert (launch["tile"], launch["cluster"]) == ((128, 256, 64), 2)
        assert launch["steps"] > 0
    problem = Problem([sizes], dtype, cuda, majors=majors, symmetric=True)
    outs = problem.outs()
    run = functools.partial(grouped_gemm, problem.a, problem.b, problem.c, alpha=problem.alpha, beta=problem.beta)
    run(out=outs, symmetric=True)
    problem.check(outs)
    again, same = problem.outs(), torch.ones((), dtype=torch.bool, device=cuda)
    for _ in range(200):
        again[0].fill_(torch.nan)
        run(out=again, symmetric=True)
        same &= (again[0] == outs[0]).all()
    assert bool(same)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [7, 40])
@pytest.mark.parametrize("tile", ["wide", "small"])
def test_many_shapes_in_a_call(tile: Any, count: int, cuda: torch.device) -> None:
    """Tensor maps beyond the first 4 KB of a kernel's arguments, from the fifth shape on; 40 take two launches."""
    for majors in MAJORS:
        for symmetric in (False, True):
            sizes = [
                (1 + i % 3, 72 + 8 * i, 72 + 8 * (i if symmetric else count - i), 64 + 8 * i) for i in range(count)
            ]
            problem = Problem(sizes, H, cuda, majors=majors, symmetric=symmetric)
            outs = problem.outs()
            numbers = {"alpha": problem.alpha, "beta": problem.beta}
            grouped_gemm(problem.a, problem.b, problem.c, **numbers, out=outs, symmetric=symmetric, tile=tile)
            problem.check(outs)


@pytest.mark.gpu
def test_opcheck_on_a_gpu(cuda: torch.device) -> None:
    opcheck(Problem(SQUARE, H, cuda, symmetric=True))
