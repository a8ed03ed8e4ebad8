"""The compiled kernels, built once for all tests of them."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator

import pytest

from ptx.build import UnavailableError, build
from ptx.kernels import Guards, Kernels
from steepest.ops import backend
from support import fused_ops
from support.requirements import unavailable

#: Orders of blocks, warps and late copies that a test of compiled kernels runs in, each a seed of the simulator.
ORDERS = 3


def pytest_configure(config: pytest.Config) -> None:
    told = "orders(count): of blocks and warps that a test runs in, where it takes long, has its own, or runs no kernel"
    config.addinivalue_line("markers", told)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kernels" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("orders")
        count = ORDERS if marker is None else marker.args[0]
        metafunc.parametrize("kernels", range(count), ids="order {}".format, indirect=True)


@pytest.fixture(scope="session")
def compiled() -> Kernels:
    if backend.extension is None:
        unavailable(str(backend.extension_reason))
    try:
        return Kernels(build())
    except UnavailableError as error:
        unavailable(str(error))


@pytest.fixture
def guards() -> Iterator[Guards]:
    """Looked at when the test has ended."""
    made = Guards()
    yield made
    made.check()


@pytest.fixture
def kernels(
    request: pytest.FixtureRequest, compiled: Kernels, guards: Guards, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Kernels]:
    """On a small device, in an order of each test's own (its name has its number); states of fused_ops lie between
    guards."""
    monkeypatch.setattr(fused_ops, "twin", guards.twin)
    seed = zlib.crc32(request.node.nodeid.encode())
    compiled.reset(seed=seed + int(os.environ.get("PTXSIM_SEED", "0")))
    yield compiled
    assert not compiled.library.door_stale(), "an error is left for the next op"
    assert compiled.library.door_known() == 0, "a door keeps a tensor"
