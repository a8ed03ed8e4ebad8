"""Optimizers as configuration files have them: names, and values that were read as words."""

from __future__ import annotations

from typing import Any

import pytest

import steepest
from steepest.integrations.configuration import named, pairs, values


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
