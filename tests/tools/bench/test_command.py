"""`steepest bench` as a whole, the gate between two runs, and peers as far as they are there."""

from __future__ import annotations

import csv
import json
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from steepest.linalg.polar import polar
from steepest.tools import cli
from steepest.tools.bench import ceilings, command, peers, pictures, regression
from steepest.tools.bench.case import Job
from steepest.tools.bench.ceilings import Ceilings
from steepest.tools.bench.records import Record, read
from steepest.tools.bench.regression import compare
from steepest.tools.bench.suites import SUITES
from support.pretended_gpu import pretended


@pytest.fixture(autouse=True)
def known_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Ceilings({"float32": 1e12, "bfloat16": 1e12}, 1e11)
    monkeypatch.setattr(ceilings, "measure", lambda device, quick: found)


def bench(*arguments: str) -> int:
    return cli.main(["bench", *arguments])


SHORT = ("--quick", "--device", "cpu", "--seconds", "0")


def test_from_the_command_to_the_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("symm_gemm", *SHORT, "--shapes", "2x16x16", "--out", str(tmp_path)) == 0
    said = capsys.readouterr().out
    assert "commit: " in said
    assert "copy 100 GB/s" in said
    assert "[1/1]" in said
    assert "symm_gemm 2x16x16 float32   (times: torch.bmm over this, more is faster)" in said
    (record,) = read(tmp_path / "symm_gemm.json")
    absent = [row for row in record.rows if row["case"] == "peers, gram"]
    assert {row["variant"] for row in absent} == {
        *("quack", "dion", "emerging-optimizers", "flash-muon", "modded-nanogpt")
    }
    assert all(row["status"] == "found" or row["status"].startswith("absent: ") for row in absent)
    assert "modded-nanogpt" in said
    with (tmp_path / "symm_gemm.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(record.rows)
    assert all(row["machine"] and row["torch"] and row["commit"] for row in rows)
    assert rows[-1]["variant"] == "symm_gemm"
    assert float(rows[-1]["ms"]) > 0
    assert (tmp_path / "symm_gemm.png").exists() == ("symm_gemm.png" in said)


def test_a_training_run_and_its_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    book = tmp_path / "book.txt"
    book.write_text("It was the best of times, it was the worst of times. " * 400)
    chosen = ("--methods", "torch fused AdamW", "Muon", "--steps", "4", "--text", str(book))
    assert bench("train", *SHORT, *chosen, "--out", str(tmp_path)) == 0
    (found,) = read(tmp_path)
    assert [each["variant"] for each in found.rows] == ["torch fused AdamW", "Muon"]
    assert (tmp_path / "train.png").read_bytes().startswith(b"\x89PNG")


def test_pictures_are_optional(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(*_: object) -> None:
        raise ImportError("pictures are drawn with matplotlib: pip install 'steepest[plot]'")

    monkeypatch.setattr(pictures, "draw", none)
    assert bench("symm_gemm", *SHORT, "--shapes", "2x16x16", "--no-peers", "--out", str(tmp_path)) == 0
    assert "no pictures, pictures are drawn with matplotlib" in capsys.readouterr().out


def test_what_fails_is_a_row_and_an_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    space = command.SUITES["symm_gemm"].__globals__
    build = space["_case"]

    def case(name: str, *rest: Any) -> Any:
        if name == "2x8x8":
            raise torch.OutOfMemoryError("2 matrices")
        return build(name, *rest)

    monkeypatch.setitem(space, "_case", case)
    shapes = ("--shapes", "2x8x8", "2x16x16", "--no-peers", "--out", str(tmp_path))
    assert bench("symm_gemm", *SHORT, *shapes) == 1
    assert "symm_gemm 2x8x8 float32 : failed: OutOfMemoryError: 2 matrices" in capsys.readouterr().out
    (record,) = read(tmp_path)
    assert {row["status"] for row in record.rows if row["case"] == "2x16x16"} == {"ok"}


def test_a_gpu_that_no_longer_answers_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An illegal access makes every later call fail: what was measured stays, and a row says where it ended."""
    gone = False

    def call() -> None:
        if gone:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def jobs(settings: command.Settings) -> list[Job]:
        def run(case: str) -> list[command.Row]:
            nonlocal gone
            gone = case == "second"
            call()
            return [{"suite": "small", "case": case, "variant": "polar", "ours": True, "status": "ok", "ms": 1.0}]

        return [Job("small", case, "float16", lambda _, case=case: run(case)) for case in ("first", "second", "third")]

    monkeypatch.setitem(command.SUITES, "small", jobs)
    with pretended(monkeypatch):
        monkeypatch.setattr(torch.cuda, "synchronize", call)
        monkeypatch.setattr(torch.cuda, "empty_cache", call)
        assert bench("small", "--device", "cuda", "--no-peers", "--out", str(tmp_path)) == 1
    (record,) = read(tmp_path / "small.json")
    error = "failed: RuntimeError: CUDA error: an illegal memory access was encountered"
    assert [(row["case"], row["status"]) for row in record.rows] == [
        ("first", "ok"),
        ("second", error),
        ("the GPU", f"{error}; not measured after this, run the rest in a new process"),
    ]


def test_out_of_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes = ("--shapes", "2x16x16", "--no-peers", "--budget", "-1", "--name", "mine", "--out", str(tmp_path))
    assert bench("symm_gemm", *SHORT, *shapes) == 0
    (record,) = read(tmp_path / "mine.json")
    assert [row["status"] for row in record.rows] == ["skipped: out of time, --budget -1"]


def test_with_a_budget_suites_take_turns() -> None:
    """What is left out in the end is the last of each."""
    polar, small = [[Job(name, str(k), "", list) for k in range(count)] for name, count in (("polar", 3), ("small", 1))]
    found = [(job.suite, job.case) for job in command._in_turn([polar, small], True)]
    assert found == [("polar", "0"), ("small", "0"), ("polar", "1"), ("polar", "2")]
    assert command._in_turn([polar, small], False) == [*polar, *small]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dance",), "suite 'dance' is not known; choose from polar, symm_gemm"),
        (("polar", "--shapes", "gpt9"), "'gpt9' are not known"),
        (("refresh", "--shapes", "gpt2-124m"), "is not COUNTxSIZE"),
        (("polar", "--rounds", "0"), "pass a whole number of 1 or more"),
        (("fused", "--elements", "many"), "'many': pass a number of elements, as in 1e8"),
        (("--compare", "a.json"), "a.json cannot be read"),
        (("--compare", "a", "b", "c"), "a cannot be read"),
    ],
)
def test_what_is_not_taken(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        bench(*arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench("--device", "cuda")
    assert "torch sees no GPU here" in capsys.readouterr().err


# ---- two runs ------------------------------------------------------------------------------------------------------


def row(variant: str = "ours", **values: Any) -> dict[str, Any]:
    shared = {"suite": "polar", "case": "2x2", "dtype": "float16", "ours": True, "status": "ok"}
    return {**shared, "variant": variant, "ms": 1.0, "spread_ms": 0.05, **values}


def record(*rows: dict[str, Any], machine: str = "a machine") -> list[Record]:
    return [Record({"machine": machine}, rows=list(rows))]


@pytest.mark.parametrize(
    ("old", "new", "worse"),
    [
        (row(), row(ms=1.2), ["ms 1 -> 1.2 (1.20 x)"]),
        (row(), row(ms=1.09), []),  # within the two spreads
        (row(spread_ms=0.0), row(ms=1.02, spread_ms=0.0), []),  # within three per cent
        (row(relative_error=0.1), row(relative_error=0.2), ["relative_error 0.1 -> 0.2 (2.00 x)"]),
        (row(relative_error=0.1), row(relative_error=0.11), []),
        (row(launches=3), row(launches=4), ["launches 3 -> 4 (1.33 x)"]),
        (row(host_us=10.0, spread_us=1.0), row(host_us=14.0, spread_us=1.0), ["host_us 10 -> 14 (1.40 x)"]),
        (row("torch", ours=False), row("torch", ours=False, ms=9.0), []),
    ],
)
def test_what_got_worse(old: dict[str, Any], new: dict[str, Any], worse: list[str]) -> None:
    found = compare(record(old, row("another")), record(new, row("another")))
    assert [str(change).partition(": ")[2] for change in found.worse] == worse
    assert found.failed == bool(worse)
    backwards = compare(record(new, row("another")), record(old, row("another")))
    assert [change.what for change in backwards.better] == [text.split()[0] for text in worse if "error" not in text]
    assert not backwards.worse


def test_what_is_no_longer_timed() -> None:
    old = record(row(), row("second"), row("third"))
    found = compare(old, record(row(status="WRONG"), row("third")))
    assert list(found.lost) == ["polar 2x2 float16 ours: WRONG", "polar 2x2 float16 second: not there"]
    assert found.failed
    assert "lost: polar 2x2 float16 ours: WRONG" in str(found)
    same = compare(old, old)
    assert not same.failed
    assert str(same) == "3 rows compared\nnothing changed beyond the spread"


def test_cases_that_were_not_asked_for_are_not_lost() -> None:
    assert not compare(record(row(), row(case="4x4")), record(row())).failed


def test_what_is_not_compared() -> None:
    with pytest.raises(ValueError, match="different machines are not compared: a machine, another"):
        compare(record(row()), record(row(), machine="another"))
    with pytest.raises(ValueError, match="no row in common"):
        compare(record(row()), record(row(case="4x4")))


def test_the_gate_as_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two files; and a run against an older one of the same machine that was faster than light."""
    for name, ms in (("old", 1.0), ("new", 2.0)):
        record(row(ms=ms))[0].write(tmp_path / f"{name}.json")
    old, new = str(tmp_path / "old.json"), str(tmp_path / "new.json")
    assert bench("--compare", old, new) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[1].split() == ["worse", "what", "before", "now", "times"]
    assert said[2].split() == ["polar", "2x2", "float16", "ours", "ms", "1", "2", "2.00"]
    assert bench("--compare", old, old) == 0
    with pytest.raises(SystemExit):
        bench("symm_gemm", *SHORT, "--compare", old)
    said = capsys.readouterr()
    assert "runs on different machines are not compared" in said.err
    assert "[1/1]" not in said.out


@pytest.mark.slow
def test_a_planted_slowdown_fails_the_gate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against a folder of baselines, of which the one of this class of CPU is taken, whatever the CPU's name."""
    run = ("symm_gemm", "--device", "cpu", "--shapes", "2x96x96", "--no-peers", "--rounds", "9")
    folder = tmp_path / "baselines"
    assert bench(*run, "--out", str(folder), "--name", "this") == 0
    this = json.loads((folder / "this.json").read_text())
    other = {**this, "machine": {**this["machine"], "machine": "Another with tiles, 99 threads"}}
    this["machine"]["machine"] = "Renamed " + this["machine"]["machine"]
    for row_ in this["rows"]:
        row_["spread_ms"] = 0.0
    (folder / "this.json").write_text(json.dumps(this))
    (folder / "other.json").write_text(json.dumps({**other, "rows": []}))
    gemm = SUITES["symm_gemm"].__globals__["gemm"]
    monkeypatch.setitem(SUITES["symm_gemm"].__globals__, "gemm", lambda *a, **k: [gemm(*a, **k) for _ in range(20)][-1])
    capsys.readouterr()
    assert bench(*run, "--out", str(tmp_path / "run"), "--compare", str(folder)) == 1
    worse = [line for line in capsys.readouterr().out.splitlines() if "time over torch.bmm" in line]
    assert len(worse) == 1
    assert float(worse[0].split()[-1]) > 3


@pytest.mark.parametrize(
    ("before", "after", "worse"),
    [
        (row(ratio=2.0, base="torch"), row(ratio=2.0, base="torch", ms=9.0), []),  # a slow minute of everybody's
        (row(ratio=2.0, base="torch"), row(ratio=1.8, base="torch"), []),  # within the margin
        (row(ratio=2.0, base="torch"), row(ratio=1.0, base="torch"), ["time over torch 0.5 -> 1 (2.00 x)"]),
        (row(ratio=2.0, base="torch", spread_ms=0.9), row(ratio=1.0, base="torch", spread_ms=0.9), []),
        (row(ratio=2.0, base="ours"), row(ratio=1.0, base="ours"), []),
        (row(state_mib=1.0), row(state_mib=1.1), ["state_mib 1 -> 1.1 (1.10 x)"]),
    ],
)
def test_cpus_are_compared_by_ratios(before: dict[str, Any], after: dict[str, Any], worse: list[str]) -> None:
    old, new = (record(each, machine=f"{name}, 2 threads") for each, name in ((before, "One"), (after, "Two")))
    found = compare(old, new)
    assert [str(change).partition(": ")[2] for change in found.worse] == worse
    with pytest.raises(ValueError, match="CPU with no bf16, 1 thread, CPU with no bf16, 2 threads"):
        compare(record(before, machine="One, 1 thread, CPU time"), new)


def test_what_is_judged_has_its_spread() -> None:
    assert set(regression.MEASURES) >= {"ms", "host_us", "extra_mib"}


# ---- peers ---------------------------------------------------------------------------------------------------------


class Recorded(torch.optim.SGD):
    """Stands for a peer's optimizer, and keeps what it was called with."""

    def __init__(self, params: Any, **options: Any) -> None:
        self.options = options
        super().__init__(params, lr=options["lr"])


class GramNewtonSchulz:
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return polar(x)


def newton_schulz(
    x: torch.Tensor, steps: int, coefficient_type: str, use_syrk: bool = False, **_: object
) -> torch.Tensor:
    assert torch.get_float32_matmul_precision() == "medium"
    assert (steps, coefficient_type, use_syrk, x.dtype) == (5, "quintic", True, torch.float32)
    return polar(x)


def gram(x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    return x @ x.mT


#: What each package has, by the names its authors gave.
PACKAGES: dict[str, dict[str, Any]] = {
    "gram_newton_schulz": {"GramNewtonSchulz": GramNewtonSchulz, "Muon": Recorded},
    "quack.gemm_interface": {"gemm_symmetric": torch.bmm},
    "dion": {"Muon": Recorded},
    "dion.newton_schulz_triton": {"newton_schulz_triton": polar, "ns_line_1": gram},
    "emerging_optimizers.orthogonalized_optimizers": {"Muon": Recorded},
    "emerging_optimizers.orthogonalized_optimizers.muon_utils": {"newton_schulz": newton_schulz},
    "emerging_optimizers.triton_kernels": {"tsyrk_ex": gram},
    "flash_muon": {"fast_newtonschulz": lambda x, steps: polar(x), "matmul_transpose": gram},
    "triton_kernels": {"XXT": gram},
    "heavyball": {"Muon": Recorded, "SOAP": Recorded},
    "pytorch_optimizer": {"Muon": Recorded, "SOAP": Recorded},
    "soap": {"SOAP": Recorded},
}
ROLES = sorted({(peer.name, role) for peer in peers.PEERS for role in peer.roles})


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in PACKAGES.items():
        parts = name.split(".")
        for depth in range(1, len(parts)):
            parent = ".".join(parts[:depth])
            if parent not in PACKAGES and parent not in sys.modules:
                monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize(("name", "role"), ROLES)
def test_a_peer_is_called_as_its_package_is_made(name: str, role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrix by matrix or at once, which products may round apart: in fp32 by some eps, which "auto" lifts up to 497
    times, and in bf16, where that is larger than the factor, not at all to be compared."""
    monkeypatch.setattr("steepest.linalg.polar.choice.native_bf16", lambda: False)
    (found,) = [peer for peer in peers.installed(role) if peer.name == name]
    made = found.make()
    x = torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(0))
    if (name, role) == ("emerging-optimizers", "gram"):
        with pytest.raises(TypeError, match="tsyrk_ex takes bfloat16, not torch.float32"):
            made(x)
        x = x.bfloat16()
    if role in ("polar", "gram"):
        wanted, eps = polar(x) if role == "polar" else x @ x.mT, torch.finfo(x.dtype).eps
        atol = (497 if role == "polar" else 1) * len(x[0]) * eps
        torch.testing.assert_close(torch.stack(list(made(x))), wanted, rtol=eps, atol=atol)
        return
    matrices = [nn.Parameter(torch.zeros(4, 6)) for _ in range(2)]
    for others in ([], [nn.Parameter(torch.zeros(6))]):
        optimizers = made(matrices, others)
        held = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        scalar = getattr(optimizers[0], "options", {}).get("scalar_optimizer")
        held += [] if scalar is None else [p for group in scalar.param_groups for p in group["params"]]
        assert {id(p) for p in held} == {id(p) for p in (*matrices, *others)}
        assert len(held) == len(matrices) + len(others)
        if role == "soap":
            assert optimizers[0].options["precondition_frequency"] == 1
    assert torch.get_float32_matmul_precision() == "highest"


def test_every_peer_is_named_whether_it_is_there_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that raises on import, or is another package of that name, says so."""
    for name in PACKAGES:
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setitem(sys.modules, name.split(".")[0], None)
    for role in ("polar", "gram", "muon", "soap"):
        known = peers.known(role)
        assert known
        assert all(peer.status.startswith("absent: ModuleNotFoundError: ") for peer in known)
        assert peers.installed(role) == []
    other = types.ModuleType("soap")
    other.SOAP = type("SOAP", (), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "soap", other)
    (found,) = [peer for peer in peers.known("soap") if peer.name == "SOAP reference"]
    assert "soap is another package here; put the folder of the reference's soap.py on PYTHONPATH" in found.status


def test_an_import_that_changes_torch_changes_it_for_no_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> str:
        torch.set_float32_matmul_precision("high")
        return "made"

    peer = replace(peers.PEERS[0], roles={"polar": make})
    monkeypatch.setattr(peers, "PEERS", (peer,))
    assert [found.make() for found in peers.installed("polar")] == ["made"]
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.usefixtures("packages")
def test_peers_stand_beside_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such device")

    monkeypatch.setitem(vars(sys.modules["dion.newton_schulz_triton"]), "newton_schulz_triton", broken)
    assert bench("polar", *SHORT, "--shapes", "2x32x64", "--presets", "auto", "--out", str(tmp_path)) == 0
    (found,) = read(tmp_path)
    rows = {each["variant"]: each for each in found.rows if each["case"] == "2x32x64"}
    assert rows["dion"]["status"] == "failed: RuntimeError: no such device"
    assert rows["gram-newton-schulz"]["ms"] > 0
    assert rows["gram-newton-schulz"]["relative_error"] == rows["polar auto"]["relative_error"]
    assert not rows["gram-newton-schulz"]["ours"]


@pytest.mark.usefixtures("packages")
def test_optimizers_of_peers_stand_beside_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """These here are gradient descent, which is no polar factor: WRONG, and none of our concern."""
    assert bench("step", "launch", *SHORT, "--shapes", "2x8x16", "--out", str(tmp_path)) == 0
    (found,) = read(tmp_path)
    rows = {(each["case"], each["variant"]): each for each in found.rows}
    muons = ("gram-newton-schulz", "dion", "emerging-optimizers", "heavyball", "pytorch-optimizer")
    for name in muons:
        assert rows["2x8x16", name]["status"] == "WRONG"
        assert rows["2x8x16", name]["relative_error"] > 0
        assert rows["2x8x16 whole", name]["host_us"] > 0
    for name in ("heavyball", "pytorch-optimizer", "SOAP reference"):
        assert rows["2x8x16 SOAP", name]["ms"] > 0
    assert "wrong or failed" not in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "_run", lambda *arguments: pytest.fail("it was measured"))
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        bench("symm_gemm", *SHORT, "--shapes", "2x16x16", "--out", str(tmp_path / "file" / "out"))
    assert f"--out: nothing can be written into {tmp_path / 'file' / 'out'}: Not a directory" in capsys.readouterr().err
