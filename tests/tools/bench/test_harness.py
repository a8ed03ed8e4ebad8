"""The parts of the benchmarks: shapes, clocks, ceilings, truth, the gate before any timing, records and pictures."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import platform
import subprocess
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from steepest.linalg.polar import polar
from steepest.tools import machine, shapes
from steepest.tools.bench import case as cases
from steepest.tools.bench import ceilings, counting, pictures, records, table, timing, truth
from steepest.tools.bench.case import Case, Settings, Variant, measure
from steepest.tools.bench.ceilings import Ceilings
from steepest.tools.bench.timing import Call, Timing
from support.polar_error import polar_error
from support.singular_values import gaussian

SETTINGS = Settings(rounds=3, seconds=0.0)
CEILINGS = Ceilings({"float32": 1e12}, 1e11)

# ---- shapes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "millions"),
    # Published sizes: GPT-2 124,439,808; Llama 3.2 1B 1,235,814,400; Llama 2 7B 6,738,415,616.
    [("gpt2-124m", 124.439808), ("llama-1b", 1235.8144), ("llama-7b", 6738.415616)],
)
def test_named_models_have_their_published_size(name: str, millions: float) -> None:
    assert shapes.elements(shapes.parse(name)) == millions * 1e6


def test_shapes_are_read_as_they_are_written() -> None:
    assert shapes.matrices(shapes.parse("3x16x24+8x4")) == [(3, 16, 24), (1, 8, 4)]
    assert shapes.spelled([(3, 16, 24), (1, 8, 4)]) == ["3x16x24", "1x8x4"]
    assert shapes.elements(shapes.parse("moe-64"), "matrix") == 3 * 64 * 2048 * 1408
    assert {min(m, n) for _, m, n in shapes.matrices(shapes.parse("lora-16"))} == {16}
    assert {min(m, n) for _, m, n in shapes.matrices(shapes.parse("per-head"))} == {64}


@pytest.mark.parametrize(
    ("name", "message"),
    [("gpt9", "'gpt9' are not known; choose one of tiny, small, gpt2-124m"), ("0x4x4", "numbers of 1 and more")],
)
def test_unknown_shapes_are_named(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shapes.parse(name)


# ---- clocks --------------------------------------------------------------------------------------------------------


def test_rounds_rotate_and_what_comes_before_a_call_is_not_timed() -> None:
    log: list[str] = []

    def call(name: str) -> Call:
        return Call(lambda: log.append(name), before=lambda: log.append(f"before {name}"))

    timings = timing.interleaved({"a": call("a"), "b": call("b")}, rounds=2, warmup=0)
    assert log == ["before a", "a", "before b", "b", "before b", "b", "before a", "a"]
    assert all(each.host is None and each.fastest <= each.median for each in timings.values())


def test_median_and_spread() -> None:
    found = timing.summary([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (found.median, found.spread, found.fastest) == (3.0, 1.5, 1.0)
    assert timing.summary([2.0]) == Timing(2.0, 0.0, 2.0)


class Event:
    """Of a GPU that is not there."""

    log: list[str]

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.log.append("record")

    def synchronize(self) -> None:
        self.log.append("wait")

    def elapsed_time(self, other: Event) -> float:
        return 2.0


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a GPU would have been asked for, in order."""
    log: list[str] = []
    monkeypatch.setattr(Event, "log", log, raising=False)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append(f"busy {cycles}"), raising=False)
    return log


def test_a_call_on_a_gpu(gpu: list[str]) -> None:
    """Memory is written over and the GPU kept busy before the first event; the events' milliseconds are seconds."""
    cold = torch.ones(4)
    call = Call(lambda: gpu.append(f"call {cold.sum().item():g}"), before=lambda: gpu.append("before"))
    assert timing.seconds(call, "cuda", cold=cold, lead=1e-3) == 2e-3
    assert gpu == ["before", "synchronize", "busy 2000000", "record", "call 0", "record", "wait"]
    gpu.clear()
    timing.seconds(call, "cuda")
    assert gpu == ["before", "synchronize", "record", "call 0", "record", "wait"]


@pytest.mark.parametrize("hide", [True, False])
def test_the_lead_is_what_the_host_needs(hide: bool, gpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "FLUSH_BYTES", 8)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, device, **options: empty(*size, **options))
    monkeypatch.setattr(timing, "host_seconds", lambda call: 1e-3)
    found = timing.interleaved({"a": Call(lambda: None)}, rounds=1, warmup=1, device="cuda", hide=hide)
    assert found["a"] == Timing(2e-3, 0.0, 2e-3, 1e-3)
    assert ("busy 2500000" in gpu) == hide


def test_the_host_of_a_call_is_timed_on_an_idle_gpu(gpu: list[str]) -> None:
    assert 0 <= timing.host_seconds(Call(lambda: gpu.append("call")), calls=2) < 1
    assert gpu == ["synchronize", "call", "synchronize", "call", "synchronize"]


def test_a_captured_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made once on a side stream, once while it is captured, and after that only replayed."""
    log: list[str] = []
    stream = types.SimpleNamespace(wait_stream=lambda other: log.append("wait"))
    graph = types.SimpleNamespace(replay=lambda: log.append("replay"))
    for name, value in {"Stream": lambda: stream, "current_stream": lambda: stream, "CUDAGraph": lambda: graph}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda _: contextlib.nullcontext())
    captured = timing.Captured(lambda: log.append("call") or [torch.ones(1)])
    assert len(captured()) == len(captured()) == 1
    assert log == ["wait", "call", "wait", "call", "replay", "replay"]


# ---- the machine ---------------------------------------------------------------------------------------------------


def test_what_a_figure_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(subprocess, "check_output", lambda command, **_: "580.1\n" if "nvidia-smi" in command else "")
    monkeypatch.setenv("STEEPEST_COMMIT", "abc")
    facts = machine.machine("cuda")
    assert (facts["machine"], facts["driver"], facts["commit"]) == ("a GPU", "580.1", "abc")
    assert facts["torch"] == torch.__version__
    assert "driver" not in machine.machine("cpu")


X86 = "processor\t: 0\nmodel name\t: AMD EPYC\nmodel\t\t: 17\nflags\t\t: fpu avx512f avx512_bf16\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd bf16 i8mm\nCPU implementer\t: 0x41\nCPU part\t: 0xd4f\n"


@pytest.mark.parametrize(
    ("cpuinfo", "lscpu", "switch", "name"),
    [
        (X86, "", "", "AMD EPYC with avx512_bf16"),
        (X86[:-1] + " amx_bf16\n", "", "", "AMD EPYC with amx_bf16"),
        (X86.replace("avx512_bf16", ""), "", "1", "AMD EPYC, STEEPEST_CPU_BF16=1"),
        (ARM, "Architecture:   aarch64\nModel name:     Neoverse-V2\nModel: 1\n", "", "Neoverse-V2 with bf16"),
        (ARM, "BIOS Model name: virt\nModel name: -\n", "0", "aarch64 with bf16, STEEPEST_CPU_BF16=0"),
        ("", "", "", "aarch64"),
    ],
    ids=["x86", "x86 with tiles", "x86, switched on", "aarch64", "aarch64, switched off", "nothing known"],
)
def test_the_name_of_a_cpu(cpuinfo: str, lscpu: str, switch: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_cpuinfo", lambda: cpuinfo)
    monkeypatch.setattr(machine, "_lscpu", lambda: lscpu)
    monkeypatch.setattr(machine.polar, "cpu_bf16", switch)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(platform, "processor", lambda: "")
    assert machine.cpu() == name


def test_outside_a_checkout_the_commit_is_the_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        machine.backend, "extension", types.SimpleNamespace(build_info=lambda: {"commit": "0123456789ab"})
    )
    assert machine.commit(tmp_path) == "0123456789ab"
    monkeypatch.setattr(machine.backend, "extension", None)
    assert machine.commit(tmp_path) == "unknown"


def test_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 2 n^3 floating-point operations and of bytes read and written."""
    seconds = {"bfloat16": 1e-3, "float32": 2e-3, "copy": 1e-3}
    monkeypatch.setattr(
        ceilings, "interleaved", lambda calls, **_: {name: Timing(seconds[name], 0, 0) for name in calls}
    )
    monkeypatch.setattr(ceilings, "QUICK_CPU", (64, 4096))
    found = ceilings.measure("cpu", quick=True)
    assert found.products == {"bfloat16": 2 * 64**3 / 1e-3, "float32": 2 * 64**3 / 2e-3}
    assert found.copy == 2 * 4096 / 1e-3
    assert "copy 0.008192 GB/s" in str(found)


# ---- counting ------------------------------------------------------------------------------------------------------


def test_products_are_counted() -> None:
    a, b, c = torch.ones(3, 4, 5), torch.ones(3, 5, 6), torch.zeros(3, 4, 6)

    def call() -> None:
        torch.bmm(a, b)
        torch.baddbmm(c, a, b, out=c)
        c.baddbmm_(a, b)
        torch.addmm(c[0], a[0], b[0])
        a[0] @ b[0]
        c.mul_(2)

    assert counting.flop_of(call) == 2 * 4 * 5 * 6 * (3 + 3 + 3 + 1 + 1)


def test_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's operators on a CPU, without those that operators call; on a GPU the kernels that the profiler saw."""
    few = counting.launches(lambda: torch.ones(2).neg(), "cpu")["operators"]
    assert few == 2

    def thrice() -> None:
        with torch.profiler.record_function("a step"):
            for _ in range(3):
                torch.ones(2).neg()

    assert counting.launches(thrice, "cpu")["operators"] == 3 * few
    kernels = [("steepest::multi_tensor::run", "CUDA"), ("gemm", "CUDA"), ("aten::mm", "CPU")]
    events = [types.SimpleNamespace(name=name, device_type=types.SimpleNamespace(name=kind)) for name, kind in kernels]
    profile = contextlib.nullcontext(types.SimpleNamespace(events=lambda: events))
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert counting.launches(lambda: None, "cuda") == {"launches": 2, "ours": 1}


def test_peak_of_a_gpu_is_the_allocators(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 130)
    assert counting.peak_bytes(lambda: None, "cuda") == 30
    assert counting.peak_bytes(lambda: torch.ones(10).add(1).sum(), "cpu") == 80


# ---- truth ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)], ids=str)
def test_errors_are_those_of_the_singular_value_decomposition(shape: tuple[int, int]) -> None:
    x = gaussian(*shape)
    y = polar(x, "turbo") + 1e-3 * gaussian(*shape, seed=1)
    found, wanted = truth.Truth(x).error(y), polar_error(x, y)
    assert found.relative == pytest.approx(wanted.relative, rel=1e-6)
    assert found.off_diagonal == pytest.approx(wanted.off_diagonal, rel=1e-6)


def test_the_worse_of_two_errors() -> None:
    assert truth.Error(1.0, 2.0).worse(truth.Error(2.0, 1.0)) == truth.Error(2.0, 2.0)
    for a, b in ((1.0, math.nan), (math.nan, 1.0)):
        assert math.isnan(truth.Error(a, 0.0).worse(truth.Error(b, 0.0)).relative)


# ---- the gate ------------------------------------------------------------------------------------------------------


def variant(error: float = 0.0, **options: Any) -> Variant:
    return Variant(lambda: None, errors=lambda _: {"relative_error": error}, bounds={"relative_error": 0.1}, **options)


def rows_of(variants: dict[str, Variant], settings: Settings = SETTINGS) -> dict[str, dict[str, Any]]:
    case = Case("some", "2x2", "float32", variants, "base")
    return {row["variant"]: row for row in measure(case, settings, CEILINGS)}


def raising(error: Exception) -> Callable[[], None]:
    def run() -> None:
        raise error

    return run


def test_what_is_wrong_or_fails_is_not_timed() -> None:
    rows = rows_of(
        {
            "base": variant(),
            "wrong": variant(0.2, ours=True),
            "nan": variant(math.nan, ours=True),
            "failing": replace(variant(), run=raising(RuntimeError("no\n room")), version="1.2"),
            "second": replace(variant(), run=[None].pop),
            "apart": variant(timed=False),
        }
    )
    assert rows["base"]["status"] == rows["apart"]["status"] == "ok"
    assert rows["wrong"]["status"] == rows["nan"]["status"] == "WRONG"
    assert "relative_error" not in rows["nan"]
    assert rows["failing"]["status"] == "failed: RuntimeError: no room"
    assert rows["second"]["status"] == "failed: IndexError: pop from empty list"
    assert [name for name, row in rows.items() if "ms" in row] == ["base"]
    assert rows["wrong"]["relative_error"] == 0.2
    assert cases.bad(rows.values()) == ["some 2x2 float32 wrong: WRONG", "some 2x2 float32 nan: WRONG"]


def test_what_would_take_too_long_is_skipped() -> None:
    rows = rows_of({"base": variant(one=lambda: None, parts=10**12), "quick": variant(one=lambda: None)})
    assert rows["base"]["status"].startswith("skipped: about ")
    assert "more than --guard 1" in rows["base"]["status"]
    assert "ms" in rows["quick"]
    assert "ratio" not in rows["quick"]


def test_rates_and_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    medians = {"base": 2e-3, "ours": 1e-3}
    monkeypatch.setattr(
        cases, "interleaved", lambda calls, **_: {name: Timing(medians[name], 1e-5, 5e-4, 3e-6) for name in calls}
    )
    row = rows_of({"base": variant(), "ours": variant(ours=True, flop=1e8, bytes=1e7)})["ours"]
    wanted = {"ms": 1, "spread_ms": 0.01, "fastest_ms": 0.5, "host_ms": 0.003, "rounds": 3, "base": "base", "ratio": 2}
    wanted |= {"gflop": 0.1, "tflop_per_s": 0.1, "of_products": 0.1, "mbyte": 10, "gb_per_s": 10, "of_copy": 0.1}
    assert {key: row[key] for key in wanted} == pytest.approx(wanted)


def test_a_peer_that_leaves_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its row has its error and no time; the others are timed without it."""
    timed = timing.interleaved

    def interleaved(calls: dict[str, Call], **options: Any) -> Any:
        if "greedy" in calls:
            raise torch.OutOfMemoryError("all gone")
        return timed(calls, **options)

    monkeypatch.setattr(cases, "interleaved", interleaved)
    rows = rows_of({"base": variant(), "ours": variant(ours=True), "greedy": variant(0.01)})
    assert rows["greedy"]["status"] == "failed: no memory beside the others"
    assert rows["greedy"]["relative_error"] == 0.01
    assert "ms" in rows["ours"]
    assert "ms" in rows["base"]


def test_graphs_only_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    variants = {"base": variant(), "ours": variant(ours=True, captured=True)}
    assert set(rows_of(variants)) == {"base", "ours"}
    monkeypatch.setattr(cases, "_gate", lambda variant, settings: ("failed: no GPU here", {}))
    found = rows_of(variants, replace(SETTINGS, device="cuda"))
    assert set(found) == {"base", "ours", "ours, captured"}
    assert found["ours, captured"]["ours"]


# ---- records, tables and pictures ----------------------------------------------------------------------------------


ROWS: list[dict[str, Any]] = [
    {"suite": "polar", "case": name, "dtype": "float16", "variant": who, "ours": who == "ours", "version": ""}
    | {"status": "ok", "ms": ms, "spread_ms": 0.1, "ratio": 4 / ms, "base": "torch", "gflop": 2.0, "mbyte": 10.0}
    | {"tflop_per_s": 2 / ms, "relative_error": 0.1 * ms, "points": [1, 2]}
    for name, ms in (("8x16x16", 2.0), ("32x16x16", 3.0))
    for who in ("torch", "ours")
]
ROWS.append({"suite": "polar", "case": "1x1x1", "dtype": "float16", "status": "failed: no room"})


@pytest.fixture
def record() -> records.Record:
    found = records.Record({"machine": "a machine", "commit": "abc"}, CEILINGS, rows=list(ROWS))
    return replace(found, settings={"quick": "True"})


def test_a_record_is_read_as_it_was_written(record: records.Record, tmp_path: Path) -> None:
    record.write(tmp_path / "new" / "polar.json")
    assert records.read(tmp_path / "new") == records.read(tmp_path / "new" / "polar.json") == [record]
    with (tmp_path / "new" / "polar.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5
    assert (rows[1]["machine"], rows[1]["commit"], rows[1]["variant"], rows[1]["ms"]) == (
        "a machine",
        "abc",
        "ours",
        "2.0",
    )
    assert rows[-1]["ms"] == ""
    assert "points" not in rows[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        ("{", "is not a file of steepest bench"),
        ("{}", "is not a file of steepest bench .KeyError: 'format'"),
        (json.dumps({"format": 99}), "has format 99, and this version of steepest reads 1"),
    ],
)
def test_a_file_that_is_no_record_is_refused(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        records.read(path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no JSON file"):
        records.read(tmp_path)


def test_a_table_has_a_block_for_each_case() -> None:
    text = table.text(ROWS)
    blocks = text.split("\n\n")
    assert [block.splitlines()[0].split("   ")[0] for block in blocks] == [
        *("polar 8x16x16 float16", "polar 32x16x16 float16", "polar 1x1x1 float16")
    ]
    assert "torch over this, more is faster" in blocks[0]
    assert blocks[0].splitlines()[1].split() == ["variant", "ms", "+-", "times", "TFLOP/s", "error"]
    assert blocks[0].splitlines()[3].split() == ["ours", "2", "0.1", "2", "1", "0.2"]
    assert "failed: no room" in blocks[2]


def test_pictures(record: records.Record, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = pictures.draw(tmp_path, record)
    assert [file.name for file in files] == ["polar.png", "polar-roofline.png", "polar-error.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    assert pictures.draw(tmp_path, replace(record, rows=[])) == []


def test_the_roofline_bends_at_the_ceilings(record: records.Record) -> None:
    pytest.importorskip("matplotlib")
    figure = pictures.roofline([row for row in ROWS if row["status"] == "ok"], record)
    (ax,) = figure.axes
    xs, ys = ax.lines[0].get_data()
    assert ys == pytest.approx([min(1.0, 0.1 * x) for x in xs])  # 1 TFLOP/s, 100 GB/s
    assert xs[0] < 10 < xs[-1]
