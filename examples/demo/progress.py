"""A progress bar of a few lines: one line redrawn on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

BAR = 24  # characters
PLAIN_LINES = 10  # lines printed in all where the stream is no terminal


class Progress:
    """Shows `step` of `total` with a note; `stream` defaults to standard error."""

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self.total = total
        self.stream = stream or sys.stderr
        self.started = time.perf_counter()
        self.width = 0

    def update(self, step: int, note: str) -> None:
        """Call once for each step 1 .. total, in order."""
        if self.stream.isatty():
            self._redraw(step, note)
        elif step == self.total or step % max(1, self.total // PLAIN_LINES) == 0:
            print(f"step {step}/{self.total}  {self._clock(step)}  {note}", file=self.stream, flush=True)

    def _redraw(self, step: int, note: str) -> None:
        done = BAR * step // self.total
        line = f"[{'#' * done}{'.' * (BAR - done)}] {step}/{self.total}  {self._clock(step)}  {note}"
        end = "\n" if step == self.total else ""
        print(f"\r{line.ljust(self.width)}", end=end, file=self.stream, flush=True)
        self.width = len(line)

    def _clock(self, step: int) -> str:
        elapsed = time.perf_counter() - self.started
        return f"{elapsed:.0f} s, {elapsed / step * (self.total - step):.0f} s left"
