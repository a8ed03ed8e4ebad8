"""Optimizers as configuration files have them: names, and values that were read as words."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

import steepest
from steepest.integrations.configuration import check_class, named, pairs, values


def test_names() -> None:
    assert named("MuAdam") is named("muadam") is steepest.MuAdam
    with pytest.raises(ValueError, match="no optimizer is called 'MuAdm': did you mean Adam, MuAdam, MuonAdam?"):
        named("MuAdm")
    assert named("KFAC") is steepest.KFAC
    with pytest.raises(ValueError, match="no optimizer is called 'Momo'"):  # a part of one
        named("Momo")
    with pytest.raises(ValueError, match="no optimizer is called 'xyz': there are Ada"):
        named("xyz")


@pytest.mark.parametrize(
    ("cls", "error"),
    [
        ("MuAdam", "'MuAdam' is a name: pass the class, as in steepest.MuAdam"),
        (torch.optim.AdamW, "AdamW is no optimizer of this package: pass one that is, as steepest.MuAdam"),
        (
            steepest.Muon(torch.nn.Linear(2, 2)),
            "this Muon is made already: pass its class, as steepest.MuAdam, and arguments",
        ),
        (None, "None makes no optimizer: pass a class"),
    ],
    ids=["name", "torchs", "made", "none"],
)
def test_what_makes_no_optimizer(cls: Any, error: str) -> None:
    with pytest.raises(TypeError, match=error):
        check_class(cls)
    check_class(steepest.MuAdam)
    check_class(partial(steepest.Muon, momentum=0.9))


@pytest.mark.parametrize(
    ("read", "wanted"),
    [
        ("2e-3", 2e-3),
        ("0.9", 0.9),
        ("10", 10),
        (0.9, 0.9),
        ("True", True),
        ("false", False),
        (True, True),
        ("None", None),
        ("none", "none"),
        ("match_rms_adamw", "match_rms_adamw"),
        ([0.9, "0.95"], (0.9, 0.95)),
    ],
)
def test_values(read: Any, wanted: Any) -> None:
    found = values({"key": read})["key"]
    assert found == wanted
    assert type(found) is type(wanted)


def test_pairs() -> None:
    assert pairs("lr=0.02, nesterov=False,polar=auto,") == {"lr": 0.02, "nesterov": False, "polar": "auto"}
    assert pairs("") == {}
    for text in ("lr", "lr=", "=1", "a b=1"):
        with pytest.raises(ValueError, match="is no argument of an optimizer: write name=value, as in momentum=0.9,lr"):
            pairs(text)
