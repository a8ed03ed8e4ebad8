"""State in codes of 8 bits against the rule of arXiv:2110.02861, stated here bit by bit and number by number."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from steepest.parts import Blockwise
from steepest.state_layout import Codes
from support.training import noise, same_bits

KINDS: tuple[Codes, ...] = ("signed", "squares")
STORAGE = Blockwise()


def value_of(bits: str) -> float:
    """What a bit pattern stands for: zeros are an exponent of 10, what is behind the first 1 cuts the decade."""
    if "1" not in bits:
        return 0.0
    zeros = bits.index("1")
    fraction = bits[zeros + 1 :]
    step = (int(fraction, 2) if fraction else 0) + 1
    return 10.0**-zeros * (0.1 + 0.9 * step / 2 ** len(fraction))


def codebook(kind: Codes) -> list[float]:
    """The value of every code that is not negative."""
    width = 7 if kind == "signed" else 8
    return [value_of(f"{code:0{width}b}") for code in range(2**width)]


def of_block(block: list[float], kind: Codes) -> list[float]:
    """What a block becomes: every number the nearest that a code stands for, a square that is not 0 never 0."""
    sizes = [abs(x) if kind == "signed" else math.sqrt(x) for x in block]
    scale, values = max(sizes), codebook(kind)
    found = []
    for x, size in zip(block, sizes, strict=True):
        allowed = values[1:] if kind == "squares" and x > 0 else values
        nearest = 0.0 if scale == 0 else scale * min(allowed, key=lambda value: abs(size / scale - value))
        found.append(math.copysign(nearest, x) if kind == "signed" else nearest**2)
    return found


def expected(t: Tensor, kind: Codes, block: int = 256) -> Tensor:
    """By row of dimension 0, then in runs of a block, the last of a row perhaps shorter."""
    rows = t.double().reshape(t.shape[0], -1)
    found = []
    for row in rows.tolist():
        for first in range(0, len(row), block):
            found += of_block(row[first : first + block], kind)
    return torch.tensor(found, dtype=torch.float64).view(t.shape)


def numbers(shape: tuple[int, ...], kind: Codes, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of many sizes, within a row and between rows, and some zeros."""
    x = noise(shape, seed, torch.float64) * (3 * noise(shape, seed + 1, torch.float64)).exp()
    x = x * (4 * noise((shape[0], *[1] * (len(shape) - 1)), seed + 2, torch.float64)).exp()
    x[noise(shape, seed + 3) > 1.5] = 0
    return (x if kind == "signed" else x.square()).to(dtype)


def coded(t: Tensor, kind: Codes) -> Tensor:
    return STORAGE.decode(*STORAGE.encode(t, kind))


def test_the_codes_are_all_different_and_end_at_one() -> None:
    for kind, count, least in (("signed", 128, 1e-6), ("squares", 256, 1e-7)):
        values = codebook(kind)  # type: ignore[arg-type]
        assert len(values) == count
        assert values == sorted(set(values))
        assert values[0] == 0
        assert values[1] == pytest.approx(least)
        assert values[-1] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 256), (4, 700), (2, 3, 5, 40), (5, 7), (70, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_number_takes_the_nearest_code(kind: Codes, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    t = numbers(shape, kind, dtype=dtype)
    codes, scale = STORAGE.encode(t, kind)
    assert codes.dtype == (torch.int8 if kind == "signed" else torch.uint8)
    assert codes.shape == t.shape
    assert scale.shape == (shape[0], -(-math.prod(shape[1:]) // 256))
    assert scale.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    torch.testing.assert_close(STORAGE.decode(codes, scale).double(), expected(t, kind), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_of_what_codes_stand_for_are_these_codes(kind: Codes) -> None:
    codes, scale = STORAGE.encode(numbers((40, 600), kind), kind)
    again = STORAGE.encode(STORAGE.decode(codes, scale), kind)
    assert same_bits(again[0], codes)
    assert same_bits(again[1], scale)


def test_the_largest_is_exact_and_signs_do_not_matter() -> None:
    t = numbers((20, 512), "signed")
    codes, scale = STORAGE.encode(t, "signed")
    blocks, found = t.view(20, 2, 256), STORAGE.decode(codes, scale).view(20, 2, 256)
    assert torch.equal(blocks.abs().amax(-1), scale)
    assert torch.equal(found.abs().amax(-1), scale)
    assert same_bits(STORAGE.encode(-t, "signed")[0], -codes)


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_is_below_half_the_distance_of_two_codes(kind: Codes) -> None:
    """The bounds of the docstring, decade by decade of the block's largest number."""
    x = noise((200, 256), 5, torch.float64).abs() * (4 * noise((200, 256), 6, torch.float64)).exp()
    found = coded(x if kind == "signed" else x.square(), kind)
    found = found if kind == "signed" else found.sqrt()
    ratio, error = x / x.amax(-1, keepdim=True), (found - x).abs() / x.amax(-1, keepdim=True)
    finest = 0.45 / (64 if kind == "signed" else 128)
    for decade in range(5):
        inside = ratio <= 10.0**-decade
        assert inside.any()
        assert float(error[inside].max()) <= finest * 5.0**-decade * 1.0001


def test_no_square_becomes_zero_but_zero() -> None:
    """Above what is denormal, whatever else is in the block."""
    for largest in (1e38, 1.0, 1e-20, 1e-30, 1e-38):
        v = torch.logspace(-45, math.log10(largest), 256).clamp(min=2e-45).view(1, 256)
        v[0, ::7] = 0
        found = coded(v, "squares")
        assert torch.equal(found == 0, v == 0)
        assert found.isfinite().all()
        assert float(found[found > 0].min()) >= torch.finfo(torch.float32).tiny


@pytest.mark.parametrize("kind", KINDS)
def test_extremes(kind: Codes) -> None:
    for size in (0.0, 1e-45, 1e-38, 1e38):
        t = torch.full((2, 300), size)
        found = coded(t, kind)
        assert found.isfinite().all()
        if size in (0.0, 1e38) or kind == "signed":
            torch.testing.assert_close(found, t, rtol=1e-6, atol=1e-40)


@pytest.mark.parametrize("kind", KINDS)
def test_strides_stay(kind: Codes) -> None:
    t = numbers((6, 8, 5, 7), kind)
    for other in (t.to(memory_format=torch.channels_last), t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)):
        codes, scale = STORAGE.encode(other, kind)
        assert codes.stride() == other.stride()
        assert torch.equal(STORAGE.decode(codes, scale), coded(t, kind))
        out = torch.empty_like(other)
        assert STORAGE.decode(codes, scale, out=out) is out
        assert torch.equal(out, coded(t, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_do_not_depend_on_what_is_coded_with_them(kind: Codes) -> None:
    """Rows alone, as a shard of dimension 0 has them, and tensors of more elements than are coded at once."""
    t = numbers((600, 700), kind)
    codes, scale = STORAGE.encode(t, kind)
    for first, last in ((0, 1), (1, 300), (300, 600), (5, 5)):
        some = STORAGE.encode(t[first:last], kind)
        assert same_bits(some[0], codes[first:last])
        assert same_bits(some[1], scale[first:last])


def test_which_tensors_are_coded() -> None:
    assert STORAGE.supports((64, 64))
    assert STORAGE.supports((2, 2, 1024))
    assert not STORAGE.supports((64, 63))
    assert not STORAGE.supports((100_000,))
    assert not STORAGE.supports(())
