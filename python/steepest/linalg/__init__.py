"""Matrix mathematics in terms of ``steepest.ops``."""

from __future__ import annotations
