"""Which Triton runs in a process, and what its kernels may touch there."""

from __future__ import annotations

import importlib.metadata

import pytest

from ptx.triton_process import VERSIONS, run

pytestmark = [pytest.mark.kernels, pytest.mark.parametrize("version", VERSIONS)]


def test_it_is_of_the_version(version: str) -> None:
    wanted = importlib.metadata.version("triton") if version == "installed" else f"{version}.0"
    assert run(version, "version") == wanted


def test_what_nobody_lent_is_out_of_bounds(version: str) -> None:
    with pytest.raises(RuntimeError, match="global memory out of bounds"):
        run(version, "inspect_a_stranger")
