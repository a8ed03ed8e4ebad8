"""Triton's products, their PTX executed: against fp64, by every configuration, under several seeds."""

from __future__ import annotations

import pytest

from ptx.triton_process import VERSIONS, run

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.parametrize("version", VERSIONS),
    pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=["sm_80", "sm_90"]),
]

Capability = tuple[int, int]


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "any"])
@pytest.mark.parametrize("kind", ["fp16", "bf16", "bf16 into fp32", "tf32", "tf32x3", "fp32"])
def test_every_candidate(version: str, capability: Capability, kind: str, symmetric: bool) -> None:
    run(version, "every_candidate", capability, kind, symmetric)


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_odd_sizes(version: str, capability: Capability, dtype: str) -> None:
    run(version, "odd_products", capability, dtype)


def test_averages_in_fp32(version: str, capability: Capability) -> None:
    run(version, "averages", capability)


def test_matrices_far_apart(version: str, capability: Capability) -> None:
    run(version, "far_apart", capability)
