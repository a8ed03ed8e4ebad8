"""State in codes of 8 bits, block by block: x is a block's scale times the value of its code (arXiv:2110.02861).

A code c from 1 to 2^n - 1 has the value

    10^(i - n + 1) (1/10 + 9/10 j / 2^i),      i = floor(log2 c),  j = c - 2^i + 1

and 0 the value 0: n decades, each cut evenly, the upper ones more finely; the largest code has the value 1.

    signed    averages of gradients: int8, a sign and n = 7;  x = scale value
    squares   averages of squares: uint8, n = 8;  sqrt(x) = scale value, so that 1 / sqrt(x) is accurate

scale is the largest |x|, or sqrt(x), of the block. Every number takes the nearest code, of two the smaller one, but a
square that is not 0 none below 1: it is divided by. Codes of what codes stand for are these codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from ..state_layout import Codes

__all__ = ["Blockwise", "scale_key"]

_DTYPES: dict[Codes, torch.dtype] = {"signed": torch.int8, "squares": torch.uint8}
# No scale is smaller: it is divided by, and the squares of what codes stand for are no denormal numbers.
_LEAST_SCALE: dict[Codes, float] = {"signed": 2.0**-126, "squares": 2.0**-39}
# Elements that are coded at once: what torch operations hold of them is some 30 bytes each.
_AT_ONCE = {"cpu": 1 << 17, "cuda": 1 << 24}


def scale_key(name: str) -> str:
    """The key of the scales of a state tensor that is stored in codes."""
    return f"{name}_scale"


@dataclass(frozen=True)
class Blockwise:
    """Codes of 8 bits with a scale a block, fp32 (fp64 for fp64): 1 + 4/block bytes an element.

    A block is `block` consecutive elements of a row, or what is left of it at its end; a row is all that has one index
    of dimension 0. Shards of dimension 0 have the blocks of the whole tensor.   least: elements of a tensor below which
    it is stored as it is, as vectors are.

    |error| <= scale times half the distance of two codes: of signed ones .0071 scale, and where |x| <= scale / 10^k
    .0071 scale / 5^k; of roots half of that.
    """

    block: int = 256
    least: int = 4096

    def supports(self, shape: Sequence[int]) -> bool:
        """Whether the state of a parameter of this shape is stored in codes."""
        return len(shape) > 1 and prod(shape) >= self.least

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, int]:
        """(rows, blocks of a row)."""
        return shape[0], -(-prod(shape[1:]) // self.block)

    def empty(self, t: Tensor, kind: Codes) -> tuple[Tensor, Tensor]:
        """Codes and scales of zeros of t's shape and strides."""
        codes = torch.zeros_like(t, dtype=_DTYPES[kind], memory_format=torch.preserve_format)
        return codes, t.new_zeros(self.scale_shape(t.shape), dtype=torch.promote_types(t.dtype, torch.float32))

    def encode(self, t: Tensor, kind: Codes) -> tuple[Tensor, Tensor]:
        """(codes of t's shape and strides, scales) of a finite tensor of two dimensions or more."""
        codes, scale = self.empty(t, kind)
        if not t.numel():
            return codes, scale
        dense = codes if codes.is_contiguous() else torch.empty_like(codes, memory_format=torch.contiguous_format)
        for x, c, s in self._parts(t.contiguous(), dense, scale):
            _encode(x.to(scale.dtype), c, s, kind)
        return codes if dense is codes else codes.copy_(dense), scale

    def decode(self, codes: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
        """What codes stand for, in the scales' dtype and the codes' strides; out: where to write it."""
        if out is None:
            out = torch.empty_like(codes, dtype=scale.dtype, memory_format=torch.preserve_format)
        if not codes.numel():
            return out
        dense = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
        for c, x, s in self._parts(codes.contiguous(), dense, scale):
            _decode(c, s, x)
        return out if dense is out else out.copy_(dense)

    def _parts(self, a: Tensor, b: Tensor, scale: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Views (rows, blocks, elements of a block) of two contiguous tensors with their scales (rows, blocks)."""
        rows, blocks = scale.shape
        a, b = a.view(rows, -1), b.view(rows, -1)
        whole = a.shape[1] // self.block
        if whole == blocks:  # a row more or less at once does not matter
            a, b, scale, rows = (*(t.view(-1, self.block) for t in (a, b)), scale.view(-1, 1), rows * blocks)
            whole, blocks = 1, 1
        at_once = max(1, _AT_ONCE.get(a.device.type, 1 << 24) // a.shape[1])
        for first in range(0, rows, at_once):
            x, y, s = (t.narrow(0, first, min(at_once, rows - first)) for t in (a, b, scale))
            end = whole * self.block
            if whole:
                yield *(t[:, :end].unflatten(1, (whole, self.block)) for t in (x, y)), s[:, :whole]
            if blocks > whole:
                yield x[:, end:].unsqueeze(1), y[:, end:].unsqueeze(1), s[:, whole:]


def _encode(x: Tensor, codes: Tensor, scale: Tensor, kind: Codes) -> None:
    _, nearest, above = _tables(kind, x.device)
    size = x.abs() if kind == "signed" else x.sqrt()
    scale.copy_(size.amax(-1)).clamp_(min=_LEAST_SCALE[kind])
    ratio = size.div_(scale.unsqueeze(-1)).float().reshape(-1)
    # The upper 16 bits of the ratio leave two codes that are next to one another.
    code = nearest.index_select(0, ratio.view(torch.int32) >> 16)
    code += ratio > above.index_select(0, code.to(torch.int32))
    code = code.view(x.shape)
    codes.copy_(code if kind == "squares" else torch.where(x < 0, -code.view(torch.int8), code.view(torch.int8)))


def _decode(codes: Tensor, scale: Tensor, out: Tensor) -> None:
    kind: Codes = "signed" if codes.dtype is torch.int8 else "squares"
    index, values = codes.reshape(-1).to(torch.int32), _tables(kind, codes.device)[0]
    index = index + 128 if kind == "signed" else index
    out.copy_(values.index_select(0, index).view(out.shape)).mul_(scale.unsqueeze(-1))
    if kind == "squares":
        out.square_()


def _tables(kind: Codes, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(values of all codes, of signed ones from -128 on; the code of the smallest fp32 number with these upper 16 bits;
    the fp32 numbers above which a code is too small).

    No two of the last have the same upper bits. Above 1, and for infinity and NaN, the code is the largest one.
    """
    if torch.compiler.is_compiling() or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
        return _new_tables(kind, device)  # which are nothing outside of the graph
    return _known_tables(kind, device)


def _new_tables(kind: Codes, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    values = torch.tensor(_values(kind), dtype=torch.float32)
    middles = (values[1:] + values[:-1]) / 2
    numbers = (torch.arange(1 << 15, dtype=torch.int32) << 16).view(torch.float32)
    if kind == "squares":
        middles[0] = 0.0
    code = torch.bucketize(numbers, middles).to(torch.uint8)
    above = torch.cat([middles, torch.full((1,), torch.inf)])
    if kind == "signed":
        values = torch.cat([-values[-1:], -values[1:].flip(0), values])
    return values.to(device), code.to(device), above.to(device)


_known_tables = lru_cache(maxsize=64)(_new_tables)


def _values(kind: Codes) -> list[float]:
    """The values of the codes from 0 on."""
    bits = 7 if kind == "signed" else 8
    values = [0.0]
    for i in range(bits):
        values += [10.0 ** (i - bits + 1) * (0.1 + 0.9 * j / 2**i) for j in range(1, 2**i + 1)]
    return values
