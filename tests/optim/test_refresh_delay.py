"""Bases and roots that are used a fixed number of steps after they were begun, whatever happens in between."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import steepest
from steepest.ops import streams
from steepest.parts import Rotated
from steepest.parts.precondition import rotated
from steepest.recipe import CLOCK
from steepest.zoo.kronecker import KroneckerOptimizer
from support.problems import gap, gaussian
from support.slow import slow
from support.training import KRONECKER, all_same_bits, both_kinds, same_states, state_copies, train

every_class = pytest.mark.parametrize("cls", KRONECKER)
Maker = type[KroneckerOptimizer]


@pytest.mark.parametrize("first", ["learn", "identity", "skip"])
@pytest.mark.parametrize(("every", "delay"), [(1, 1), (3, 1), (3, 2), (3, 3)])
def test_a_refresh_is_taken_so_many_steps_later(first: Any, every: int, delay: int) -> None:
    phases = list(map(Rotated(first=first, every=every, delay=delay).phase, range(20)))
    refreshed = [i for i, phase in enumerate(phases) if phase.refreshes]
    assert refreshed == [i for i, phase in enumerate(map(Rotated(first=first, every=every).phase, range(20)))
                         if phase.refreshes]  # fmt: skip
    assert [i for i, phase in enumerate(phases) if phase.at_once] == [0]
    assert [i for i, phase in enumerate(phases) if phase.commits] == [
        i + delay for i in refreshed[1:] if i + delay < 20
    ]


EVERY = 5


@pytest.mark.parametrize("delay", [0, 1, 3, 5])
@pytest.mark.parametrize("parity", [None, "authors"])
def test_one_sided_shampoo_in_bases_of_earlier_steps(parity: str | None, delay: int) -> None:
    """The published rule with roots (parity) or bases of the factor as it was `delay` steps before."""
    w, lr, b1, b2, eps = gaussian(4, 6, seed=9), 0.02, 0.9, 0.95, 1e-8
    p, m, factor = torch.nn.Parameter(w.clone()), torch.zeros_like(w), w.new_zeros(4, 4)
    optimizer = steepest.OneSidedShampoo(
        [p], lr=lr, betas=(b1, b2), precondition_frequency=EVERY, refresh="eigh", parity=parity, refresh_delay=delay
    )
    corrected: list[Tensor] = []
    basis = factor
    for t in range(1, 31):
        p.grad = g = gaussian(4, 6, seed=t)
        factor = b2 * factor + (1 - b2) * g @ g.mT
        corrected.append(factor / (1 - b2**t))
        seen = 1 if t == 1 else t - delay
        if seen == 1 or (seen > 1 and seen % EVERY == 0):
            basis = torch.linalg.eigh(corrected[seen - 1]).eigenvectors
            values = (basis.mT @ corrected[seen - 1] @ basis).diagonal()
        if parity is None:
            values = (basis.mT @ corrected[-1] @ basis).diagonal()
        root = basis @ (1 / (values.sqrt() + eps)).diag() @ basis.mT
        m = b1 * m + (1 - b1) * g
        w = w - lr * root @ m / (1 - b1**t)
        optimizer.step()
        assert gap(p.detach(), w) < 1e-9, t


def test_splus_in_bases_of_earlier_steps() -> None:
    """Bases that are made after step t are used from step t + delay + 1 on."""
    w, lr, beta, delay = gaussian(6, 4, seed=9), 0.1, 0.9, 2
    p, m = torch.nn.Parameter(w.clone()), torch.zeros_like(w)
    optimizer = steepest.SPlus(
        [p], lr=lr, weight_decay=0.0, betas=(0.9, beta), precondition_frequency=EVERY, refresh_delay=delay
    )
    factors = [torch.zeros(n, n, dtype=torch.float64) for n in (6, 4)]
    bases = [torch.eye(n, dtype=torch.float64) for n in (6, 4)]
    pending = bases
    for t in range(1, 31):
        p.grad = g = gaussian(6, 4, seed=t)
        m = 0.9 * m + 0.1 * g
        w = w - lr * 2 / 10 * bases[0] @ (bases[0].mT @ m @ bases[1]).sign() @ bases[1].mT
        optimizer.step()
        assert gap(p.detach(), w) < 1e-9, t
        factors = [beta * f + (1 - beta) * x for f, x in zip(factors, (g @ g.mT, g.mT @ g))]
        if t == 1:
            # Of equal eigenvalues (a null space) any basis is one: the library's, after a look at it.
            bases = pending = [optimizer.state[p][key][0].clone() for key in rotated.BASES]
            assert all(gap(q @ q.mT, torch.eye(len(q))) < 1e-12 for q in bases)
        if t > delay and (t - delay) % EVERY == 0:
            bases = pending
        if t % EVERY == 0:
            pending = [torch.linalg.eigh(factor).eigenvectors for factor in factors]


DELAYED: dict[str, tuple[Maker, dict[str, Any]]] = {
    **{cls.__name__: (cls, {}) for cls in KRONECKER},
    "soap, authors": (steepest.SOAP, {"parity": "authors"}),
    "shampoo, authors": (steepest.Shampoo, {"parity": "authors"}),
    "shampoo, newton roots": (steepest.Shampoo, {"inverse_root": "newton"}),
}
#: What waits: roots, bases with values, bases with moments, iterated roots.
QUICK = ("Shampoo", "KLShampoo", "SOAP", "shampoo, newton roots")
every_delayed = pytest.mark.parametrize("name", [name if name in QUICK else slow(name) for name in DELAYED])


@every_delayed
def test_a_checkpoint_between_a_refresh_and_its_use(name: str) -> None:
    """Resumed at any step, everything that follows is the same to the bit."""
    cls, options = DELAYED[name]
    options = {**options, "precondition_frequency": 3, "refresh_delay": 2}
    whole, params = both_kinds(cls, **options)
    saved = []
    for step in range(9):
        train(whole, params, range(step, step + 1))
        saved.append((copy.deepcopy(whole.state_dict()), [p.detach().clone() for p in params]))
    for step, (state, weights) in list(enumerate(saved))[2:5]:  # from one refresh to the next
        other, copies = both_kinds(cls, **options)
        with torch.no_grad():
            for p, w in zip(copies, weights):
                p.copy_(w)
        other.load_state_dict(state)
        train(other, copies, range(step + 1, 9))
        assert all_same_bits(copies, params)
        assert same_states(state_copies(other), state_copies(whole))


@every_delayed
def test_a_delay_changes_the_path_and_it_still_descends(name: str) -> None:
    """A quadratic; bases of some steps ago are as good as those of a longer frequency."""
    cls, options = DELAYED[name]
    lengths = []
    for delay in (0, 2):
        p = torch.nn.Parameter(gaussian(8, 6))
        optimizer = cls([p], lr=0.05, weight_decay=0.0, precondition_frequency=4, refresh_delay=delay, **options)
        scale = torch.logspace(0, -1, 8, dtype=torch.float64)[:, None]
        for step in range(60):
            p.grad = scale * p.detach() + 0.01 * gaussian(8, 6, seed=step)
            optimizer.step()
        lengths.append(float((scale.sqrt() * p.detach()).norm()))
    assert lengths[0] != lengths[1]
    assert lengths[1] < 0.9 * float((scale.sqrt() * gaussian(8, 6)).norm())
    assert lengths[1] < 1.2 * lengths[0]


@every_delayed
@pytest.mark.parametrize("at", [3, 4, 5])
def test_a_gradient_that_is_not_finite_while_a_refresh_is_pending(name: str, at: int) -> None:
    """It leaves everything as it was; nothing that was taken once is taken again."""
    cls, options = DELAYED[name]
    p = torch.nn.Parameter(gaussian(8, 6))
    optimizer = cls([p], precondition_frequency=4, refresh_delay=2, **options)
    part = optimizer.recipe(optimizer.param_groups[0]).precondition
    lengths = []
    for step in range(20):
        before = p.detach().clone()
        p.grad = gaussian(8, 6, seed=step)
        if step == at:
            p.grad[1, 1] = float("inf")
            kept = {key: t.clone() for key, t in optimizer.state[p].items()}
        optimizer.step()
        if step == at:
            assert torch.equal(p, before)
            assert all(torch.equal(optimizer.state[p][k], t + 1 if k == CLOCK else t) for k, t in kept.items())
        if part.phase(step).commits and step != at:
            again = part.commit(dict(optimizer.state[p]))
            assert all(torch.equal(t, optimizer.state[p][key]) for key, t in again.items())
        lengths.append(float((p.detach() - before).norm()))
    assert max(lengths[at:]) < 4 * max(lengths[:at])


@every_delayed
def test_a_delay_that_is_set_in_the_middle_of_a_run(name: str) -> None:
    """What was never begun is not taken: the next steps are those without a delay."""
    cls, options = DELAYED[name]
    paths = []
    for later in (False, True):
        p = torch.nn.Parameter(gaussian(8, 6))
        optimizer = cls([p], precondition_frequency=5, **options)
        for step in range(9):
            if later and step == 6:
                optimizer.param_groups[0]["refresh_delay"] = 3
            p.grad = gaussian(8, 6, seed=step)
            optimizer.step()
        paths.append(p.detach())
    assert torch.equal(*paths)


class Late:
    """A second stream that does nothing of its work until it is waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pending: list[list[tuple[Tensor, Tensor]]] = []
        self.begun = 0
        monkeypatch.setattr(streams, "beside", self.beside)
        monkeypatch.setattr(streams, "join", self.join)

    @contextmanager
    def beside(self, device: torch.device, tensors: Iterable[Tensor]) -> Iterator[None]:
        touched = list(tensors)
        before = [t.clone() for t in touched]
        yield
        self.begun += 1
        self.pending.append([(t, t.clone()) for t, old in zip(touched, before) if not torch.equal(t, old)])
        for t, old in zip(touched, before):
            t.copy_(old)

    def join(self, tensors: Iterable[Tensor] | None = None) -> None:
        """Only the work that has written one of these."""
        wanted = None if tensors is None else {id(t) for t in tensors}
        kept = []
        for work in self.pending:
            if wanted is None or wanted & {id(t) for t, _ in work}:
                for t, new in work:
                    t.copy_(new)
            else:
                kept.append(work)
        self.pending = kept


@pytest.mark.parametrize("delay", [3, slow(1)])
@every_delayed
def test_nothing_looks_at_what_is_still_being_made(name: str, delay: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However late the second stream is: the same path, and a checkpoint that waits for it."""
    cls, options = DELAYED[name]
    options = {**options, "precondition_frequency": 3, "refresh_delay": delay}
    known, params = both_kinds(cls, **options)
    train(known, params, range(11))
    late = Late(monkeypatch)
    slow, others = both_kinds(cls, **options)
    train(slow, others, range(11))
    assert late.begun == 3
    assert bool(late.pending) == ((10 if slow_start(cls) else 11) % 3 < delay)
    assert all_same_bits(others, params)
    assert slow.state_dict()["state"].keys() == known.state_dict()["state"].keys()
    assert not late.pending
    assert same_states(state_copies(slow), state_copies(known))


def test_a_group_does_not_wait_for_the_work_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """One group takes and begins anew at a step before the other one takes."""
    late = Late(monkeypatch)
    params = [torch.nn.Parameter(gaussian(6, 5, seed=i)) for i in range(2)]
    groups = [{"params": [p], "lr": 0.1 * (i + 1)} for i, p in enumerate(params)]
    optimizer = steepest.SPlus(groups, precondition_frequency=1, refresh_delay=1)
    for step in range(6):
        for i, p in enumerate(params):
            p.grad = gaussian(6, 5, seed=10 * step + i)
        optimizer.step()
        assert len(late.pending) == (2 if step else 0)


def slow_start(cls: Maker) -> bool:
    """Whether the first step is not counted."""
    return cls in (steepest.SOAP, steepest.KLSOAP, steepest.KLShampoo)


@every_class
def test_whole_matrices_of_experts_wait_each_for_its_own_clock(cls: Maker) -> None:
    """A parameter that misses a step takes its bases one step later, and alone it is the same."""
    paths = []
    for together in (True, False):
        params = [torch.nn.Parameter(gaussian(5, 5, seed=i)) for i in range(2)]
        optimizer = cls(params if together else params[:1], precondition_frequency=3, refresh_delay=2)
        for step in range(14):
            params[1].grad = gaussian(5, 5, seed=100 + step)
            params[0].grad = None if step in (4, 7) else gaussian(5, 5, seed=200 + step)
            optimizer.step()
        paths.append(params[0].detach())
    assert gap(*paths) < 1e-12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refresh_delay": -1}, "refresh_delay should be a whole number of at least 0 but is: -1"),
        ({"refresh_delay": 1.5}, "refresh_delay should be a whole number of at least 0 but is: 1.5"),
        ({"refresh_delay": 11}, "refresh_delay should be at most precondition_frequency, 10, but is: 11"),
    ],
)
def test_delays_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        steepest.SOAP([torch.nn.Parameter(gaussian(4, 3))], **options)
    with pytest.raises(ValueError, match="delay should be "):
        Rotated(every=10, delay=options["refresh_delay"])


# ---- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("delay", [0, 2])
@pytest.mark.parametrize("cls", [steepest.SOAP, steepest.KLShampoo, partial(steepest.Shampoo, inverse_root="newton")])
def test_on_a_gpu_runs_agree_to_the_bit_and_resume(cls: Any, delay: int) -> None:
    options = {"precondition_frequency": 3, "refresh_delay": delay, "exact_refreshes": 1}
    results = []
    for resumed in (False, False, True):
        params = [torch.nn.Parameter(gaussian(96, 64, seed=i).float().cuda()) for i in range(3)]
        optimizer = cls(params, **options)
        for step in range(12):
            if resumed and step == 4:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = cls(params, **options)
                optimizer.load_state_dict(state)
            for i, p in enumerate(params):
                p.grad = gaussian(96, 64, seed=100 * step + i).float().cuda()
            optimizer.step()
        results.append([p.detach().cpu() for p in params])
    assert all_same_bits(results[0], results[1])
    assert all_same_bits(results[0], results[2])
