"""`polar` on hard input, on a CPU and on a GPU, through whatever kernels the shape is given to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from steepest.linalg.polar import polar, polars
from steepest.ops import backend
from support.polar_error import polar_error
from support.singular_values import gaussian, with_spectrum

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
#: By the kernel that takes them on a Hopper GPU: small matrices, each in a block or in a cluster of them, the chain
#: (square, wide, tall), and what goes alone.
SHAPES = [(24, 40), (1, 9), (9, 1), (131, 200), (200, 136), (256, 256), (264, 264), (264, 336), (336, 264), (259, 261)]

on_devices = pytest.mark.parametrize("device", DEVICES)
of_shapes = pytest.mark.parametrize("m,n", SHAPES)


def stack(m: int, n: int, device: str, *spectra: str) -> Tensor:
    return torch.stack([with_spectrum(m, n, spectrum) for spectrum in spectra]).float().to(device)


@on_devices
@of_shapes
def test_runs_and_batches_agree_to_the_bit(m: int, n: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "batch_invariant", True)
    x = stack(m, n, device, "gaussian", "log", "root")
    found = polar(x)
    assert torch.equal(found, polar(x))
    if device == "cuda":  # a CPU's library adds in an order that depends on the batch
        for each, wanted in zip(x, found, strict=True):
            assert torch.equal(polar(each), wanted)
        assert torch.equal(polars([x[:1], x[1:]])[1], found[1:])


@on_devices
@of_shapes
def test_a_power_of_two_changes_nothing(m: int, n: int, device: str) -> None:
    x = stack(m, n, device, "gaussian", "flat")
    for factor in (2.0**-100, 2.0**100):
        assert torch.equal(polar(factor * x), polar(x))


@on_devices
@of_shapes
def test_zero_and_low_rank(m: int, n: int, device: str) -> None:
    rank = min(m, n, 2)
    x = torch.stack([torch.zeros(m, n), *(with_spectrum(m, n, f"rank {k}").float() for k in range(1, rank + 1))])
    found = polar(x.to(device)).cpu()
    assert not found[0].any()
    for each, y in zip(x[1:].double(), found[1:].double(), strict=True):
        u, s, vt = torch.linalg.svd(each)
        kept = int((s > 1e-5 * s[0]).sum())
        error = (u[:, :kept].T @ y @ vt[:kept].T - torch.eye(kept)).abs()
        assert error.diagonal().max() < 0.4
        assert error.fill_diagonal_(0).max() < 0.1
        assert torch.linalg.matrix_norm(y, 2) < 1.3


@on_devices
@of_shapes
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_a_matrix_that_is_not_finite_is_alone(m: int, n: int, device: str, poison: float) -> None:
    x = stack(m, n, device, "gaussian", "log", "flat")
    clean, slack = polar(x), torch.empty(3, device=device)
    x[1, -1, -1] = poison
    found = polar(x, slack=slack)
    assert found[1].isnan().all()
    assert not slack[1].isfinite()
    assert torch.equal(found[::2], clean[::2])


@on_devices
@of_shapes
def test_strides_do_not_matter(m: int, n: int, device: str) -> None:
    x = stack(m, n, device, "gaussian", "log")
    wanted = polar(x)
    padded = torch.full((2, m + 3, n + 5), torch.nan, device=device)[:, 1:-2, 2:-3]
    padded.copy_(x)
    for view in (padded, x.mT.contiguous().mT):
        before = view.clone()
        assert torch.equal(polar(view), wanted)
        assert torch.equal(view, before)


#: What a training run may bring along, by what is made of Gaussian matrices.
HARD: dict[str, Callable[[Tensor], Tensor]] = {
    "gaussian": lambda x: x,
    "one row": lambda x: x * torch.where(torch.arange(len(x)) == 1, 20.0, 1.0)[:, None],
    "one column": lambda x: x * torch.where(torch.arange(x.shape[1]) == 1, 20.0, 1.0),
    "one entry": lambda x: x + 1000 * torch.eye(*x.shape),
    "denormal": lambda x: 1e-40 * x,
    "huge": lambda x: 1e37 * x,
    "zero": lambda x: 0 * x,
    "not a number": lambda x: x + torch.where(torch.eye(*x.shape) == 1, torch.nan, 0.0),
}
#: Matrices for every kernel.
HARD_SHAPES = [(24, 40), (131, 200), (264, 336), (336, 264)]
#: Devices and the backends that they have.
WAYS = [
    *[("cpu", name) for name in ("auto", "torch")],
    *[pytest.param("cuda", name, marks=pytest.mark.gpu) for name in ("auto", "cuda", "triton", "torch")],
]


@pytest.mark.parametrize("device,way", WAYS)
@pytest.mark.parametrize("m,n", HARD_SHAPES)
@pytest.mark.parametrize("preset", ["auto", "exact", "turbo"])
def test_hard_matrices(preset: str, m: int, n: int, device: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way gives what the preset promises of every matrix, and one that is not finite is alone."""
    monkeypatch.setattr(backend, "forced", way)
    check_hard_matrices(lambda x: polar(x, preset), m, n, device)


@pytest.mark.parametrize("device,way", WAYS)
@pytest.mark.parametrize("preset", ["auto", "exact", "turbo", "jordan", "polar_express", "svd"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_beside_an_eps_whose_square_is_no_fp32_number_matrices_vanish(
    preset: str, dtype: torch.dtype, device: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "forced", way)
    x = torch.randn(2, 24, 40, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    for plain in (x, x.mT.contiguous()):
        assert polar(plain, preset, eps=1e30).abs().max() < 1e-6


@pytest.mark.parametrize(
    "device,m,n", [("cpu", *HARD_SHAPES[0]), *(pytest.param("cuda", *s, marks=pytest.mark.gpu) for s in HARD_SHAPES)]
)
def test_hard_matrices_compiled(device: str, m: int, n: int) -> None:
    """torch.compile traces torch's operations."""
    torch._dynamo.reset()
    check_hard_matrices(torch.compile(polar, backend="aot_eager", fullgraph=True), m, n, device)


def check_hard_matrices(run: Callable[[Tensor], Tensor], m: int, n: int, device: str) -> None:
    x = torch.stack([make(gaussian(m, n, seed).float()) for seed, make in enumerate(HARD.values())])
    found = run(x.to(device)).cpu()
    for name, each, y in zip(HARD, x, found, strict=True):
        if name == "zero":
            assert not y.any()
        elif name == "not a number":
            assert y.isnan().all()
        else:
            error = polar_error(each, y)
            assert error.off_diagonal < 0.13, (name, error)
            assert error.largest < 1.3, (name, error)
            assert error.relative < (0.5 if name != "one entry" else 1.0), (name, error)


@on_devices
def test_nothing(device: str) -> None:
    for shape in ((0, 16, 32), (3, 0, 5), (3, 5, 0)):
        assert polar(torch.empty(shape, device=device)).shape == shape


@pytest.mark.gpu
def test_more_elements_than_an_int_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "batch_invariant", True)
    count = 2**31 // (512 * 512) + 2
    if torch.cuda.mem_get_info()[0] < 10 * count * 512 * 512:
        pytest.skip("not enough memory on the device")
    x = torch.randn(count, 512, 512, device="cuda", dtype=torch.bfloat16)
    found = polar(x, max_workspace_bytes=1 << 30)
    for i in (0, count - 1):
        assert torch.equal(found[i], polar(x[i]))
        assert polar_error(x[i].double().cpu(), found[i].double().cpu()).off_diagonal < 0.1
