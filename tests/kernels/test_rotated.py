"""The calls of steps in eigenbases on a CPU against their formulas in fp64, and SOAP with them against SOAP without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import steepest
from steepest.linalg.basis import FELL_BACK, LIMITS, TRIES, tracked
from steepest.ops import eigh, rotated
from steepest.ops.rotated import Stacks
from steepest.ops.steps_in_bases import StepsInBases

pytestmark = pytest.mark.skipif(
    not rotated.supports(torch.zeros(1, 2, 2)), reason="no products are compiled for this processor"
)
SHAPES = [(1, 1, 1), (3, 5, 4), (2, 33, 70), (1, 128, 128), (1, 256, 17), (2, 300, 40)]
ACCEPTED = 1


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def orthonormal(count: int, n: int, seed: int) -> Tensor:
    return torch.linalg.qr(gaussian(count, n, n, seed=seed).double())[0].float().contiguous()


def off(x: Tensor, wanted: Tensor) -> float:
    """The largest difference over the largest entry."""
    return float((x.double() - wanted).abs().max() / wanted.abs().max())


# ---- rotate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("sides", ["both", "left", "right", "none"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rotate_is_its_formula(shape: tuple[int, int, int], sides: str, inside: bool) -> None:
    batch, m, n = shape
    none, beta, eps = torch.empty(0), 0.9, 1e-2
    left = orthonormal(batch, m, 1) if sides in ("both", "left") else none
    right = orthonormal(batch, n, 2) if sides in ("both", "right") else none
    x, v, step = gaussian(*shape, seed=3), gaussian(*shape, seed=4).square(), torch.tensor(3.0)
    wide = x.double()
    L = left.double() if left.numel() else torch.eye(m, dtype=torch.float64)
    R = right.double() if right.numel() else torch.eye(n, dtype=torch.float64)
    c = (1 - beta**3) ** 0.5
    D = ((v.double().sqrt() + eps) / c if inside else v.double().sqrt() / c + eps).sqrt()
    numbers = {"beta": beta, "eps": eps, "inside": inside}

    into = rotated.rotate(x, left, right, v, step, "into", **numbers)
    back = rotated.rotate(x, left, right, v, step, "back", **numbers)
    observed = rotated.rotate(x, left, right, v, none, "observe", **numbers)
    plain = rotated.rotate(x, left, right, none, none, "into")
    assert off(into, L.mT @ wide @ R / D) < 1e-5
    assert off(back, L @ (wide / D) @ R.mT) < 1e-5
    assert off(observed, v.double() * beta + (1 - beta) * (L.mT @ wide @ R).square()) < 1e-5
    assert off(plain, L.mT @ wide @ R) < 1e-5


def test_nothing_divided_by_nothing_is_nothing() -> None:
    x, v, none = gaussian(1, 3, 20), torch.zeros(1, 3, 20), torch.empty(0)
    v[0, 1] = 1.0
    out = rotated.rotate(x, none, none, v, none, "into")
    assert torch.equal(out[0, 1], x[0, 1])
    assert not out[0, 0].any()
    assert not out[0, 2].any()


def test_a_matrix_has_the_same_bits_in_any_batch_and_on_any_number_of_threads() -> None:
    left, right, v = orthonormal(3, 160, 1), orthonormal(3, 130, 2), gaussian(3, 160, 130, seed=4).square()
    x, step, threads = gaussian(3, 160, 130, seed=3), torch.tensor(3.0), torch.get_num_threads()

    def rotate(at: slice) -> Tensor:
        return rotated.rotate(x[at], left[at], right[at], v[at], step, "back", beta=0.9, eps=1e-8)

    try:
        torch.set_num_threads(1)
        whole = rotate(slice(None))
        torch.set_num_threads(2)
        assert torch.equal(rotate(slice(None)), whole)
        assert torch.equal(rotate(slice(1, 2)), whole[1:2])
    finally:
        torch.set_num_threads(threads)


def test_several_stacks_in_one_call_have_the_bits_of_each_and_are_written_where_flags_say() -> None:
    shapes, none = [(2, 20, 30), (1, 100, 9), (3, 64, 64)], torch.empty(0)
    xs, seconds = [gaussian(*s, seed=1) for s in shapes], [gaussian(*s, seed=2).square() for s in shapes]
    bases = [orthonormal(b, side, 3) for b, m, n in shapes for side in (m, n)]
    numbers: dict[str, Any] = {"beta": 0.9, "eps": 1e-8, "inside": False}
    alone = [
        rotated.rotate(x, bases[2 * i], bases[2 * i + 1], seconds[i], none, "observe", **numbers)
        for i, x in enumerate(xs)
    ]
    before = [t.clone() for t in seconds]
    flags = [torch.tensor(flag) for flag in (True, False, True)]
    stacks = Stacks(shapes, [], [], bases, seconds=seconds, steps=[none] * 3)
    rotated.rotate_all(xs, stacks, "observe", seconds, flags, **numbers)
    assert torch.equal(seconds[0], alone[0])
    assert torch.equal(seconds[1], before[1])
    assert torch.equal(seconds[2], alone[2])


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("sides", ["both", "left", "right", "none"])
@pytest.mark.parametrize("shape", [*SHAPES[:-1], (3, 200, 40)], ids=str)
def test_adam_has_the_bits_of_the_three_rotations(shape: tuple[int, int, int], sides: str, inside: bool) -> None:
    batch, m, n = shape
    none, step = torch.empty(0), torch.tensor(3.0)
    left = orthonormal(batch, m, 1) if sides in ("both", "left") else none
    right = orthonormal(batch, n, 2) if sides in ("both", "right") else none
    numbers: dict[str, Any] = {"beta": 0.9, "eps": 1e-2, "inside": inside}
    grads, xs = [gaussian(*shape, seed=s) for s in (1, 2)], [gaussian(*shape, seed=s) for s in (3, 4)]
    seconds = [gaussian(*shape, seed=s).square() for s in (5, 6)]
    seconds[0][0, 0] = 0.0
    learned = [rotated.rotate(grads[0], left, right, seconds[0], none, "observe", **numbers), seconds[1].clone()]
    wanted = []
    for x, v in zip(xs, learned, strict=True):
        into = rotated.rotate(x, left, right, v, step, "into", **numbers)
        wanted.append(rotated.rotate(into, left, right, v, step, "back", **numbers))
    stacks = Stacks([shape] * 2, [], [], [left, right] * 2, seconds=seconds, steps=[step] * 2)
    rotated.adam(grads, xs, stacks, xs, [torch.tensor(True), torch.tensor(False)], **numbers)  # in place
    assert all(map(torch.equal, seconds, learned))
    assert all(map(torch.equal, xs, wanted))


# ---- factors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.95])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_update_factors_is_its_formula_where_the_flag_is_true(shape: tuple[int, int, int], beta: float) -> None:
    grads = [gaussian(*shape, seed=seed) for seed in (1, 2, 3)]
    factors = []
    for seed in (4, 5, 6):
        y = gaussian(*shape, seed=seed)
        factors += [y @ y.mT, y.mT @ y]
    factors[5] = torch.empty(0)  # a side without a factor
    factors = [(p + p.mT) / 2 if p.numel() else p for p in factors]
    counts = [torch.tensor(t) for t in (0.0, 4.0, 7.0)]
    before, counted = [p.clone() for p in factors], [t.clone() for t in counts]
    stacks = Stacks([shape] * 3, factors, counts)
    rotated.update_factors(grads, stacks, [torch.tensor(flag) for flag in (True, False, True)], beta)

    assert torch.equal(factors[2], before[2])
    assert torch.equal(factors[3], before[3])
    assert [float(t) for t in counts] == [1.0, 4.0, 8.0]
    for i in (0, 2):
        g, w = grads[i].double(), (1 - beta) / (1 - beta ** (float(counted[i]) + 1))
        for k, gram in ((2 * i, g @ g.mT), (2 * i + 1, g.mT @ g)):
            if factors[k].numel():
                assert off(factors[k], before[k].double() + w * (gram - before[k].double())) < 1e-5
                assert torch.equal(factors[k], factors[k].mT)


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("sides", ["both", "left", "right"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_coupled_is_its_formula_where_the_flag_is_true(shape: tuple[int, int, int], sides: str, limited: bool) -> None:
    batch, m, n = shape
    beta, none, grads = 0.9, torch.empty(0), [gaussian(*shape, seed=seed) for seed in (1, 2, 3)]
    bases, factors, values = [], [], []
    for i in range(3):
        for side, length in (("left", m), ("right", n)):
            there = sides in ("both", side)
            y = gaussian(batch, length, length, seed=4 + i)
            bases.append(orthonormal(batch, length, 7 + i) if there else none)
            factors.append(y @ y.mT if there else none)
            values.append(gaussian(batch, length, seed=20 + i).square() * 0.1 if there else none)
            if there:
                factors[-1] = (factors[-1] + factors[-1].mT) / 2
                values[-1][0, 0] = 0.0  # which has seen nothing
    counts = [torch.tensor(t) for t in (4.0, 7.0, 0.0)]
    stacks = Stacks([shape] * 3, factors, counts, bases, values=values)
    old = [[t.clone() for t in some] for some in (factors, values)]
    rotated.update_coupled(grads, stacks, [torch.tensor(flag) for flag in (True, False, True)], beta, limited)

    assert [float(t) for t in counts] == [5.0, 7.0, 1.0]
    for i, t in ((0, 4), (2, 0)):
        L, R = (b.double() if b.numel() else torch.eye(s).double() for b, s in zip(bases[2 * i : 2 * i + 2], (m, n)))
        dl, dr = (whitening(v.double(), s, limited) for v, s in zip(old[1][2 * i : 2 * i + 2], (m, n)))
        if t == 0:
            dl, dr = torch.ones(m, dtype=torch.float64), torch.ones(n, dtype=torch.float64)
        g, w = grads[i].double(), (1 - beta) / (1 - beta ** (t + 1))
        S, x, y = L.mT @ g @ R, g @ R * dr[..., None, :], g.mT @ L * dl[..., None, :]
        means = ((S * dr[..., None, :]).square().mean(-1), (S * dl[..., :, None]).square().mean(-2))
        for k, gram, mean in ((2 * i, x @ x.mT / n, means[0]), (2 * i + 1, y @ y.mT / m, means[1])):
            if not factors[k].numel():
                continue
            before, length = old[0][k].double(), factors[k].shape[-1]
            assert off(factors[k], before + w * (gram - before)) < 1e-5
            assert torch.equal(factors[k], factors[k].mT)
            mixed = old[1][k].double() * beta + (1 - beta) * mean
            if limited:
                mixed = torch.where(mixed > 0, mixed.clamp(min=max(10.0, min(length, 4000)) ** -2), mixed)
            wanted = old[1][k].double() if t == 0 else mixed
            torch.testing.assert_close(values[k].double(), wanted, rtol=1e-4, atol=1e-6)
    for now, before in zip((factors, values), old, strict=True):
        assert all(torch.equal(now[k], before[k]) for k in (2, 3))


def whitening(values: Tensor, length: int, limited: bool) -> Tensor:
    """1/sqrt(v), of a side without a factor 1."""
    if not values.numel():
        return torch.ones(length, dtype=torch.float64)
    inverse = torch.where(values > 0, values.rsqrt(), 0.0)
    return inverse.clamp(max=max(10.0, min(length, 4000))) if limited else inverse


def test_coupled_has_the_same_bits_in_any_call_and_on_any_number_of_threads() -> None:
    shape, threads = (3, 160, 130), torch.get_num_threads()
    g, bases = gaussian(*shape), [orthonormal(3, 160, 1), orthonormal(3, 130, 2)]

    def learned(at: slice) -> list[Tensor]:
        factors = [torch.eye(n).repeat(3, 1, 1)[at].clone() for n in shape[1:]]
        values = [gaussian(3, n, seed=n).square()[at].clone() for n in shape[1:]]
        some = [t[at].contiguous() for t in bases]
        stacks = Stacks([(len(factors[0]), *shape[1:])], factors, [torch.tensor(2.0)], some, values=values)
        rotated.update_coupled([g[at].contiguous()], stacks, [torch.tensor(True)], 0.9, False)
        return [*factors, *values]

    try:
        torch.set_num_threads(1)
        whole = learned(slice(None))
        torch.set_num_threads(2)
        assert all(map(torch.equal, learned(slice(None)), whole))
        assert all(torch.equal(one, t[1:2]) for one, t in zip(learned(slice(1, 2)), whole, strict=True))
    finally:
        torch.set_num_threads(threads)


# ---- track ----------------------------------------------------------------------------------------------------------


def drifted(count: int, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """P, and the eigenbasis of something near, its columns in another order."""
    basis = orthonormal(count, n, seed).double()
    values = torch.logspace(0, -2, n, dtype=torch.float64)
    E = gaussian(count, n, n, seed=seed + 1).double()
    near = basis + 2e-3 * basis @ (E - E.mT)
    P = near @ torch.diag(values) @ near.mT
    turned = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return ((P + P.mT) / 2).float().contiguous(), basis[..., turned].float().contiguous()


def iterated(P: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    """The Q of P Q = Q R with R_ii >= 0, columns of the old one sorted by diag(Q^T P Q), and where these were."""
    P, Q = P.double(), Q.double()
    order = (Q.mT @ P @ Q).diagonal(dim1=-2, dim2=-1).argsort(descending=True)
    new, R = torch.linalg.qr(P @ Q.gather(-1, order[..., None, :].expand_as(Q)))
    return new * R.diagonal(dim1=-2, dim2=-1).sign()[..., None, :], order


@pytest.mark.parametrize("shape", [(1, 5, 5), (3, 40, 24), (2, 130, 64)], ids=str)
def test_track_is_a_step_of_orthogonal_iteration_and_sorts_second_moments(shape: tuple[int, int, int]) -> None:
    batch, m, n = shape
    (left, L), (right, R), second = drifted(batch, m, 10), drifted(batch, n, 20), gaussian(*shape, seed=30)
    bases, statuses = [L.clone(), R.clone()], [torch.zeros(batch, dtype=torch.int32) for _ in range(2)]
    sorted_second = second.clone()
    values = [gaussian(batch, m, seed=40), gaussian(batch, n, seed=50)]
    sorted_values = [t.clone() for t in values]
    stacks = Stacks([shape], [left, right], [], bases, statuses, [sorted_second], values=sorted_values)
    assert rotated.track(stacks, [torch.tensor(True)], LIMITS, ACCEPTED, 1) == []
    (new_left, rows), (new_right, columns) = iterated(left, L), iterated(right, R)
    assert off(bases[0], new_left) < 1e-3
    assert off(bases[1], new_right) < 1e-3
    for k in range(batch):
        assert torch.equal(sorted_second[k], second[k][rows[k]][:, columns[k]])
        assert torch.equal(sorted_values[0][k], values[0][k][rows[k]])
        assert torch.equal(sorted_values[1][k], values[1][k][columns[k]])
    assert all((status == ACCEPTED).all() for status in statuses)


def test_track_leaves_what_it_does_not_help_and_what_is_not_flagged() -> None:
    (P, Q), far = drifted(3, 40, 10), orthonormal(1, 40, 7)
    Q[1] = far
    P[2] = 0.0
    for flag in (True, False):
        basis, second, status = Q.clone(), gaussian(3, 40, 6), torch.full((3,), 9, dtype=torch.int32)
        before, none = second.clone(), torch.empty(0)
        stacks = Stacks([(3, 40, 6)], [P, none], [], [basis, none], [status, none.int()], [second])
        stays = rotated.track(stacks, [torch.tensor(flag)], LIMITS, ACCEPTED, 3)
        assert stays == ([(0, 0, 1), (0, 0, 2)] if flag else [])
        assert torch.equal(basis[1:], Q[1:])
        assert torch.equal(second[1:], before[1:])
        assert torch.equal(basis[0], Q[0]) != flag
        assert status.tolist() == [ACCEPTED if flag else 9, 9, 9]


def test_track_takes_as_many_steps_as_it_needs_up_to_so_many() -> None:
    P, Q = drifted(2, 40, 10)
    errors, second = [], gaussian(2, 40, 6)
    basis, rows = Q, torch.arange(40).expand(2, 40)
    for _ in range(3):
        made = eigh.iterate(P, basis)
        basis, rows = made.basis, rows.gather(-1, made.order)
        errors.append(float((made.after / eigh.iterate(P, Q).before).max()))
    assert errors[0] > 1.3 * errors[1] > 1.69 * errors[2]
    for steps in (2, 3):  # the last one does what is asked for
        progress, none = 1.1 * errors[2], torch.empty(0)
        ours, moved, status = Q.clone(), second.clone(), torch.zeros(2, dtype=torch.int32)
        stacks = Stacks([(2, 40, 6)], [P, none], [], [ours, none], [status, none.int()], [moved])
        stays = rotated.track(stacks, [torch.tensor(True)], (0.5, progress, 0.0), ACCEPTED, steps)
        assert stays == ([] if steps == 3 else [(0, 0, 0), (0, 0, 1)])
        assert torch.equal(ours, basis if steps == 3 else Q)
        assert torch.equal(moved, second.gather(1, rows[..., None].expand_as(second)) if steps == 3 else second)


@pytest.mark.parametrize("n", [16, 64])
def test_track_and_tracked_take_the_same_steps(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where P moves by as much as a step follows, some of which are second ones; sides of one stack are two bases."""
    calls: list[int] = []
    iterate = eigh.iterate
    monkeypatch.setattr(eigh, "iterate", lambda P, Q: (calls.append(len(P)), iterate(P, Q))[1])
    P = (gram := gaussian(2, n, 4 * n)) @ gram.mT
    P, Q, none = (P + P.mT) / 2, orthonormal(2, n, 3), torch.empty(0)
    for step in range(16):
        for k in range(10):
            g = gaussian(2, n, n, seed=100 + 10 * step + k)
            P = 0.95 * P + 0.05 * (g @ g.mT)
        P = ((P + P.mT) / 2).contiguous()
        theirs = tracked(P, Q, values=False)
        ours, status = Q.clone(), torch.zeros(2, dtype=torch.int32)
        stacks = Stacks([(2, n, n)], [P, none], [], [ours, none], [status, none.int()], [none])
        stays = {matrix for _, _, matrix in rotated.track(stacks, [torch.tensor(True)], LIMITS, ACCEPTED, TRIES)}
        assert stays == {i for i in range(2) if theirs.status[i] & FELL_BACK}
        for i in {0, 1} - stays:
            assert torch.equal(ours[i], theirs.basis[i])
        Q = theirs.basis
    assert calls.count(2) < len(calls)  # some had to go on


# ---- the ops --------------------------------------------------------------------------------------------------------


def arguments() -> dict[str, tuple[Any, ...]]:
    x, P, Q, none = gaussian(2, 6, 4), *drifted(2, 6, 1), torch.empty(0)
    flag, status = torch.tensor(True), torch.zeros(2, dtype=torch.int32)
    return {
        "rotate": ([x], [Q, none], [none], [none], 0, 0.0, 0.0, False, [flag], [x.clone()]),
        "adam_in_bases": ([x], [x], [Q, none], [x.square()], [none], 0.9, 1e-8, False, [flag], [x.clone()]),
        "update_factors": ([x], [P.clone(), none], [torch.tensor(1.0)], [flag], 0.9),
        "update_coupled_factors": (
            [x],
            [Q, none],
            [P.clone(), none],
            [torch.ones(2, 6), none],
            [torch.tensor(1.0)],
            [flag],
            0.9,
            True,
        ),
        "track_bases": (
            [P, none],
            [Q, none],
            [status, none.int()],
            [x.clone()],
            [torch.ones(2, 6), none],
            [flag],
            [2, 6, 4],
            list(LIMITS),
            ACCEPTED,
            3,
            torch.zeros(4, dtype=torch.int32),
        ),
    }


@pytest.mark.parametrize("op", arguments())
def test_opcheck(op: str) -> None:
    torch.library.opcheck(getattr(torch.ops.steepest, op).default, arguments()[op])


@pytest.mark.parametrize("op", arguments())
def test_tensors_of_other_sizes_and_dtypes_are_refused(op: str) -> None:
    for wrong in (gaussian(2, 5, 3), gaussian(2, 6, 4).double()):
        changed = [[wrong, *each[1:]] if i == 1 else each for i, each in enumerate(arguments()[op])]
        with pytest.raises(RuntimeError, match=r"\[0\] must be a contiguous"):
            getattr(torch.ops.steepest, op)(*changed)


# ---- SOAP -----------------------------------------------------------------------------------------------------------


def trained(
    options: dict[str, Any], method: str = "SOAP", shapes: Sequence[tuple[int, ...]] = ((24, 24), (40, 12), (3, 8, 8))
) -> list[Tensor]:
    """Weights and state after steps of which one gradient is not finite and one is of another kind."""
    if "max_preconditioner_dim" in options:
        shapes = [*shapes, (300, 8)]
    params = [torch.nn.Parameter(0.1 * gaussian(*shape, seed=i)) for i, shape in enumerate(shapes)]
    optimizer = getattr(steepest, method)(params, lr=1e-2, **options)
    for step in range(9):
        for i, p in enumerate(params):
            p.grad = gaussian(*p.shape, seed=100 * step + i)
            if step == 5:  # which no basis is near
                p.grad = 30 * gaussian(*p.shape[:-1], 1, seed=i) * gaussian(*p.shape, seed=7)
        if step == 3:
            assert params[1].grad is not None
            params[1].grad[0, 0] = torch.inf
        optimizer.step()
    state = [t for p in params for key, t in optimizer.state[p].items() if "status" not in key]
    return [p.detach() for p in params] + [t.detach().float() for t in state]


OPTIONS: dict[str, dict[str, Any]] = {
    "every step": {"precondition_frequency": 1},
    "every third": {"precondition_frequency": 3},
    "one side": {"precondition_frequency": 1, "max_preconditioner_dim": 30},
    "the authors'": {"precondition_frequency": 1, "parity": "authors"},
    # Beside the diagonal of its bases the first gradient is rounding, which eps keeps from being divided by itself.
    "Emerging-Optimizers'": {"precondition_frequency": 1, "parity": "emerging-optimizers", "eps": 1e-2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_soap_steps_as_without_the_calls(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with_calls = trained(options)
    monkeypatch.setattr(rotated, "wanted", lambda one: False)
    for ours, other in zip(with_calls, trained(options), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-3, atol=1e-3 * float(other.abs().sum() / max(1, other.numel())))


@pytest.mark.parametrize("method", ["KLSOAP", "KLShampoo"])
@pytest.mark.parametrize("options", [OPTIONS["every step"], OPTIONS["every third"], OPTIONS["one side"]])
def test_coupled_methods_step_as_without_the_calls(
    method: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Sides of full rank after one gradient: in what no gradient has reached every basis is as good, and values differ.
    calls, shapes, learn = [], [(24, 24), (16, 16), (3, 8, 8)], rotated.update_coupled
    monkeypatch.setattr(rotated, "update_coupled", lambda *args: (calls.append(len(args[0])), learn(*args)))
    with_calls = trained(options, method, shapes)
    assert sum(calls) == 9 * (4 if "max_preconditioner_dim" in options else 3)
    monkeypatch.setattr(rotated, "wanted", lambda one: False)
    for ours, other in zip(with_calls, trained(options, method, shapes), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-3, atol=1e-3 * float(other.abs().sum() / max(1, other.numel())))


def test_soap_asks_the_calls_and_solves_exactly_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []
    take = StepsInBases.take

    def counted(*args: Any) -> list[tuple[int, int, int]]:
        stays = take(*args)
        left.append(len(stays))
        return stays

    monkeypatch.setattr(StepsInBases, "take", counted)
    trained({"precondition_frequency": 1})
    assert len(left) == 8  # the first refresh is exact
    assert any(left)
    assert not all(left)
