"""Parameters whose tests are for `make test-all` alone."""

from __future__ import annotations

from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """`pytest.param` of one set of values, marked slow."""
    return pytest.param(*values, marks=pytest.mark.slow)
