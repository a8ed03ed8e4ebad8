"""The benchmarks run, on shapes small enough for a test, and write what they measured."""

from __future__ import annotations

import contextlib
import csv
import importlib
import math
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import steepest
from assertions import polar_error
from cases import gaussian
from steepest import planner
from steepest.linalg.polar import polar
from steepest.ops import backend

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


TIMES = {  # medians and spreads in seconds
    "torch.bmm": types.SimpleNamespace(median=4.0, spread=0.1),
    "symm_gemm": types.SimpleNamespace(median=2.0, spread=0.1),
    "chain of 10": types.SimpleNamespace(median=12.0, spread=0.1),
    "chain of 2": types.SimpleNamespace(median=4.0, spread=0.1),
}
POLAR = ("--shapes", "2x32x64", "64x32", "--products", "2x64x64", "--small", "3x16x24", "24x16", "--rounds", "3")


def polar_table(monkeypatch: pytest.MonkeyPatch, path: Path, *arguments: str) -> list[dict[str, str]]:
    run(monkeypatch, "bench_polar", *POLAR, "--no-compiled", "--seconds", "0", "--csv", str(path), *arguments)
    return list(csv.DictReader(path.open()))


def bench_module(monkeypatch: pytest.MonkeyPatch, name: str) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module(name)


def test_the_polar_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = polar_table(monkeypatch, tmp_path / "polar.csv")
    peers = [row for row in rows if row["part"] == "peer"]
    assert {row["variant"] for row in peers} == {"gram-newton-schulz", "dion", "emerging-optimizers"}
    assert all(row["status"] == "found" or row["status"].startswith("absent: ") for row in peers)
    timed = [row for row in rows if row["part"] != "peer" and row["variant"] not in {row["variant"] for row in peers}]
    assert {row["shape"] for row in timed} == {"2x32x64", "1x64x32", "2x64x64", "3x16x24+1x24x16"}
    assert {row["variant"] for row in timed if row["part"] == "polar"} == {
        *("torch.optim.Muon", "torch.bmm", "polar auto", "polar exact", "polar turbo", "polar jordan")
    }
    assert {row["variant"] for row in timed if row["part"] == "small"} == {
        *("torch.optim.Muon", "polar auto, stack by stack", "polar auto, one call")
    }
    for row in timed:
        assert row["status"] == "ok"
        assert row["rounds"] == "3"
        assert row["commit"]
        assert float(row["ms"]) > 0
        assert float(row["spread_ms"]) >= 0
        assert float(row["ratio"]) > 0
        if row["part"] != "products" and row["variant"] != "torch.bmm":
            assert 0 < float(row["off_diagonal"]) < 0.05
            assert 0 < float(row["relative_error"]) < 0.4
    assert "gram-newton-schulz" in capsys.readouterr().out


def test_what_is_wrong_or_fails_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One tile of one matrix left out, and a variant that raises: rows without a time, and an exit status."""

    def damaged(x: torch.Tensor, preset: str = "auto", **options: Any) -> torch.Tensor:
        if preset == "exact":
            raise RuntimeError("no room")
        y = polar(x, preset, **options)
        if preset == "turbo":
            y[-1, :8, :8] = 0
        return y

    monkeypatch.setattr(bench_module(monkeypatch, "bench_polar"), "polar", damaged)
    with pytest.raises(SystemExit, match=r"2x32x64 float32 polar exact: failed: RuntimeError: no room"):
        polar_table(monkeypatch, tmp_path / "polar.csv", "--parts", "polar")
    rows = list(csv.DictReader((tmp_path / "polar.csv").open()))
    found = {(row["shape"], row["variant"]): row for row in rows}
    assert found["2x32x64", "polar turbo"]["status"] == "WRONG"
    assert found["2x32x64", "polar turbo"]["ms"] == found["1x64x32", "polar exact"]["ms"] == ""
    assert float(found["2x32x64", "polar turbo"]["relative_error"]) > 0
    assert found["1x64x32", "polar auto"]["status"] == "ok"


def test_a_peer_that_leaves_no_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its row has its error and no time; the others are timed without it. A peer that fails is no exit status."""
    bench_polar, peers = bench_module(monkeypatch, "bench_polar"), bench_module(monkeypatch, "peers")
    monkeypatch.setattr(peers, "BUILDS", {"greedy": lambda: lambda x: polar(x)})
    timed = bench_polar.interleaved

    def interleaved(functions: dict[str, Any], **options: Any) -> Any:
        if "greedy" in functions:
            raise torch.OutOfMemoryError("all gone")
        return timed(functions, **options)

    monkeypatch.setattr(bench_polar, "interleaved", interleaved)
    rows = polar_table(monkeypatch, tmp_path / "polar.csv", "--parts", "polar", "--shapes", "32x64")
    found = {row["variant"]: row for row in rows if row["part"] == "polar"}
    assert found["greedy"]["status"] == "failed: no memory beside the others"
    assert float(found["greedy"]["relative_error"]) > 0
    assert float(found["polar auto"]["ms"]) > 0


def test_a_shape_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bench_polar = bench_module(monkeypatch, "bench_polar")

    def products(x: torch.Tensor) -> None:
        raise torch.OutOfMemoryError(f"{x.shape[0]} matrices")

    monkeypatch.setattr(bench_polar, "products", products)
    with pytest.raises(SystemExit, match=r"2x64x64 float32 : failed: OutOfMemoryError: 2 matrices"):
        polar_table(monkeypatch, tmp_path / "polar.csv", "--parts", "products", "small")
    rows = list(csv.DictReader((tmp_path / "polar.csv").open()))
    assert {row["status"] for row in rows if row["part"] == "small"} == {"ok"}


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)], ids=str)
def test_errors_are_those_of_the_singular_value_decomposition(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = bench_module(monkeypatch, "truth")
    x = gaussian(*shape)
    y = polar(x, "turbo") + 1e-3 * gaussian(*shape, seed=1)
    found, wanted = truth.Truth(x).error(y), polar_error(x, y)
    assert found.relative == pytest.approx(wanted.relative, rel=1e-6)
    assert found.off_diagonal == pytest.approx(wanted.off_diagonal, rel=1e-6)


def test_the_worse_of_two_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    truth = bench_module(monkeypatch, "truth")
    assert truth.Error(1.0, 2.0).worse(truth.Error(2.0, 1.0)) == truth.Error(2.0, 2.0)
    for a, b in ((1.0, math.nan), (math.nan, 1.0)):
        assert math.isnan(truth.Error(a, 0.0).worse(truth.Error(b, 0.0)).relative)


@pytest.mark.skipif(backend.extension is None, reason=f"{backend.extension_reason}")
@pytest.mark.parametrize("length", [2, 10])
def test_the_chain_of_products(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """(X X^T)^2 X, whatever the number of products."""
    bench_polar = bench_module(monkeypatch, "bench_polar")
    x = torch.stack([gaussian(16, 16, seed) for seed in range(2)]).half() / 4
    (y,) = bench_polar.run_chain(x, torch.empty_like(x), length)
    exact = torch.linalg.matrix_power(x.double() @ x.double().mT, 2) @ x.double()
    assert (y.double() - exact).norm() < 2e-3 * exact.norm()


class Event:
    """Of a GPU that is not there."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None: ...
    def synchronize(self) -> None: ...

    def elapsed_time(self, other: Event) -> float:
        return 2.0


def test_a_call_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is written over before the call; the events' milliseconds are seconds; the driver is named."""
    timing = bench_module(monkeypatch, "timing")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    cold, seen = torch.ones(4), []
    assert timing.seconds(lambda: seen.append(cold.sum().item()), "cuda", cold) == 2e-3
    assert seen == [0.0]
    monkeypatch.setattr(subprocess, "check_output", lambda command, **_: "580.1\n" if "nvidia-smi" in command else "")
    monkeypatch.setenv("STEEPEST_COMMIT", "abc")
    facts = timing.machine("cuda")
    assert (facts["machine"], facts["driver"], facts["commit"]) == ("a GPU", "580.1", "abc")
    assert "driver" not in timing.machine("cpu")


def test_a_captured_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made once on a side stream, once while it is captured, and after that only replayed."""
    bench_polar = bench_module(monkeypatch, "bench_polar")
    log: list[str] = []
    stream = types.SimpleNamespace(wait_stream=lambda other: log.append("wait"))
    graph = types.SimpleNamespace(replay=lambda: log.append("replay"))
    for name, value in {"Stream": lambda: stream, "current_stream": lambda: stream, "CUDAGraph": lambda: graph}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda _: contextlib.nullcontext())
    captured = bench_polar.Captured(lambda: log.append("call") or [torch.ones(1)])
    assert len(captured()) == len(captured()) == 1
    assert log == ["wait", "call", "wait", "call", "replay", "replay"]
    variants = {"a": bench_polar.Variant(list), "b": bench_polar.Variant(list, 1.0)}
    here = types.SimpleNamespace(is_cuda=True, numel=lambda: 8)
    assert set(bench_polar.with_captured(variants, ("b",), [here])) == {"a", "b", "b, captured"}
    assert bench_polar.with_captured(variants, ("b",), [torch.ones(1)]) == variants


@pytest.mark.skipif(backend.extension is None, reason=f"{backend.extension_reason}")
def test_products_in_one_call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two chains are timed, and what one product more takes is the difference."""
    bench_polar = bench_module(monkeypatch, "bench_polar")
    monkeypatch.setattr(bench_polar.polar_chain, "takes", lambda x, constants: True)
    monkeypatch.setattr(bench_polar, "interleaved", lambda runs, **_: {name: TIMES[name] for name in runs})
    rows = polar_table(
        monkeypatch, tmp_path / "polar.csv", "--parts", "products", "--dtypes", "float16", "--products", "2x16x16"
    )
    found = {row["variant"]: row for row in rows if row["part"] == "products"}
    assert {row["status"] for row in found.values()} == {"ok"}
    assert float(found["one of a chain"]["ms"]) == 1000
    assert float(found["one of a chain"]["ratio"]) == 4
    assert float(found["one of a chain"]["of_bmm"]) == 2
    assert float(found["symm_gemm"]["of_bmm"]) == 1


def test_work_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    bench_polar = bench_module(monkeypatch, "bench_polar")
    device = types.SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    stack = types.SimpleNamespace(is_cuda=True, shape=(3, 512, 2048), dtype=torch.float16, device=None)
    asked = planner.plan([planner.Stack(3, 512, 2048)], "auto").totals()["asked_flop"]
    assert asked <= bench_polar.flop([stack], "auto") < 2 * asked
    assert bench_polar.flop([torch.ones(1, 2, 2)], "auto") is None


def shell(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(BENCH / "gpu.sh"), *arguments],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", **environment},
    )


def test_the_run_on_a_gpu_as_a_list_of_commands(tmp_path: Path) -> None:
    results = tmp_path / "results"
    done = shell(str(results), "--dry-run", PYTHON="some-python", MODELS="tiny small")
    assert done.returncode == 0, done.stderr
    commands = dict(line.split(": timeout ", 1) for line in done.stdout.splitlines())
    assert list(commands) == ["build", "machine", "plan", "tests", "fused", "step", "polar", "refresh"]
    assert "some-python -m pip" in commands["build"]
    assert "--no-index --no-deps --no-build-isolation" in commands["build"]
    assert "some-python -m pytest -q -m gpu" in commands["tests"]
    assert "bench/bench_step.py --device cuda --whole --shapes tiny small --csv" in commands["step"]
    for name in ("fused", "step", "polar", "refresh"):
        assert f"--csv {results}/{name}-gpu.csv" in commands[name]
    assert not results.exists()
    quick = shell(str(results), "--dry-run", "--quick", "--parts", "polar", "step", MODELS="tiny small")
    lines = quick.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["step", "polar"]
    assert "--shapes tiny --rounds 3" in lines[0]
    assert "--quick" in lines[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage:"),
        (["a", "b"], "usage:"),
        (["a", "--fast"], "usage:"),
        (["a", "--parts", "dance"], "'dance' is not"),
    ],
)
def test_what_the_run_on_a_gpu_does_not_take(arguments: list[str], message: str) -> None:
    done = shell(*arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_part_that_fails_leaves_the_others(tmp_path: Path) -> None:
    python, results = tmp_path / "python", tmp_path / "results"
    python.write_text('#!/bin/sh\necho "$@"\ncase "$*" in *bench_fused*) exit 3;; esac\n')
    python.chmod(0o755)
    done = shell(str(results), "--parts", "plan", "fused", "step", PYTHON=str(python))
    assert done.returncode == 1
    lines = (results / "logs" / "summary.txt").read_text().splitlines()
    assert [line.rsplit(", ", 1)[0] for line in lines] == ["plan: ok", "fused: failed with 3", "step: ok"]
    assert "bench/bench_step.py --device cuda" in (results / "logs" / "step.log").read_text()


def test_refreshes_and_roots(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What would take too long is skipped, and one of ours that is wrong is not timed."""
    table = tmp_path / "refresh.csv"
    run(monkeypatch, "bench_refresh", "--quick", "--shapes", "2x16", "--seconds", "0", "--csv", str(table))
    rows = list(csv.DictReader(table.open()))
    assert {row["status"] for row in rows} == {"ok"}
    found = {(row["part"], row["variant"]): row for row in rows}
    assert {part for part, _ in found} == {"products", "averages", "refresh", "roots p=2", "roots p=4"}
    assert all(float(row["ms"]) > 0 for row in rows if row["variant"] != "no refresh")
    whitening = {variant: float(row["whitening"]) for (part, variant), row in found.items() if part == "refresh"}
    assert whitening["jr"] < whitening["torch sorted QR"] < whitening["no refresh"]
    assert 0 < float(found["roots p=4", "inverse_root"]["residual"]) < 1e-3
    assert found["refresh", "jr"]["base"] == "torch sorted QR"
    refresh = importlib.import_module("bench_refresh")
    refreshed = refresh.eigh_refresh
    damaged = types.SimpleNamespace(basis=torch.ones(2, 16, 16))
    monkeypatch.setattr(
        refresh,
        "eigh_refresh",
        lambda *a, method, **k: damaged if method == "jr" else refreshed(*a, method=method, **k),
    )
    with pytest.raises(SystemExit, match="wrong or failed:\n  refresh 2x16 jr: WRONG$"):
        refresh.main(["--quick", "--shapes", "2x16", "--parts", "refresh", "--guard", "0", "--csv", str(table)])
    status = {row["variant"]: (row["status"], row["ms"]) for row in csv.DictReader(table.open())}
    assert status["jr"] == ("WRONG", "")
    assert float(status["auto"][1]) > 0
    assert status["torch.linalg.eigh"][0].startswith("skipped: about 0.0 s, more than --guard 0")


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
