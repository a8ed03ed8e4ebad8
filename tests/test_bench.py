"""The benchmarks run, on shapes small enough for a test, and write what they measured."""

from __future__ import annotations

import csv
import importlib
import sys
from pathlib import Path

import pytest
import torch

import steepest

BENCH = Path(__file__).parents[1] / "bench"


def run(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: str) -> None:
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])
    importlib.import_module(script).main(list(arguments))


def test_a_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "step.csv"
    run(
        monkeypatch,
        "bench_step",
        "--shapes",
        "tiny",
        "--rounds",
        "1",
        "--whole",
        "--against",
        "torch",
        "--csv",
        str(table),
    )
    rows = list(csv.DictReader(table.open()))
    assert {row["optimizer"] for row in rows} >= {"torch.optim.Muon", "Muon auto", "MuAdam auto"}
    assert all(0 < float(row["relative_error"]) < 1 and float(row["ms"]) > 0 and row["commit"] for row in rows)
    assert "Muon turbo" in capsys.readouterr().out


def test_an_operation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = tmp_path / "polar.csv"
    run(monkeypatch, "bench_ops", "polar", "--shapes", "2x32x64", "--quick", "--csv", str(table))
    rows = list(csv.DictReader(table.open()))
    assert {row["preset"] for row in rows} >= {"torch", "auto", "turbo"}
    assert all(float(row["gflops"]) > 0 and float(row["relative_error"]) < 1 for row in rows)


def test_unknown_shapes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="'gpt9' are not known; choose one of tiny, small, gpt2-124m"):
        run(monkeypatch, "bench_step", "--shapes", "gpt9")


def test_the_fused_ops(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = tmp_path / "fused.csv"
    run(monkeypatch, "bench_fused", "--elements", "1e4", "--model", "tiny", "--rounds", "2", "--csv", str(table))
    rows = list(csv.DictReader(table.open()))
    ops = {row["what"] for row in rows if row["of_copy"]}
    assert ops == {"copy", "inspect Muon", "before Muon", "after Muon", "before MuAdam", "after MuAdam", "before AdamW"}
    assert {row["what"] for row in rows if row["model"] == "tiny"} == {"torch fused AdamW", "AdamW"}
    assert all(float(row["gb_per_s"]) > 0 for row in rows if row["of_copy"])


def test_host_time_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is a GPU; here its answers are given."""
    monkeypatch.syspath_prepend(str(BENCH))
    bench_fused = importlib.import_module("bench_fused")
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**20)
    monkeypatch.setattr(steepest, "graphed", lambda optimizer: optimizer)
    rows = bench_fused.host("tiny", "cpu", 2)
    assert [(row["what"], row["launches"], row["extra_mib"]) for row in rows] == [
        ("step", 0, 1),
        ("captured step", 0, 1),
    ]
    assert all(row["host_us"] > 0 for row in rows)
