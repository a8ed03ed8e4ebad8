"""Faults to plant in the PTX of Triton's products, each one line of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """line: what it is in; change: of the line. last: the last such line after the loop begins, else the first."""

    capability: tuple[int, int]
    tma: bool
    line: str
    change: Callable[[str], str]
    last: bool = False

    def plant(self, ptx: str) -> str:
        lines = ptx.split("\n")
        found = [i for i, line in enumerate(lines) if re.search(self.line, line)]
        assert found, f"no line of the PTX is {self.line}"
        at = found[-1 if self.last else 0]
        changed = self.change(lines[at])
        assert changed != lines[at]
        return "\n".join([*lines[:at], changed, *lines[at + 1 :]])


def removed(line: str) -> str:
    return ""


def replaced(old: str, new: str) -> Callable[[str], str]:
    return lambda line: re.sub(old, new, line)


FAULTS = {}
