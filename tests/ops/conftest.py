"""The emulated kernel for small matrices, built once for all tests of it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest

from emulations import ORDERS
from small_polar_kernel import Kernel, build


@pytest.fixture(scope="session")
def small_polar_emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build(tmp_path_factory.mktemp("small_polar"))


@pytest.fixture(params=["shuffled"])
def kernel(
    request: pytest.FixtureRequest, small_polar_emulated: ctypes.CDLL, capfd: pytest.CaptureFixture[str]
) -> Iterator[Kernel]:
    small_polar_emulated.small_polar_order(ORDERS.index(request.param))
    small_polar_emulated.small_polar_truncating(0)
    yield Kernel(small_polar_emulated)
    errors = capfd.readouterr().err
    assert "runtime error" not in errors, errors
