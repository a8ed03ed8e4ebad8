"""Faults to plant in the PTX of Triton's kernels: each changes a line or two of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Fault:
    """What the pattern finds (the first, the last or all of it) becomes something else.

    tma: of a product whose operands are loaded by it, or not; None: of an elementwise op.
    """

    capability: tuple[int, int]
    tma: bool | None
    pattern: str
    by: str | Callable[[re.Match[str]], str]
    which: Literal["first", "last", "all"] = "first"

    def plant(self, ptx: str) -> str:
        found = list(re.finditer(self.pattern, ptx, re.DOTALL))
        if not found:  # no AssertionError, which would look like a fault that was noticed
            raise LookupError(f"nothing in the PTX is {self.pattern}")
        places = {"first": found[:1], "last": found[-1:], "all": found[::-1]}[self.which]
        for match in places:
            text = self.by(match) if callable(self.by) else match.expand(self.by)
            if text == match[0]:
                raise LookupError(f"this would stay as it is: {text}")
            ptx = ptx[: match.start()] + text + ptx[match.end() :]
        return ptx


def shorter_stride(match: re.Match[str]) -> str:
    """Half the distance between groups of eight rows, bits 32 to 45 of a matrix descriptor in shared memory."""
    descriptor = int(match[2])
    stride = descriptor >> 32 & 0x3FFF
    return f"{match[1]}{descriptor - (stride - stride // 2 << 32)};"


BARRIER = r"bar\.sync\s+0;"
UP_TO_A_BARRIER = r"(?:(?!bar\.sync).)*?"

COPY = rf"{UP_TO_A_BARRIER}cp\.async\.bulk{UP_TO_A_BARRIER}"

FAULTS = {
    "no barrier after the wait for copies": Fault(
        (8, 0), False, rf"(cp\.async\.wait_group\s+\d+;{UP_TO_A_BARRIER}){BARRIER}", r"\1"
    ),
    "copies still under way": Fault(
        (8, 0), False, r"cp\.async\.wait_group\s+(\d+);", lambda match: f"cp.async.wait_group {int(match[1]) + 2};"
    ),
    "copies from beyond the end": Fault(
        (8, 0), False, r"(cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], 0x\w+), %r\d+;", r"\1;", "all"
    ),
    "a store without its mask": Fault((8, 0), False, r"@%p\d+ (st\.global)", r"\1", "all"),
    "a transposed fragment": Fault((8, 0), False, r"(ldmatrix\.sync\.aligned\.m8n8\.x4)\.trans", r"\1"),
    "the wrong phase": Fault((9, 0), True, r"(try_wait\.parity\S+ complete, \[%r\d+\]), %r\d+;", r"\1, 1;"),
    "fewer bytes than come": Fault((9, 0), True, r"(expect_tx\S+ _, \[%r\d+\]), (\d+);", r"\1, 4096;"),
    "a stage filled while it is read": Fault((9, 0), True, rf"{BARRIER}({COPY}){BARRIER}(?={COPY})", r"\1", "last"),
    "sums read before they are there": Fault((9, 0), False, r"wgmma\.wait_group\.sync\.aligned\s+\d+;", "", "all"),
    "a descriptor's stride": Fault((9, 0), False, r"(or\.b64\s+%rd\d+, %rd\d+, )(\d{19});", shorter_stride, "all"),
    "no barrier between the warps' sums": Fault((9, 0), None, BARRIER, "", "all"),
}
