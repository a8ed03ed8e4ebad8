"""Triton's elementwise ops, their PTX executed: against the host's ops, under several seeds."""

from __future__ import annotations

import pytest

from ptx.triton_process import VERSIONS, run

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.parametrize("version", VERSIONS),
    pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=["sm_80", "sm_90"]),
]


@pytest.mark.parametrize("check", ["steps", "steps_under_seeds", "many_chunks"])
def test_steps(version: str, capability: tuple[int, int], check: str) -> None:
    run(version, check, capability)
