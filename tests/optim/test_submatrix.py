"""Steps of a submatrix (Dion2) by the fused ops: what torch operations do of them, in state, weights and reports."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest
from steepest.linalg import polar
from steepest.ops import backend
from steepest.optimizer import MatrixOptimizer
from support.host_reads import no_host_reads
from support.problems import gap
from support.slow import slow
from support.training import noise

pytestmark = pytest.mark.skipif(backend.extension is None, reason=f"{backend.extension_reason}")

STEPS = 6
#: steps whose gradient of the first matrix is not finite
BAD = {3: math.nan, 4: -math.inf}
BOUNDS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SHAPES: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((12, 8), {}),
    ((8, 12), {}),
    ((1, 5), {}),
    ((5, 1), {}),
    ((6, 10), {"num_heads": 2}),
    ((9, 4), {"split_sizes": (4, 3, 2)}),
    ((4, 9), {"split_sizes": (4, 3, 2), "transposed": True}),
    ((3, 4, 5), {"batch_dims": 1}),
    ((4, 3, 2, 2), {}),
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"after": "rows"},
    {"momentum": 1.0},
    {"momentum": 0.0},
    {"fraction": 1.0},
    {"fraction": 1e-9},
    {"maximize": True},
    {"weight_decay_method": "l2"},
    {"weight_decay_method": "independent"},
    {"cautious_update": True, "after": "rows"},
    {"cautious_wd": True},
    {"adjust_lr_fn": "match_rms_adamw"},
    {"lr": torch.tensor(0.02, dtype=torch.float64)},
    {"momentum_dtype": torch.bfloat16},
    {"momentum_dtype": torch.float64},
    {"state_bits": 8},
    {"variance_reduction": 0.3},
    {"average": 0.9},
    {"constraint": "frobenius", "weight_decay": 0.0},
    {"stochastic_rounding": True},
    {"keep_mantissa": True, "after": "rows"},
    {"fuse_update": True},
    {"max_workspace_bytes": 1, "after": "rows"},
]


def made(
    shape: tuple[int, ...], dtype: torch.dtype, how: dict[str, Any] | None = None, **options: Any
) -> tuple[MatrixOptimizer, list[nn.Parameter]]:
    """Three weights of one shape in two groups that differ in their numbers, and a vector."""
    params = [nn.Parameter(noise(each, seed, dtype)) for seed, each in enumerate((shape, shape, shape, (7,)))]
    values = {"lr": 0.02, "weight_decay": 0.1, "fraction": 0.4, "polar": "svd", **options}
    other = {"momentum": 0.5, "lr": 0.01} if "momentum" not in options and "lr" not in options else {}
    groups = [
        {"params": params[:2], "use_muon": True, **(how or {})},
        {"params": params[2:3], "use_muon": True, **(how or {}), **other},
        {"params": params[3:], "use_muon": False},
    ]
    return steepest.Dion2(groups, **values), params


def give(params: list[nn.Parameter], step: int) -> None:
    for i, p in enumerate(params):
        p.grad = noise(p.shape, 1000 * (step + 1) + i, p.dtype)
    if step in BAD:
        assert params[0].grad is not None
        params[0].grad.view(-1)[step] = BAD[step]


def run(*args: Any, **options: Any) -> tuple[list[Tensor], list[dict[str, Tensor]], list[dict[str, float]]]:
    """Weights and states after some steps, and what every step reported."""
    optimizer, params = made(*args, **options)
    reports = []
    for step in range(STEPS):
        give(params, step)
        optimizer.step()
        reports.append({name: float(t) for name, t in optimizer.metrics().items() if "slack" not in name})
    return [p.detach() for p in params], [dict(optimizer.state[p]) for p in params], reports


def check(shape: tuple[int, ...], dtype: torch.dtype, how: dict[str, Any], options: dict[str, Any]) -> None:
    weights, states, reports = run(shape, dtype, how, **options)
    others, other_states, other_reports = run(shape, dtype, how, backend="torch", **options)
    bound = BOUNDS[dtype]
    for p, q, state, other in zip(weights, others, states, other_states, strict=True):
        assert gap(p, q) < bound
        assert state.keys() == other.keys()
        for key, t in other.items():
            assert state[key].dtype == t.dtype
            assert gap(state[key].double(), t.double()) < bound, key
    for step, (report, wanted) in enumerate(zip(reports, other_reports, strict=True)):
        for name, value in wanted.items():
            if step in BAD and name in ("0/update_norm", "0/param_norm"):  # of the last step that was taken, or of none
                continue
            assert report[name] == pytest.approx(value, rel=max(10 * bound, 1e-6), abs=1e-12), name


@pytest.mark.parametrize("dtype", [torch.float32, *map(slow, (torch.float64, torch.bfloat16, torch.float16))], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_steps_as_by_torch_operations(options: dict[str, Any], dtype: torch.dtype) -> None:
    check((12, 8), dtype, {}, options)


@pytest.mark.parametrize("after", [None, "rows"])
@pytest.mark.parametrize("shape, how", SHAPES, ids=str)
def test_every_piece_of_a_weight_steps_as_by_torch_operations(
    shape: tuple[int, ...], how: dict[str, Any], after: str | None
) -> None:
    check(shape, torch.float64, how, {"after": after})


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_no_part_of_it_goes_by_torch_operations(options: dict[str, Any]) -> None:
    optimizer, params = made((12, 8), torch.float32, **options)
    give(params, 0)
    assert optimizer.prepare() == {"cpu"}


@pytest.mark.parametrize("fraction", [0.25, 1.0])
def test_what_is_reported_of_the_momentum_is_what_it_is_after_the_step(fraction: float) -> None:
    """With nothing kept of a row that steps, all of it is gone where all rows step: to the bit, not by a difference."""
    optimizer, params = made((12, 8), torch.float32, momentum=0.0, fraction=fraction)
    for step in range(3):
        give(params, step)
        optimizer.step()
        square = sum(float(optimizer.state[p]["momentum_buffer"].double().square().sum()) for p in params[:2])
        assert float(optimizer.metrics()["0/momentum_norm"]) == pytest.approx(math.sqrt(square), rel=1e-6)
        assert (square == 0) == (fraction == 1)


def test_a_momentum_wider_than_its_gradients_keeps_its_bits() -> None:
    """Of rows that wait nothing is rounded to the gradient's dtype on the way."""
    optimizer, params = made((12, 8), torch.float32, momentum_dtype=torch.float64, fraction=0.1)
    give(params, 0)
    optimizer.step()
    started = noise((12, 8), 7, torch.float64)
    optimizer.state[params[0]]["momentum_buffer"].copy_(started)
    give(params, 1)
    optimizer.step()
    assert params[0].grad is not None
    wanted = started + params[0].grad.double()
    momentum = optimizer.state[params[0]]["momentum_buffer"]
    kept = (momentum == wanted).all(0)
    assert kept.sum() == 7  # of 8 columns
    torch.testing.assert_close(momentum[:, ~kept], 0.95 * wanted[:, ~kept], rtol=1e-14, atol=0)


def test_a_step_reads_nothing_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CUDA graph could not hold."""
    optimizer, params = made((12, 8), torch.float32, after="rows")
    give(params, 0)
    optimizer.step()  # with the self-check of a CPU, if this process has not had it yet
    for step in (1, 2):
        give(params, step)
        with no_host_reads(monkeypatch):
            optimizer.step()


#: What has torch operations before a direction that works in 16 bits.
AROUND = [(steepest.Muon, {}), (steepest.NorMuon, {}), (steepest.AdaMuon, {}), (steepest.Dion2, {})]
AROUND += [(steepest.Dion2, {"after": "rows"}), (steepest.Muon, {"cautious_update": True})]


@pytest.mark.parametrize("scale", [2.0**-40, 2.0**-20, 2.0**30])
@pytest.mark.parametrize("cls, options", AROUND, ids=str)
def test_inputs_stay_in_the_range_of_fp16(
    cls: type[MatrixOptimizer], options: dict[str, Any], scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU directions work in fp16, into whose range the fused ops scale what they store, and nobody else."""
    monkeypatch.setattr(polar, "compute_dtype", lambda preset, dtype, device: torch.float16)
    weights = []
    for factor in (1.0, scale):
        p = nn.Parameter(noise((24, 16), 0))
        optimizer = cls([{"params": [p], "use_muon": True}], lr=0.02, weight_decay=0.0, **options)
        for step in range(3):
            p.grad = factor * noise(p.shape, 1 + step)
            optimizer.step()
        weights.append(p.detach() - noise((24, 16), 0))
    assert float((weights[1] - weights[0]).norm() / weights[0].norm()) < 0.02
