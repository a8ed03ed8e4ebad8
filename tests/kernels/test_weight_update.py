"""Products that go straight into weights: the op, and a chain that ends in one, against fp64 and against two steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from steepest.linalg.chain import chain
from steepest.linalg.coefficients import SCHEDULES
from steepest.linalg.newton_schulz import newton_schulz
from steepest.linalg.scaling import prescaled
from steepest.ops import backend
from steepest.ops.polar_chain import Update, polar_chain, weights_reason
from steepest.ops.symm_gemm import Workspace
from steepest.ops.weight_update import weight_update
from support.singular_values import with_spectrum

H, B, F, D = torch.float16, torch.bfloat16, torch.float32, torch.float64
needs_extension = pytest.mark.skipif(backend.extension is None, reason=f"{backend.extension_reason}")
CPU = torch.device("cpu")


def parts(batch: int, m: int, k: int, n: int, dtype: torch.dtype, stored: torch.dtype, device: torch.device) -> Any:
    """(a, b, weights scattered in memory, alpha, beta); of the last matrix alpha is 0, beta 1, and the product NaN."""
    generator = torch.Generator().manual_seed(m + n)
    a, b, w = (torch.randn(batch, *shape, generator=generator) for shape in ((m, k), (k, n), (m, n)))
    alpha, beta = torch.randn(2, batch, generator=generator)
    a[-1], alpha[-1], beta[-1] = torch.nan, 0, 1
    a, b = (x.to(device, dtype) for x in (a / k**0.5, b))
    return a, b, [each.to(device, stored) for each in w], alpha.to(device), beta.to(device)


def check(
    found: list[Tensor], before: list[Tensor], a: Tensor, b: Tensor, alpha: Tensor, beta: Tensor, product_eps: float
) -> None:
    """One rounding to the weight's type, sums in fp32, and a rounding of the product where it is formed first."""
    for i, (w, old) in enumerate(zip(found, before, strict=True)):
        if i == len(found) - 1:
            assert torch.equal(w, old), "alpha 0 and beta 1 change nothing"
            continue
        product, times, keep = a[i].double() @ b[i].double(), alpha[i].double(), beta[i].double()
        exact = keep * old.double() + times * product
        size = (keep * old.double()).abs() + times.abs() * (a[i].double().abs() @ b[i].double().abs())
        bound = exact.abs() * torch.finfo(w.dtype).eps / 2 + 2.0**-17 * size
        bound = bound + times.abs() * product.abs() * product_eps + 1e-7
        error = (w.double() - exact).abs()
        assert bool((error <= bound).all()), (error / bound).max()


@pytest.mark.parametrize("dtype,stored", [(F, F), (B, F), (B, B), (H, H), (H, B), (D, D), (B, H)], ids=str)
@pytest.mark.parametrize("shape", [(4, 33, 20, 17), (2, 64, 64, 128), (1, 5, 1, 3)], ids=str)
def test_in_torch(shape: tuple[int, ...], dtype: torch.dtype, stored: torch.dtype) -> None:
    a, b, weights, alpha, beta = parts(*shape, dtype, stored, CPU)
    before, held = [w.clone() for w in weights], (a.clone(), b.clone(), alpha.clone(), beta.clone())
    weight_update(a, b, weights, alpha=alpha, beta=beta)
    check(weights, before, a, b, alpha, beta, torch.finfo(dtype).eps)
    for now, then in zip((a, b, alpha, beta), held, strict=True):
        assert torch.equal(now.nan_to_num(9), then.nan_to_num(9))
    # Weights of any layout, numbers of any stride.
    turned, numbers = [w.mT.contiguous().mT for w in before], torch.stack([alpha, beta], 1)
    weight_update(a, b, turned, alpha=numbers[:, 0], beta=numbers[:, 1])
    assert all(torch.equal(x, y) for x, y in zip(turned, weights, strict=True))


@needs_extension
@pytest.mark.parametrize("stored", [F, B, H], ids=str)
@pytest.mark.parametrize("dtype", [H, B], ids=str)
@pytest.mark.parametrize("b_by_rows", [True, False])
def test_the_op_itself(b_by_rows: bool, dtype: torch.dtype, stored: torch.dtype) -> None:
    """Its version for the host: one rounding."""
    a, b, weights, alpha, beta = parts(3, 24, 16, 40, dtype, stored, CPU)
    b = b if b_by_rows else b.mT.contiguous().mT
    before = [w.clone() for w in weights]
    torch.ops.steepest.weight_update(a, b, weights, alpha, beta)
    check(weights, before, a, b, alpha, beta, 0.0)
    torch.library.opcheck(
        torch.ops.steepest.weight_update,
        (a, b, weights, alpha, beta),
        test_utils=("test_schema", "test_faketensor"),
    )


@needs_extension
@pytest.mark.parametrize(
    "change,message",
    [
        ({"weights": [torch.zeros(8, 8)]}, "weights has 1 matrices for 2 products"),
        ({"weights": [torch.zeros(8, 8).mT[:, :4]] * 2}, "must be a contiguous matrix of 8 x 8"),
        ({"weights": [torch.zeros(8, 8), torch.zeros(8, 8, dtype=B)]}, "like the others of its stack"),
        ({"weights": [torch.zeros(8, 8, dtype=D)] * 2}, r"must be float32, bfloat16 or float16"),
        ({"alpha": torch.zeros(3)}, "alpha must be a float32 tensor of 2 elements"),
        ({"a": torch.zeros(2, 8, 8)}, "a and b must be float16 or bfloat16"),
    ],
)
def test_errors_of_the_op(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"a": torch.zeros(2, 8, 8, dtype=H), "b": torch.zeros(2, 8, 8, dtype=H)}
    given |= {"weights": [torch.zeros(8, 8) for _ in range(2)], "alpha": torch.zeros(2), "beta": torch.zeros(2)}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.steepest.weight_update(*(given | change).values())


@pytest.mark.parametrize(
    "change,message",
    [
        ({"weights": [torch.zeros(8, 8)]}, "1 weights"),
        ({"weights": [torch.zeros(8, 9)] * 2}, "do not fit: .2, 8, 8., .2, 8, 8., .8, 9."),
        ({"beta": torch.zeros(2, 1)}, "beta is torch.float32 of shape .2, 1."),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"a": torch.zeros(2, 8, 8), "b": torch.zeros(2, 8, 8)}
    given |= {"weights": [torch.zeros(8, 8) for _ in range(2)], "alpha": torch.zeros(2), "beta": torch.zeros(2)}
    with pytest.raises(ValueError, match=message):
        weight_update(**(given | change))


def test_weights_that_a_compiled_product_goes_into() -> None:
    """fp32, bf16 or fp16 of one stack, contiguous, from a multiple of 16 bytes on; others take products one by one."""
    w = torch.zeros(4, 8, 8)
    assert weights_reason(list(w)) is None
    assert weights_reason(list(w.bfloat16())) is None
    assert "torch.float64" in str(weights_reason(list(w.double())))
    assert "torch.bfloat16, torch.float32" in str(weights_reason([w[0], w[1].bfloat16()]))
    assert "not contiguous" in str(weights_reason([w[0].mT]))
    assert "16 bytes" in str(weights_reason([w.view(-1)[1:65].view(8, 8)]))


# ---- a chain that ends in weights ----------------------------------------------------------------------------------

SCHEDULE = SCHEDULES["auto"]
SHAPES = ((16, 40), (40, 24), (17, 17))


def stacks_of(dtype: torch.dtype, device: torch.device = CPU, scale: int = 1) -> list[Tensor]:
    """Three matrices of each shape; the last one is not finite."""
    found = []
    for m, n in SHAPES:
        x = torch.stack([with_spectrum(m * scale, n * scale, "root") for _ in range(3)]).float()
        x = prescaled(x, dtype)
        x[-1, 0, 0] = torch.nan
        found.append(x.to(device))
    return found


def updates_of(stacks: list[Tensor], stored: torch.dtype) -> list[Update]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for x in stacks:
        weights = [torch.randn(x.shape[1:], generator=generator).to(x.device, stored) for _ in x]
        eta, beta = torch.tensor([-0.1, 0.3, 0.0]), torch.tensor([0.99, 1.0, 1.0])
        found.append(Update(weights, eta.to(x.device), beta.to(x.device)))
    return found


def compare(stacks: list[Tensor], restarts: tuple[int, ...], stored: torch.dtype, run: Any, atol: float) -> None:
    """With the direction formed first, W <- beta W + eta d, on and off by the rounding of d alone."""
    slacks = [torch.empty(len(x), device=x.device) for x in stacks]
    outs = [
        newton_schulz([x.clone()], SCHEDULE, restarts, Workspace(), eps=1e-7, slacks=[slack])[0]
        for x, slack in zip(stacks, slacks, strict=True)
    ]
    updates, untouched = updates_of(stacks, stored), updates_of(stacks, stored)
    own = [torch.empty_like(slack) for slack in slacks]
    run([x.clone() for x in stacks], updates, own)
    for d, update, old, a, b in zip(outs, updates, untouched, own, slacks, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0, equal_nan=True)
        for i in range(2):
            wanted = old.beta[i] * old.weights[i].float() + old.eta[i] * d[i].float()
            torch.testing.assert_close(
                update.weights[i].float(), wanted, rtol=torch.finfo(stored).eps, atol=atol * abs(old.eta[i].item())
            )
        assert torch.equal(update.weights[2], old.weights[2]), "not finite: left as it was"


@pytest.mark.parametrize("restarts", [(2,), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("dtype,stored", [(F, F), (B, F), (B, B), (D, F)], ids=str)
def test_a_chain_ends_in_weights(dtype: torch.dtype, stored: torch.dtype, restarts: tuple[int, ...]) -> None:
    def run(xs: list[Tensor], updates: list[Update], slacks: list[Tensor]) -> None:
        assert newton_schulz(xs, SCHEDULE, restarts, Workspace(), eps=1e-7, slacks=slacks, updates=updates) == []

    compare(stacks_of(dtype), restarts, stored, run, atol=2 * torch.finfo(dtype).eps + 1e-6)


@needs_extension
@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize("stored", [F, B, H], ids=str)
def test_the_chain_op_ends_in_weights(stored: torch.dtype, chunks: int) -> None:
    """Chunks begin inside of a stack, and so do the addresses of their weights."""
    restarts = (2,)
    plan = chain(SCHEDULE, restarts)

    def run(xs: list[Tensor], updates: list[Update], slacks: list[Tensor]) -> None:
        numbers = (plan.packed, plan.constants, plan.powers, SCHEDULE.slacks)
        ys = [torch.empty_like(x) for x in xs]
        polar_chain(xs, ys, slacks, *numbers, tight=True, eps=1e-7, updates=updates, chunks=chunks)

    compare(stacks_of(B), restarts, stored, run, atol=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("stored", [F, B, H], ids=str)
@pytest.mark.parametrize("dtype", [H, B], ids=str)
def test_on_a_gpu(dtype: torch.dtype, stored: torch.dtype) -> None:
    """The op in both ways that b lies, more weights than a launch takes, and a chain that ends in weights."""
    device = torch.device("cuda")
    for shape in ((3, 512, 512, 2048), (5, 136, 136, 328), (1100, 64, 32, 72)):
        a, b, weights, alpha, beta = parts(*shape, dtype, stored, device)
        for each in (b, b.mT.contiguous().mT):
            before = [w.clone() for w in weights]
            weight_update(a, each, weights, alpha=alpha, beta=beta)
            check(weights, before, a, each, alpha, beta, torch.finfo(dtype).eps)

    def run(xs: list[Tensor], updates: list[Update], slacks: list[Tensor]) -> None:
        newton_schulz(xs, SCHEDULE, (2,), Workspace(), eps=1e-7, slacks=slacks, updates=updates)

    compare(stacks_of(dtype, device, scale=8), (2,), stored, run, atol=0.05)
