"""`bench/gpu.sh` as far as it goes without a GPU: its list of commands, which all parse, and what it says of a part."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from steepest import bench, cli

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu.sh"
PARTS = ["build", "machine", "plan", "tests", "polar", "step", "refresh", "train"]


def shell(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", **environment},
    )


def commands(*arguments: str, **environment: str) -> dict[str, tuple[int, list[str]]]:
    """Seconds and words, by part."""
    done = shell(*arguments, "--dry-run", **environment)
    assert done.returncode == 0, done.stderr
    lines = [line.split(": timeout ", 1) for line in done.stdout.splitlines()]
    return {name: (int(rest.split()[0]), shlex.split(rest)[1:]) for name, rest in lines}


@pytest.mark.parametrize("quick", [(), ("--quick",)])
def test_every_command_parses(quick: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "results"
    found = commands(str(results), *quick, PYTHON="some-python")
    assert list(found) == PARTS
    assert not results.exists()
    seen: list[argparse.Namespace] = []
    monkeypatch.setattr(bench, "run", lambda options: seen.append(options) or 0)
    for name in ("plan", "polar", "step", "refresh", "train"):
        _, words = found[name]
        assert words[:3] == ["some-python", "-m", "steepest"]
        assert cli.main(words[3:]) == 0
    assert [options.name for options in seen] == ["polar", "step", "refresh", "train"]
    suites = [suite for options in seen for suite in options.suites]
    assert sorted(suites) == sorted(bench.command.SUITES)
    assert all(options.device == "cuda" and options.out == results for options in seen)
    assert all(options.quick == bool(quick) for options in seen)
    for options in seen:
        assert options.budget == pytest.approx(found[options.name][0] * 3 / 4, abs=2)  # a second may go by
    for options in seen:
        jobs = [j for suite in options.suites for j in bench.command.SUITES[suite](settings_of(options, monkeypatch))]
        assert jobs


def settings_of(options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch) -> bench.command.Settings:
    monkeypatch.setattr(bench.command.torch.cuda, "is_available", lambda: True)
    return bench.command._settings(options)


def test_what_else_is_run_is_there(tmp_path: Path) -> None:
    """pip and pytest know the options, as this Python has them."""
    found = commands(str(tmp_path / "r"))
    _, build = found["build"]
    assert build[:2] == ["env", "STEEPEST_CUDA=1"]
    pip = subprocess.run([sys.executable, "-m", "pip", "install", "--help"], capture_output=True, text=True)
    if pip.returncode == 0:
        assert all(word in pip.stdout for word in build if word.startswith("--") and "disable" not in word)
    _, tests = found["tests"]
    assert tests[1:6] == ["-m", "pytest", "-q", "-m", "gpu"]
    collected = subprocess.run(
        [sys.executable, *tests[1:-2], "--collect-only", str(SCRIPT.parents[1] / "tests" / "test_gpu.py")],
        capture_output=True,
        text=True,
        cwd=SCRIPT.parents[1],
    )
    assert collected.returncode == 0, collected.stdout + collected.stderr


@pytest.mark.parametrize(("arguments", "minutes"), [((), 9), (("--quick",), 3)])
def test_it_ends_in_time(arguments: tuple[str, ...], minutes: int, tmp_path: Path) -> None:
    """No part may take more than is left, and what shares the time does not exceed it together."""
    found = commands(str(tmp_path / "r"), *arguments)
    limit = 60 * minutes
    assert all(seconds + 10 <= limit for seconds, _ in found.values())  # 10 s until it is killed
    left = limit - 10
    for name in ("tests", "polar", "step", "refresh"):
        seconds, _ = commands(str(tmp_path / "r"), *arguments, LIMIT=str(left))[name]
        left -= seconds
    assert left > 0.15 * limit  # for the training run


def test_asked_for_in_any_order(tmp_path: Path) -> None:
    found = commands(str(tmp_path / "r"), "--quick", "--parts", "train", "step", MODELS="tiny small")
    assert list(found) == ["step", "train"]
    _, words = found["step"]
    assert words[words.index("--shapes") + 1 : words.index("--shapes") + 3] == ["tiny", "--quick"]
    _, words = commands(str(tmp_path / "r"), "--parts", "step", MODELS="tiny small")["step"]
    assert words[words.index("--shapes") + 1 : words.index("--shapes") + 3] == ["tiny", "small"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage:"),
        (["a", "b"], "usage:"),
        (["a", "--fast"], "usage:"),
        (["a", "--parts", "dance"], "'dance' is not"),
    ],
)
def test_what_is_not_taken(arguments: list[str], message: str) -> None:
    done = shell(*arguments)
    assert done.returncode == 2
    assert message in done.stderr


def stub(folder: Path, script: str) -> str:
    python = folder / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    return str(python)


def summary(results: Path) -> list[str]:
    lines = (results / "logs" / "summary.txt").read_text().splitlines()
    return [line.rsplit(", ", 1)[0] for line in lines]


def test_a_part_that_fails_leaves_the_others(tmp_path: Path) -> None:
    python, results = stub(tmp_path, 'echo "$@"; case "$*" in *"bench polar"*) exit 3;; esac'), tmp_path / "results"
    done = shell(str(results), "--parts", "plan", "polar", "step", PYTHON=python)
    assert done.returncode == 1
    assert summary(results) == ["plan: ok", "polar: failed with 3", "step: ok"]
    assert "steepest bench step launch memory --whole" in (results / "logs" / "step.log").read_text()


def test_without_time_a_part_is_left_out(tmp_path: Path) -> None:
    results = tmp_path / "results"
    done = shell(str(results), "--parts", "plan", "train", PYTHON=stub(tmp_path, "exit 0"), LIMIT="4")
    assert done.returncode == 1
    assert summary(results) == ["plan: left out: no time", "train: left out: no time"]


def test_a_part_is_stopped_at_its_limit(tmp_path: Path) -> None:
    results = tmp_path / "results"
    python = stub(tmp_path, 'case "$*" in *plan*) exec sleep 60;; esac')
    done = shell(str(results), "--parts", "plan", "train", PYTHON=python, LIMIT="7")
    assert done.returncode == 1
    assert re.fullmatch(r"plan: stopped after [67] s", summary(results)[0])
