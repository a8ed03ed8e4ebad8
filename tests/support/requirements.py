"""What a test of compiled kernels needs and a machine may lack."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def unavailable(reason: str) -> NoReturn:
    """Skips the test, or fails it where STEEPEST_TEST_KERNELS=1 says that nothing is missing."""
    if os.environ.get("STEEPEST_TEST_KERNELS") == "1":
        pytest.fail(f"STEEPEST_TEST_KERNELS=1, but {reason}")
    pytest.skip(reason)
