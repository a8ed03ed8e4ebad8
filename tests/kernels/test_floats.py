"""16-bit numbers as the kernels' host code makes them, bit for bit against torch's conversions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

_C = pytest.importorskip("steepest._C", reason="only an editable build has steepest._C")

HALVES = torch.arange(2**16).to(torch.int32)  # every pattern of 16 bits
FP16 = HALVES.to(torch.int16).view(torch.float16)
BF16 = HALVES.to(torch.int16).view(torch.bfloat16)


def around(x: Tensor) -> Tensor:
    """fp32 numbers and their neighbours on both sides."""
    bits = x[x.isfinite()].float().view(torch.int32)
    return torch.cat([bits - 1, bits, bits + 1]).view(torch.float32)


def middles(x: Tensor) -> Tensor:
    """Halfway between each number of a 16-bit type and the one of the next larger magnitude, as fp32."""
    after = (x.view(torch.int16) + 1).view(x.dtype)
    middle = (x.double() + after.double()) / 2
    return middle[middle.isfinite()].float()


NUMBERS: dict[str, Callable[[], Tensor]] = {
    "every fp16": lambda: FP16.float(),
    "every bf16": lambda: BF16.float(),
    "ties of fp16": lambda: around(middles(FP16)),
    "ties of bf16": lambda: around(middles(BF16)),
    "any bits": lambda: random_bits(0, 2**32),
    "subnormal": lambda: torch.cat([random_bits(0, 2**23), random_bits(2**31, 2**31 + 2**23)]),
    "as small as fp16 gets": lambda: random_bits(0x32800000, 0x38900000),
    "where fp16 ends": lambda: torch.tensor([65504.0, 65519.996, 65520.0, 65536.0, 1e10, -65519.996, -65520.0]),
    "where bf16 ends": lambda: torch.tensor([3.3895314e38, 3.3961775e38, 3.3961777e38, 3.4028235e38, -3.4e38]),
    "special": lambda: torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 2.0**-149, -(2.0**-149)]),
}
every_number = pytest.mark.parametrize("name", NUMBERS)


def random_bits(low: int, high: int, count: int = 20000) -> Tensor:
    bits = torch.randint(low, high, (count,), generator=torch.Generator().manual_seed(0))
    return bits.to(torch.int32).view(torch.float32)


@functools.cache
def formats(name: str) -> tuple[Tensor, dict[str, list[Any]]]:
    """Numbers, and what the host code makes of each by the name of the format."""
    x = NUMBERS[name]()
    found = [_C.float_formats(value) for value in x.tolist()]
    return x, {kind: [each[kind] for each in found] for kind in found[0]}


def words(bits: list[int]) -> Tensor:
    return torch.tensor(bits, dtype=torch.int32).to(torch.int16)


@every_number
@pytest.mark.parametrize("kind,dtype", [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_conversions_are_those_of_torch(name: str, kind: str, dtype: torch.dtype) -> None:
    x, made = formats(name)
    found, wanted = words(made[kind]).view(dtype), x.to(dtype)
    assert torch.equal(found.isnan(), x.isnan())
    number = ~x.isnan()
    assert torch.equal(found.view(torch.int16)[number], wanted.view(torch.int16)[number])


@every_number
def test_fp16_comes_back(name: str) -> None:
    x, made = formats(name)
    found, wanted = torch.tensor(made["from_f16"]), x.to(torch.float16).float()
    assert torch.equal(found.isnan(), x.isnan())
    number = ~x.isnan()
    assert torch.equal(found.view(torch.int32)[number], wanted.view(torch.int32)[number])


def test_a_split_nan_is_one_of_bf16() -> None:
    """Also those whose lower half would carry into the sign when rounded up."""
    for bits in (0x7F800001, 0x7FBFFFFF, 0x7FC00000, 0x7FFF8000, 0x7FFFFFFF, -1, -0x7FFFFF):
        (value,) = torch.tensor([bits], dtype=torch.int32).view(torch.float32).tolist()
        assert _C.float_formats(value)["split"] == (0x7FC0, 0)


@every_number
def test_a_split_number_comes_back(name: str) -> None:
    x, made = formats(name)
    finite = x.isfinite()
    joined, high = torch.tensor(made["join"])[finite], words([high for high, _ in made["split"]])[finite]
    x, high = x[finite], high.view(torch.bfloat16)
    assert torch.equal(joined.view(torch.int32), x.view(torch.int32))
    assert all(-(2**15) <= low < 2**15 for _, low in made["split"])
    # A unit in the last of bf16's 8 places; what rounds beyond the largest bf16 is infinite, as in torch.
    unit = torch.exp2((x.double().abs().clamp(min=2.0**-126)).log2().floor() - 7)
    near = high.isfinite()
    assert bool(((high.double() - x.double()).abs() <= unit / 2)[near].all())
    assert torch.equal(near, x.abs() < 3.3961775292304957e38)
