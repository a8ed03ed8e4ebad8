"""Who takes a small matrix: by its shorter side, the device and what was compiled. ptx/ runs the kernel itself."""

from __future__ import annotations

import types

import pytest
import torch

from ptx.small_polar import exact, in_half_precision
from steepest.linalg import coefficients as tables
from steepest.linalg.polar import polar
from steepest.ops import backend, small_polar
from support.polar_error import polar_error
from support.singular_values import with_spectrum

needs_extension = pytest.mark.skipif(backend.extension is None, reason=f"{backend.extension_reason}")


@needs_extension
@pytest.mark.parametrize(
    "capability, alone, together",
    [(75, 0, 0), (80, 128, 128), (86, 96, 96), (89, 96, 96), (90, 128, 256), (100, 128, 256), (120, 96, 144)],
)
def test_how_long_the_shorter_side_may_be(capability: int, alone: int, together: int) -> None:
    assert backend.extension is not None
    for rows in range(1, 300):
        blocks = backend.extension.small_polar_blocks(rows, capability)
        assert blocks == (1 if rows <= alone else 4 if rows <= together else 0)
    assert backend.extension.small_polar_rows(capability) == together


@needs_extension
def test_why_a_matrix_is_left_to_the_chain() -> None:
    most = "the kernel for small matrices takes a short side up to"
    too_long = small_polar.too_long
    assert too_long(128, (8, 0)) is too_long(96, (8, 9)) is too_long(256, (9, 0)) is too_long(144, (12, 0)) is None
    assert too_long(129, (8, 0)) == f"{most} 128 on compute capability 8.0, where blocks do not form clusters"
    assert too_long(97, (8, 6)) == f"{most} 96 on compute capability 8.6, where a block has less shared memory"
    assert too_long(129, (8, 6)) == f"{most} 96 on compute capability 8.6, where blocks do not form clusters"
    assert too_long(145, (12, 0)) == f"{most} 144 on compute capability 12.0, where a block has less shared memory"
    assert too_long(257, (9, 0)) == f"{most} 256"
    assert too_long(257, (8, 0)) == f"{most} 128"


@pytest.mark.parametrize(
    "architectures, device, wanted",
    [
        (["sm_80", "sm_90a"], (9, 0), (9, 0)),
        (["sm_80", "compute_80"], (9, 0), (8, 9)),  # the driver compiles what was written for devices without clusters
        (["sm_90a", "compute_90"], (12, 0), (12, 0)),
        (["sm_80", "compute_80", "sm_90a"], (12, 0), (8, 9)),
        (["sm_80", "compute_120"], (8, 0), (8, 0)),
    ],
)
def test_code_without_clusters_takes_none(
    architectures: list[str], device: tuple[int, int], wanted: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    built = types.SimpleNamespace(build_info=lambda: {"architectures": architectures})
    monkeypatch.setattr(backend, "extension", built)
    monkeypatch.setattr(torch.ops.steepest, "cluster_launch", lambda _: True, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: device)
    assert small_polar._capability.__wrapped__(0) == wanted


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(129, 140), (400, 136), (192, 192), (255, 301), (256, 256), (900, 256)])
def test_on_a_gpu(shape: tuple[int, int]) -> None:
    if (reason := small_polar.too_long(min(shape), torch.cuda.get_device_capability())) is not None:
        pytest.skip(reason)
    schedule = tables.SCHEDULES["auto"]
    x = torch.stack([with_spectrum(*shape, name) for name in ("gaussian", "log", "rank 2", "steep")])
    assert small_polar.supports([x.float().cuda()], schedule.tables, schedule.slacks)
    for each, y in zip(x, polar(x.float().cuda()).cpu()):
        wanted, _ = exact(half := in_half_precision(each), schedule)
        assert (y - wanted).norm() < 0.05 * wanted.norm(), polar_error(half, y)
