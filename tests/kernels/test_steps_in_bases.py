"""Steps of Adam in eigenbases by addresses against their formula in fp64; bits are tests/optim/test_in_bases.py's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from steepest.linalg.basis import ACCEPTED, LIMITS, TRIES
from steepest.ops import rotated
from steepest.ops.multi_tensor import Groups, Table
from steepest.ops.program import Program
from steepest.ops.steps_in_bases import StepInBases, StepsInBases
from steepest.ops.whole_steps import numbers_of
from support.training import noise

pytestmark = pytest.mark.skipif(
    not rotated.supports(torch.zeros(1, 2, 2)), reason="no products are compiled for this processor"
)
SHAPES = ((1, 1, 1), (3, 5, 4), (2, 33, 70), (1, 128, 128), (1, 256, 17))
#: lr, weight decay, beta1, beta2 and eps of two groups, and the rates of their factors
HYPERS = ([1e-2, 0.1, 0.9, 0.95, 1e-8], [3e-2, 0.0, 0.5, 0.99, 1e-3])
RATES = (0.8, 0.95)
RATIO = 1.5
KEPT = ("momentum", "second", "step", "learned", "left", "right", "w")


def orthonormal(count: int, n: int, seed: int) -> Tensor:
    return torch.linalg.qr(noise((count, n, n), seed).double())[0].float().contiguous()


def symmetric(count: int, n: int, seed: int) -> Tensor:
    x = noise((count, n, n), seed)
    return (x @ x.mT).tril() + (x @ x.mT).tril(-1).mT


def problem(shape: tuple[int, int, int], sides: str, seed: int) -> dict[str, Tensor]:
    """Tensors of a parameter in the middle of a training, after two gradients."""
    batch, m, n = shape
    none = torch.empty(0)
    left, right = sides in ("both", "left"), sides in ("both", "right")
    return {
        "w": noise(shape, seed),
        "g": noise(shape, seed + 1),
        "momentum": noise(shape, seed + 2),
        "second": noise(shape, seed + 3).square(),
        "step": torch.tensor(2.0),
        "learned": torch.tensor(3.0),
        "left": symmetric(batch, m, seed + 4) if left else none,
        "right": symmetric(batch, n, seed + 5) if right else none,
        "left_basis": orthonormal(batch, m, seed + 6) if left else none,
        "right_basis": orthonormal(batch, n, seed + 7) if right else none,
        "left_status": torch.zeros(batch if left else 0, dtype=torch.int32),
        "right_status": torch.zeros(batch if right else 0, dtype=torch.int32),
    }


def formula(t: dict[str, Tensor], hyper: list[float], rate: float, inside: bool) -> dict[str, Tensor]:
    """The step in fp64."""
    lr, decay, beta1, beta2, eps = hyper
    w, g, m, v, L, R, Q_L, Q_R = (
        t[key].double() for key in ("w", "g", "momentum", "second", "left", "right", "left_basis", "right_basis")
    )
    Q_L = Q_L if Q_L.numel() else torch.eye(w.shape[-2], dtype=torch.float64)
    Q_R = Q_R if Q_R.numel() else torch.eye(w.shape[-1], dtype=torch.float64)
    step, learned = t["step"].double() + 1, t["learned"].double() + 1
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * (Q_L.mT @ g @ Q_R).square()
    corrected = (1 - beta2**step).sqrt()
    divisor = (v.sqrt() + eps) / corrected if inside else v.sqrt() / corrected + eps
    update = Q_L @ (Q_L.mT @ (m / (1 - beta1**step)) @ Q_R / divisor) @ Q_R.mT
    weight = (1 - rate) / (1 - rate**learned)
    factors = {
        key: P + weight * (square - P) if P.numel() else P
        for key, P, square in (("left", L, g @ g.mT), ("right", R, g.mT @ g))
    }
    w = (1 - lr * decay) * w - lr * RATIO * update
    return {"w": w, "momentum": m, "second": v, "step": step, "learned": learned, **factors}


def steps_of(all_of: list[dict[str, Tensor]], inside: bool, workspace: int, **limits: float) -> StepsInBases:
    program = Program(momentum_correction=True)
    limits = {"most": 1e9, "most_square": 1e9, **limits}
    steps = []
    for i, t in enumerate(all_of):
        of_state = (t["momentum"], t["second"], torch.empty(0, dtype=torch.int16), t["step"], t["learned"])
        metric = tuple((t[f"left{what}"], t[f"right{what}"]) for what in ("", "_basis", "_status"))
        options: dict[str, Any] = {"corrected": True, "eps_inside": inside, "ratio": RATIO, **limits}
        where: dict[str, Any] = {"group": i % 2, "place": (i % 2, i, 0)}
        steps.append(StepInBases(program, t["w"].shape, torch.float32, *of_state, *metric, **options, **where))
    sizes = [t["w"].numel() for t in all_of]
    lines = [(len(t["w"]), t["w"][0].numel()) for t in all_of]
    table = Table.empty(torch.tensor(3), sizes, lines)
    return StepsInBases(steps, table, workspace, LIMITS, ACCEPTED, TRIES)


def take(
    steps: StepsInBases,
    all_of: list[dict[str, Tensor]],
    found_inf: Tensor | None = None,
    due: Sequence[bool] = (),
) -> list[tuple[int, int, int]]:
    groups = Groups([x for group in HYPERS for x in group], [], [], [i % 2 for i in range(len(all_of))])
    return steps.take([t["g"] for t in all_of], [t["w"] for t in all_of], numbers_of(groups), RATES, found_inf, due)


@pytest.mark.parametrize("workspace", [1, 1 << 30])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("sides", ["both", "left", "right", "none"])
def test_a_step_is_its_formula(sides: str, inside: bool, workspace: int) -> None:
    all_of = [problem(shape, sides, 10 * i) for i, shape in enumerate(SHAPES)]
    wanted = [formula(t, HYPERS[i % 2], RATES[i % 2], inside) for i, t in enumerate(all_of)]
    take(steps_of(all_of, inside, workspace), all_of)
    for t, of in zip(all_of, wanted, strict=True):
        for key in KEPT:
            size = of[key].abs().max() if of[key].numel() else torch.tensor(0.0)
            torch.testing.assert_close(t[key].double(), of[key], rtol=0, atol=float(3e-5 * size), msg=key)


@pytest.mark.parametrize("why", ["not finite", "too large", "too long"])
def test_a_gradient_that_is_no_step_leaves_its_parameter_alone_and_no_other(why: str) -> None:
    all_of = [problem(shape, "both", 10 * i) for i, shape in enumerate(SHAPES)]
    limits = {"not finite": {}, "too large": {"most": 1e3}, "too long": {"most_square": 1e6}}[why]
    all_of[2]["g"][1, 2, 3] = torch.nan if why == "not finite" else 1e4
    before = [{key: t.clone() for key, t in each.items()} for each in all_of]
    wanted = [formula(t, HYPERS[i % 2], RATES[i % 2], False) for i, t in enumerate(all_of)]
    steps = steps_of(all_of, False, 1 << 30, **limits)
    take(steps, all_of)
    assert all(torch.equal(all_of[2][key], before[2][key]) for key in KEPT)
    assert int(steps._table.skipped) == 4
    torch.testing.assert_close(all_of[3]["w"].double(), wanted[3]["w"], rtol=0, atol=1e-4)


def test_a_scaler_that_found_inf_lets_nothing_step() -> None:
    all_of = [problem(shape, "both", 10 * i) for i, shape in enumerate(SHAPES)]
    before = [{key: t.clone() for key, t in each.items()} for each in all_of]
    take(steps_of(all_of, False, 1 << 30), all_of, torch.tensor(1.0))
    assert all(torch.equal(t[key], old[key]) for t, old in zip(all_of, before, strict=True) for key in KEPT)


def near_bases(t: dict[str, Tensor]) -> None:
    """Bases of the factors, a little turned."""
    for side in ("left", "right"):
        exact = torch.linalg.eigh(t[side].double())[1].flip(-1)
        turn = 1e-3 * noise(exact.shape, 9).double()
        t[f"{side}_basis"].copy_(torch.linalg.qr(exact + exact @ (turn - turn.mT))[0])


def off_diagonal(P: Tensor, Q: Tensor) -> float:
    """How far Q^T P Q is from diagonal."""
    turned = Q.double().mT @ P.double() @ Q.double()
    return float((turned - torch.diag_embed(turned.diagonal(dim1=-2, dim2=-1))).norm() / turned.norm())


def test_bases_that_are_due_follow_their_factors_or_are_left() -> None:
    """The bases of the first are not due, those of the second nowhere near, and the last takes no step."""
    shapes = ((1, 20, 24), (2, 12, 40), (2, 33, 70), (1, 64, 64), (1, 30, 16))
    all_of = [problem(shape, "both", 10 * i) for i, shape in enumerate(shapes)]
    for i in (0, 2, 3, 4):
        near_bases(all_of[i])
    for t in all_of:
        t["g"] *= 0.3
    all_of[4]["g"][0, 1, 2] = torch.nan
    alone = [{key: t.clone() for key, t in each.items()} for each in all_of]
    assert take(steps_of(alone, False, 1 << 30), alone) == []
    left = take(steps_of(all_of, False, 1 << 30), all_of, due=[False, True, True, True, True])
    taken = []
    for i, (t, without) in enumerate(zip(all_of, alone, strict=True)):
        for side, name in enumerate(("left", "right")):
            P, basis, before = t[name], t[f"{name}_basis"], without[f"{name}_basis"]
            assert torch.equal(P, without[name])
            for k in range(len(basis)):
                if i in (0, 4) or (i, side, k) in left:
                    assert torch.equal(basis[k], before[k])
                    assert t[f"{name}_status"][k] == 0
                    continue
                taken.append((i, side, k))
                assert off_diagonal(P[k], basis[k]) < 0.7 * off_diagonal(P[k], before[k])
                identity = torch.eye(basis.shape[-1], dtype=torch.float64)
                assert float((basis[k].double().mT @ basis[k].double() - identity).abs().max()) < 1e-5
                assert t[f"{name}_status"][k] == ACCEPTED
    assert {i for i, _, _ in left} <= {1, 2, 3}
    assert {(1, 0, 0), (1, 0, 1)} <= {*left, *taken}
    assert {i for i, _, _ in taken} >= {2, 3}
    assert left
    for i in (2, 3):  # second moments are sorted with the columns, and none is lost
        assert torch.equal(all_of[i]["second"].flatten().sort()[0], alone[i]["second"].flatten().sort()[0])
