"""Polar factors of matrices whose long side lies on several ranks, against fp64 and against whole matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from steepest.linalg.coefficients import SCHEDULES, schedule
from steepest.linalg.polar import choose_sharded, gram_elements, polar, sharded_polars
from steepest.parts.direction import Frobenius, Spectral
from support.processes import Processes
from support.ranks import Ranks
from support.singular_values import SPECTRA, gaussian, polynomial_of, with_spectrum
from support.slow import slow

PRESETS = (*(name for name in SCHEDULES if name != "exact"), "polar_express")  # "jordan" and "exact" are one
DIFFERENT = ("auto", "jordan", "polar_express")  # the others' tables have other numbers and no other nodes
ROWS, COLUMNS = -2, -1
#: What the docstring states, by compute dtype, and for single presets.
BOUNDS: dict[torch.dtype, dict[str, float]] = {
    torch.float64: {"": 1e-11},
    torch.float32: {"": 1e-4, "turbo": 1e-3},
    torch.float16: {"": 0.06, "turbo": 0.1, "tight_4e-3": 0.2},
}
LARGEST = 1.3


def bound_of(dtype: torch.dtype, preset: str) -> float:
    return BOUNDS[dtype].get(preset, BOUNDS[dtype][""])


def sharded(
    x: Tensor,
    sizes: Sequence[int],
    preset: str = "auto",
    dim: int = ROWS,
    ranks: Ranks | None = None,
    **options: object,
) -> Tensor:
    """The polar factor of x (..., m, n), cut into parts of these sizes along dim and put together again."""
    parts = x.split(list(sizes), dim)
    ranks = ranks or Ranks(len(sizes))
    found = ranks.run(
        lambda rank, all_reduce: sharded_polars([parts[rank]], [dim], all_reduce, preset, **options)[0]  # type: ignore[arg-type]
    )
    assert [d.shape for d in found] == [part.shape for part in parts]
    assert {d.dtype for d in found} == {x.dtype}
    return torch.cat(found, dim)


def distance(x: Tensor, y: Tensor) -> float:
    return ((x.double() - y.double()).norm() / math.sqrt(min(x.shape[-2:]))).item()


def of_every_spectrum(m: int, n: int) -> Tensor:
    return torch.stack([with_spectrum(m, n, name) for name in ("gaussian", *SPECTRA)])


def assert_the_polynomial(x: Tensor, y: Tensor, preset: str, bound: float) -> None:
    """x, y: (batch, m, n)."""
    for one, found in zip(x, y, strict=True):
        assert distance(found, polynomial_of(one, schedule(preset, None, None))) <= bound
        assert torch.linalg.matrix_norm(found.double(), 2) <= LARGEST


@pytest.mark.parametrize(
    "preset, dtype",
    [
        *((preset, torch.float64) if preset in DIFFERENT else slow(preset, torch.float64) for preset in PRESETS),
        *((preset, torch.float32) if preset in DIFFERENT else slow(preset, torch.float32) for preset in PRESETS),
    ],
)
def test_it_is_the_polynomial_of_the_singular_values(preset: str, dtype: torch.dtype) -> None:
    """Of even, uneven and empty parts."""
    bound = bound_of(dtype, preset)
    for shape, sizes in (((200, 160), (50,) * 4), ((300, 65), (200, 0, 100)), ((1000, 33), (999, 1)), ((40, 1), (40,))):
        x = of_every_spectrum(*shape)
        y = sharded(x.to(dtype), sizes, preset)
        assert_the_polynomial(x, y, preset, bound)
        for found, whole in zip(y, polar(x.to(dtype), preset, form="gram", dtype=dtype)):
            assert distance(found, whole) <= 2 * bound


@pytest.mark.slow
@pytest.mark.parametrize("preset", [name if name in DIFFERENT else slow(name) for name in PRESETS])
def test_in_16_bits(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, whose fp16 the door refuses here."""
    monkeypatch.setattr("steepest.linalg.polar.sharded.check", lambda *_: None)
    for shape, sizes in (((200, 160), (70, 130)), ((400, 130), (200, 0, 200))):
        x = of_every_spectrum(*shape)
        y = sharded(x.float(), sizes, preset, dtype=torch.float16)
        assert_the_polynomial(x, y, preset, bound_of(torch.float16, preset))


def test_sides() -> None:
    """Columns are rows of the transpose; a short side that is sharded gives a polar factor at another price."""
    x = gaussian(160, 48)
    y = sharded(x, (100, 60))
    assert distance(sharded(x.mT.contiguous(), (100, 60), dim=COLUMNS), y.mT) <= 1e-11
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    assert distance(sharded(x, (20, 28), dim=COLUMNS), u @ vh) <= 0.01


def test_ten_steps_give_the_polar_factor() -> None:
    x = with_spectrum(150, 60, "linear")
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    once = sharded(x, (60, 50, 40), "polar_express", steps=10)
    assert distance(once, u @ vh) <= 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_inputs_are_computed_in_fp32(dtype: torch.dtype) -> None:
    x = gaussian(96, 40).to(dtype)
    y = sharded(x, (50, 46))
    assert torch.equal(y, sharded(x.float(), (50, 46)).to(dtype))


def test_what_a_gpu_computes_in() -> None:
    def dtype_of(short: int, x: torch.dtype = torch.bfloat16, device: str = "cuda") -> torch.dtype:
        return choose_sharded(short, device=device, x_dtype=x).dtype

    assert [dtype_of(127), dtype_of(128)] == [torch.float32, torch.float16]
    assert dtype_of(1024, torch.float64) == torch.float64
    assert dtype_of(1024, device="cpu") == torch.float32
    assert choose_sharded(1024, "jordan", device="cuda").restarts == (3,)
    assert choose_sharded(1024, "turbo", device="cuda").restarts == ()


@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e30, 1e38])
def test_the_scale_does_not_matter(size: float) -> None:
    """1e-40 is subnormal and has fewer digits; no square of these is an fp32 number."""
    x = gaussian(64, 24).float()
    y, expected = sharded((x / x.abs().max()) * size, (30, 30, 4)), sharded(x, (30, 30, 4))
    assert distance(y, expected) <= (1e-3 if size < 1e-38 else 1e-5)


def test_parts_of_different_scales() -> None:
    x = gaussian(90, 20).float()
    x[:30] *= 1e-20
    assert distance(sharded(x, (30, 30, 30)), polar(x, form="gram", dtype=torch.float32)) <= 1e-5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_on_one_rank_is_nan_on_all(bad: float) -> None:
    x = torch.stack([gaussian(60, 20), torch.zeros(60, 20), gaussian(60, 20, 1)])
    y = sharded(x, (30, 30))
    broken = x.clone()
    broken[0, 45, 3] = bad
    found = sharded(broken, (30, 30))
    assert found[0].isnan().all()
    assert torch.equal(found[1:], y[1:])
    assert not y[1].any()


def test_slacks_are_those_of_whole_matrices() -> None:
    x = torch.stack([gaussian(60, 20), with_spectrum(60, 20, "rank 1")]).float()
    expected, parts = torch.empty(2), x.split([13, 47], ROWS)
    polar(x, form="gram", dtype=torch.float32, slack=expected)
    slacks = [torch.empty(2), torch.empty(2)]
    Ranks(2).run(lambda rank, r: sharded_polars([parts[rank]], [ROWS], r, slacks=[slacks[rank]]))
    assert torch.equal(slacks[0], slacks[1])
    torch.testing.assert_close(slacks[0], expected)


@pytest.mark.parametrize("preset", PRESETS)
def test_collectives(preset: str) -> None:
    """One number a matrix, then R once and once a restart, for all stacks at once."""
    stacks = (torch.randn(3, 300, 40), torch.randn(2, 257, 300), torch.randn(80, 64).bfloat16())
    dims = (ROWS, COLUMNS, ROWS)
    parts = [x.tensor_split(2, dim) for x, dim in zip(stacks, dims)]
    ranks = Ranks(2)
    found = ranks.run(lambda rank, r: sharded_polars([part[rank] for part in parts], dims, r, preset))
    restarts = choose_sharded(64, preset, device="cpu").restarts
    grams = 3 * gram_elements(40) + 2 * gram_elements(257) + gram_elements(64)
    assert ranks.sums == [(6, torch.float64), *[(grams, torch.float32)] * (1 + len(restarts))]
    for number, (x, dim) in enumerate(zip(stacks, dims)):
        alone = sharded(x, [part.shape[dim] for part in parts[number]], preset, dim)
        assert torch.equal(torch.cat([of_rank[number] for of_rank in found], dim), alone)


def test_a_caller_chooses_restarts() -> None:
    ranks, x = Ranks(2), gaussian(64, 32)
    y = sharded(x, (32, 32), ranks=ranks, restarts=(1, 2, 3))
    assert len(ranks.sums) == 5
    assert distance(y, sharded(x, (32, 32))) <= 1e-11


def test_what_travels_is_little_more_than_a_triangle() -> None:
    assert [gram_elements(n) for n in (1, 32, 40)] == [1, 32 * 32, 32 * 32 + 8 * 40]
    for n in (128, 1000, 4096):
        assert n * (n + 1) / 2 <= gram_elements(n) <= 0.65 * n * n
    assert gram_elements(4096) == 9 * 4096**2 // 16


def test_nothing_to_do() -> None:
    ranks = Ranks(2)
    assert sharded(torch.empty(0, 8, 4), (5, 3), ranks=ranks).shape == (0, 8, 4)
    assert sharded(torch.empty(2, 8, 0), (5, 3), ranks=ranks).shape == (2, 8, 0)
    assert not ranks.sums
    assert not sharded(torch.empty(2, 0, 4), (0, 0), ranks=ranks).numel()
    assert len(ranks.sums) == 3


def test_the_input_is_left_alone() -> None:
    x = gaussian(64, 32).float()
    kept = x.clone()
    sharded(x, (10, 54))
    assert torch.equal(x, kept)


def test_errors_name_the_value_and_the_way_out() -> None:
    x = torch.randn(8, 4)
    with pytest.raises(ValueError, match="preset 'svd' has no Gram form.*or send whole matrices to an owner"):
        sharded_polars([x], [ROWS], lambda t: None, "svd")
    with pytest.raises(ValueError, match="the sharded dimension is -2 .rows. or -1 .columns. .*, got 0"):
        sharded_polars([x], [0], lambda t: None)
    with pytest.raises(ValueError, match="got 1 stacks, 2 dims$"):
        sharded_polars([x], [ROWS, ROWS], lambda t: None)
    with pytest.raises(ValueError, match="got 1 stacks, 1 dims and 2 slacks"):
        sharded_polars([x], [ROWS], lambda t: None, slacks=[torch.empty(1)] * 2)
    with pytest.raises(ValueError, match=r"restarts must lie in 1 .. 3 for 4 steps, got \(4,\)"):
        sharded_polars([x], [ROWS], lambda t: None, restarts=(4,))
    with pytest.raises(TypeError, match="real floating-point"):
        sharded_polars([x.int()], [ROWS], lambda t: None)


def test_the_direction() -> None:
    """Parts of the dual norm add up to it."""
    x, direction = gaussian(64, 24)[None], Spectral()
    parts = x.split([40, 24], ROWS)
    slacks = [torch.empty(1), torch.empty(1)]
    found = Ranks(2).run(lambda rank, r: direction.sharded_units([parts[rank]], [ROWS], [slacks[rank]], r)[0])
    d = torch.cat(found, ROWS)
    norm = sum(direction.dual_norm(part, of_part) for part, of_part in zip(parts, found))
    torch.testing.assert_close(norm, direction.dual_norm(x, d))
    assert distance(d, direction.unit(x)) <= 2e-11
    own = Spectral(coefficients=((2.0, -1.5, 0.5),), steps=3)
    found = Ranks(2).run(lambda rank, r: own.sharded_units([parts[rank]], [ROWS], [slacks[rank]], r)[0])
    assert distance(torch.cat(found, ROWS), own.unit(x)) <= 2e-11


def test_which_directions_are_sharded() -> None:
    assert Spectral().shards
    assert Spectral("svd", coefficients=((2.0, -1.5, 0.5),)).shards
    assert not Spectral("svd").shards
    assert not Frobenius().shards
    with pytest.raises(
        NotImplementedError, match="Frobenius has no direction of a part of a matrix: make it whole first"
    ):
        Frobenius().sharded_units([], [], [], lambda t: None)


def part_of_input() -> Tensor:
    """The polar factor of what this rank has."""
    part = process_input().tensor_split((100, 100, 201), 1)[dist.get_rank()]
    return sharded_polars([part], [ROWS], dist.all_reduce)[0]


def process_input() -> Tensor:
    return torch.stack([gaussian(300, 70), with_spectrum(300, 70, "log")]).float()


def test_processes(processes: Processes) -> None:
    """Four, one of them without rows."""
    found = torch.cat(processes.run(part_of_input, ranks=4), ROWS)
    whole = polar(process_input(), form="gram", dtype=torch.float32)
    for y, expected in zip(found, whole, strict=True):
        assert distance(y, expected) <= 2e-4
