"""What the execution of Triton's PTX notices: each of these faults, under one of some seeds."""

from __future__ import annotations

import pytest

from ptx.triton_faults import FAULTS
from ptx.triton_process import run

pytestmark = pytest.mark.kernels


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_noticed(name: str) -> None:
    assert run("installed", "fault", name), f"nobody noticed {name}"
