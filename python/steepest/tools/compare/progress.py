"""A progress bar of a few lines: one line redrawn on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

BAR = 24  # characters
PLAIN_LINES = 10  # lines printed after the first unit where the stream is no terminal


class Progress:
    """Shows how many units of `total` are done, with a note; `stream` defaults to standard error."""

    def __init__(self, total: int, stream: TextIO | None = None, unit: str = "step") -> None:
        self.total = total
        self.stream = stream or sys.stderr
        self.unit = unit
        self.started = time.perf_counter()
        self.width = 0

    def update(self, done: int, note: str) -> None:
        """Call once for each of 1 .. total, in order."""
        if self.stream.isatty():
            self._redraw(done, note)
        elif done in (1, self.total) or done % max(1, self.total // PLAIN_LINES) == 0:
            print(f"{self.unit} {done}/{self.total}  {self._clock(done)}  {note}", file=self.stream, flush=True)

    def _redraw(self, done: int, note: str) -> None:
        full = BAR * done // self.total
        line = f"[{'#' * full}{'.' * (BAR - full)}] {done}/{self.total}  {self._clock(done)}  {note}"
        end = "\n" if done == self.total else ""
        print(f"\r{line.ljust(self.width)}", end=end, file=self.stream, flush=True)
        self.width = len(line)

    def _clock(self, done: int) -> str:
        elapsed = time.perf_counter() - self.started
        return f"{elapsed:.0f} s, {elapsed / done * (self.total - done):.0f} s left"
