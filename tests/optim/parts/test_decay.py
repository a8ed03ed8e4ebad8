"""Decoupled decay, plain and cautious."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from steepest.parts import Decay
from support.problems import FEW, gap, gaussian


@FEW
@given(decay=st.sampled_from([0.0, 0.01, 0.5]), step=st.sampled_from([0.0, 0.1, 2.0]), seed=st.integers(0, 99))
def test_both_kinds_entry_by_entry(decay: float, step: float, seed: int) -> None:
    w, u = gaussian(4, 5, seed=seed), gaussian(4, 5, seed=seed + 1)
    plain, cautious = Decay().apply(w, u, decay, step), Decay(cautious=True).apply(w, u, decay, step)
    for i in range(4):
        for j in range(5):
            a, b = w[i, j].item(), u[i, j].item()
            agrees = (a > 0) == (b > 0)
            assert abs(plain[i, j].item() - (a - decay * a - step * b)) < 1e-14
            assert abs(cautious[i, j].item() - (a - (decay * a if agrees else 0.0) - step * b)) < 1e-14


def test_where_the_update_is_zero_cautious_decay_is_plain_decay() -> None:
    w, u = gaussian(3, 3), torch.zeros(3, 3, dtype=torch.float64)
    assert gap(Decay(cautious=True).apply(w, u, 0.1, 1.0), 0.9 * w) < 1e-15


def test_without_decay_both_kinds_are_one() -> None:
    w, u = gaussian(3, 3, seed=1), gaussian(3, 3, seed=2)
    assert torch.equal(Decay().apply(w, u, 0.0, 0.1), Decay(cautious=True).apply(w, u, 0.0, 0.1))


def test_lengths_may_be_tensors_and_inputs_are_untouched() -> None:
    w, u = gaussian(3, 3, seed=1), gaussian(3, 3, seed=2)
    kept = w.clone(), u.clone()
    lengths = torch.tensor(0.1, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    for decay in (Decay(), Decay(cautious=True)):
        assert gap(decay.apply(w, u, *lengths), decay.apply(w, u, 0.1, 0.3)) < 1e-15
    assert torch.equal(w, kept[0])
    assert torch.equal(u, kept[1])
