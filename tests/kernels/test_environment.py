"""Switches of the environment: what they take, and what importing steepest says of anything else."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from steepest.ops import backend
from steepest.ops.environment import switch

SWITCHES = {"STEEPEST_BATCH_INVARIANT": False, "STEEPEST_HOPPER": True, "STEEPEST_SELFCHECK": True}


@pytest.mark.parametrize("default", [False, True])
@pytest.mark.parametrize("value,wanted", [(None, None), ("", None), ("0", False), ("1", True)])
def test_a_switch(default: bool, value: str | None, wanted: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SWITCH", raising=False)
    if value is not None:
        monkeypatch.setenv("SWITCH", value)
    assert switch("SWITCH", default) is (default if wanted is None else wanted)


def test_an_empty_backend_is_none_that_is_forced() -> None:
    """A variable that a launcher passes on empty counts as unset, as every switch does."""
    code = "import steepest.ops.backend as b; print(b.requested('auto'))"
    environment = {**os.environ, "STEEPEST_BACKEND": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "auto", done.stderr


def test_a_backend_that_the_environment_forces_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """An argument backend='auto' would be no way out."""
    cpu, reasons = torch.device("cpu"), {"cuda": "the tensors are on cpu"}
    with pytest.raises(RuntimeError, match="on cpu. backend='auto' takes one that can"):
        backend.choose("step", "cuda", reasons, cpu, "elementwise")
    monkeypatch.setattr(backend, "forced", "cuda")
    with pytest.raises(RuntimeError, match="on cpu. STEEPEST_BACKEND forces it; unset it to take one that can"):
        backend.choose("step", "auto", reasons, cpu, "elementwise")


@pytest.mark.slow
@pytest.mark.parametrize("name", SWITCHES)
def test_another_value_is_an_error(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import steepest"], env={**os.environ, name: "off"}, capture_output=True, text=True
    )
    default = "01"[SWITCHES[name]]
    assert done.returncode == 1
    assert f"ValueError: {name}='off' is neither '0' (off) nor '1' (on); unset it for '{default}'" in done.stderr
