"""`steepest plan` says what a polar call does; `steepest doctor` what is compiled in (more of it in test_build.py) and
whether the kernels are right."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from steepest.linalg.chain import Apply, Gram, Product
from steepest.linalg.polar import choose
from steepest.ops import backend, polar_chain
from steepest.ops.extension import MAJORS
from steepest.tools import cli, doctor, facts, planner
from steepest.tools.planner import Plan, Stack
from support.slow import slow

NO_LAUNCHES = planner._no_launches(choose(256, 512, device="cuda"), Stack(1, 256, 512))
needs_launches = pytest.mark.skipif(NO_LAUNCHES is not None, reason=f"{NO_LAUNCHES}")
needs_extension = pytest.mark.skipif(backend.extension is None, reason=f"{backend.extension_reason}")


def plan_of(*shapes: str, preset: str = "auto", **options: Any) -> Plan:
    return planner.plan([planner.parse(shape) for shape in shapes], preset, **options)


@pytest.mark.parametrize(
    ("preset", "aspect", "half_products"),
    # Gram form of T steps with r restarts: 4T - 3 + 3a + 3r(a - 1) halves of m^3 products, one more for a degree 9.
    [("auto", 4, 14 + 12 + 9), ("auto", 2, 14 + 6 + 3), ("exact", 4, 17 + 12 + 9), ("turbo", 8, 10 + 24)]
    # Standard form: T (3a + 1).
    + [("auto", 1, 4 * 4 + 1), ("exact", 1, 5 * 4), ("turbo", 1, 3 * 4 + 1)],
)
def test_work(preset: str, aspect: int, half_products: int) -> None:
    m = 1024
    totals = plan_of(f"3x{m}x{aspect * m}", f"{aspect * m}x{m}", preset=preset).totals()
    assert totals["asked_flop"] == pytest.approx(4 * half_products * m**3, rel=2 / m)
    assert totals["reference_flop"] == 4 * 5 * (4 * aspect + 2) * m**3


def test_the_reference_is_the_preset_that_is_torchs() -> None:
    plan = plan_of("2x96x160", preset="jordan")
    assert plan.totals()["asked_flop"] == plan.totals()["reference_flop"] == plan.totals()["executed_flop"]
    assert [stage.kind for stage in plan.calls[0].stages] == ["gram", "product", "apply"] * 5
    assert "torch's own" in planner.describe(plan)


@pytest.mark.parametrize(
    ("shape", "options", "form", "restarts", "why"),
    [
        ("24x1024x4096", {}, "gram", (2,), "aspect 4.00 is at least 1.25"),
        ("4096x1024", {"preset": "turbo"}, "gram", (), "aspect 4.00"),
        ("4096x4096", {}, "standard", (1, 2, 3), "aspect 1.00 is below 1.25"),
        ("512x2048", {"dtype": "bfloat16"}, "gram", (2, 3), "aspect 4.00"),
        ("512x2048", {"dtype": "bfloat16", "preset": "exact"}, "standard", (1, 2, 3, 4), "bfloat16 does not bear"),
        ("64x512", {"dtype": "float16"}, "standard", (1, 2, 3), "short side 64 is below 128"),
        ("257x300", {}, "standard", (1, 2, 3), "aspect 1.17 is below 1.25"),
        ("256x512", {"preset": "jordan"}, "plain", (1, 2, 3, 4), "torch.optim.Muon's function"),
    ],
)
def test_forms(shape: str, options: dict[str, Any], form: str, restarts: tuple[int, ...], why: str) -> None:
    (call,) = plan_of(shape, **options).calls
    assert (call.form, call.restarts) == (form, restarts)
    assert why in call.why[0]


@needs_extension
@pytest.mark.parametrize(("shape", "who"), [("9x1024x128", "a block"), ("256x256", "a cluster of 4 blocks")])
def test_small_matrices(shape: str, who: str) -> None:
    (call,) = plan_of(shape).calls
    assert (call.form, call.restarts, call.no_launches) == ("small", (), None)
    assert f"{who} takes a matrix and keeps it in shared memory" in call.why[0]


@needs_extension
def test_stacks_that_take_the_same_chain_share_a_call() -> None:
    plan = plan_of("126x64x256", "2x512x2048", "2048x2048", "2048x512", "96x96", "512x2044")
    assert [(call.form, [str(stack) for stack in call.stacks]) for call in plan.calls] == [
        ("small", ["126x64x256", "1x96x96"]),
        ("gram", ["2x512x2048", "1x2048x512"]),
        ("standard", ["1x2048x2048"]),
        ("gram", ["1x512x2044"]),
    ]
    assert plan.calls[3].no_launches == "a side is no multiple of 8: products one by one, in Triton"
    assert plan.totals()["efficiency"] is None


@pytest.mark.parametrize("shape", [(3, 512, 2048), (2, 2048, 512), (1, 256, 256)])
@pytest.mark.parametrize("node", [Gram("gram", "x"), Product("z", "z", "t", "t", 1.0, 0.0), Apply("y", "q", "x", 1, 0)])
def test_products_are_those_of_the_compiled_chain(node: Gram | Product | Apply, shape: tuple[int, int, int]) -> None:
    _C = pytest.importorskip("steepest._C", reason="only an editable build has steepest._C")
    found = planner.multiplication(node, Stack(*shape))
    kind, majors = polar_chain.KINDS.index(type(node).__name__.lower()), MAJORS.index(found.majors)
    product = _C.chain_product(kind, *shape)
    assert product == (found.batch, found.m, found.n, found.k, majors, found.symmetric)


@needs_launches
def test_launches() -> None:
    """One matrix of 4096: 136 cluster tiles of 256 in the lower triangle, on 66 clusters of two blocks."""
    (call,) = plan_of("4096x4096").calls
    (gram,) = call.stages[0].launches
    assert (gram.majors, gram.tile, gram.cluster, gram.clusters, gram.tiles) == ("kk", (128, 256, 64), 2, 66, 136)
    assert gram.executed == 136 * 256 * 256 * 4096 * 2
    assert gram.waves == 136 / 66
    assert gram.whole + gram.steps // (4096 // 64) == 136
    assert 0.5 < gram.efficiency < gram.asked / gram.executed
    assert call.stages[0].workspace_bytes >= 66 * 2 * 2 * 128 * 256 * 4
    for stage in call.stages:
        assert sum(launch.asked for launch in stage.launches) == stage.asked <= stage.executed


@needs_launches
def test_a_stage_is_a_launch_for_each_way_that_factors_lie() -> None:
    (call,) = plan_of("2x512x2048", "2048x512", "4x512x1024").calls
    assert [sorted(launch.majors for launch in stage.launches) for stage in call.stages[:3]] == [
        ["kk", "mnmn"],
        [],
        ["kk"],
    ]


def test_memory() -> None:
    """X, its second buffer, gram, z, t, q and p, in 16 bits; the workspace of streamed tiles comes on top."""
    (call,) = plan_of("24x1024x4096").calls
    assert call.matrix_bytes == (2 * (2 * 1024 * 4096 + 5 * 1024**2),)
    assert call.working_set_bytes == 24 * call.matrix_bytes[0] + max(stage.workspace_bytes for stage in call.stages)
    assert "does not fit an L2 cache of 50 MB\n      24x1024x4096       26.0 MB a matrix, 1 at once fit" in (
        planner.describe(plan_of("24x1024x4096"))
    )
    assert ", fits an L2 cache of 2000 MB" in planner.describe(plan_of("24x1024x4096", l2_mb=2000))


@needs_launches
def test_chunks() -> None:
    """A batch whose squares do not fit is cut; its launches are those of the chunks, and all of its work is there."""
    (call,) = plan_of("24x1024x4096").calls
    (whole,) = plan_of("24x1024x4096", l2_mb=2000).calls
    assert whole.chunking is None
    assert call.chunking is not None
    assert call.chunking.chunks == ((6,),) * 4
    assert call.chunking.traffic_bytes < call.chunking.whole_traffic_bytes
    for stage, other in zip(call.stages, whole.stages, strict=True):
        assert stage.asked == other.asked
        assert len(stage.launches) == 4 * len(other.launches)
        assert sum(launch.asked for launch in stage.launches) == (stage.asked if stage.launches else 0)
    text = planner.describe(plan_of("24x1024x4096"))
    assert "-> 4 times kk tile" in text
    assert "4 chunks of 6 matrices, 1.83 instead of 3.05 GB between cache and memory, 5% less time (modelled)" in text
    text = planner.describe(plan_of("36x1024x1024"))
    assert "one chunk, 2.60 GB between cache and memory; smaller ones would gain too little (modelled)" in text


def test_without_the_compiled_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "extension", None)
    monkeypatch.setattr(backend, "extension_reason", "there is none")
    plan = plan_of("2x512x2048")
    text = planner.describe(plan)
    assert "launches are not shown: there is none" in text
    assert "gram = x x^T" in text
    assert "->" not in text
    assert plan.totals()["executed_flop"] == plan.totals()["asked_flop"] > 0
    assert plan.totals()["efficiency"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "24x1024"], None),
        (["--shape", "24"], "shape '24' is not [COUNTx]ROWSxCOLUMNS"),
        (["--shape", "2x3xx4"], "shape '2x3xx4' is not"),
        (["--shape", "1x2x3x4"], "shape '1x2x3x4' is not"),
        (["--shape", "4x64x0"], "shape '4x64x0' has a size below 1"),
        (["--shape", "64x-64"], "shape '64x-64' has a size below 1"),
        (["--shape", "64x64", "--preset", "fast"], "preset 'fast' is not known; choose one of jordan, exact"),
        (["--shape", "64x64", "--preset", "svd"], "preset 'svd' is a singular value decomposition"),
        (["--shape", "64x64", "--dtype", "fp8"], "dtype 'fp8' is not planned for; choose one of float16, bfloat16"),
        (["--shape", "64x64", "--multiprocessors", "0"], "L2 cache are positive and at most 2147483647, got 0"),
        (["--shape", "64x64", "--l2", "nan"], "at most 2147483647, got 132 and nan MB"),
        (["--shape", "64x64", "--l2", "inf"], "at most 2147483647, got 132 and inf MB"),
        (["--shape", "64x64", "--multiprocessors", "4294967428"], "got 4294967428 and 50 MB"),
        (["--shape", "18446744073709551680x64x64"], "shape '18446744073709551680x64x64' has a size above 2147483647"),
    ],
)
def test_arguments(arguments: list[str], message: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    if message is None:
        assert cli.main(["plan", *arguments]) == 0
        assert arguments[1] in capsys.readouterr().out
        return
    with pytest.raises(SystemExit) as stopped:
        cli.main(["plan", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_same_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    shapes = ["2x512x2048", "512x512"]
    assert cli.main(["plan", "--json", *[part for shape in shapes for part in ("--shape", shape)]]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(plan_of(*shapes).json()))


@pytest.mark.parametrize("hopper", [True, False])
@pytest.mark.parametrize("architectures", [[], ["sm_80", "sm_90", "compute_90"]])
def test_doctor_says_whether_the_products_for_hopper_are_there(hopper: bool, architectures: list[str]) -> None:
    """And how to get them, where the build is for a Hopper GPU."""
    cuda = "13.0" if architectures else None
    info = {"version": "1", "commit": None, "torch": "2", "cuda": cuda, "compiler": "c++"}
    info |= {"hopper": hopper, "architectures": architectures}
    text = facts.describe({**facts.diagnose(), "compiled": info})
    assert f", {'with' if hopper else 'without'} products for Hopper; torch 2 headers" in text
    assert (f"compiled  WARNING: {backend.NO_HOPPER}" in text) == (bool(architectures) and not hopper)


@pytest.mark.parametrize(
    ("capability", "hopper", "reason"),
    [
        ((9, 0), True, None),
        ((9, 0), False, backend.NO_HOPPER),
        ((8, 0), False, "the compiled products are for compute capability 9.0"),
    ],
)
def test_a_hopper_gpu_without_its_products_is_told_once(
    capability: tuple[int, int],
    hopper: bool,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    built = types.SimpleNamespace(build_info=lambda: {"hopper": hopper})
    monkeypatch.setattr(backend, "extension", built)
    monkeypatch.setattr(backend, "_logged", set())
    monkeypatch.setattr(backend, "cuda_reason", lambda index=None: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(backend.selfcheck, "enabled", False)
    on_a_gpu: Any = types.SimpleNamespace(
        device=torch.device("cuda", 0), is_cuda=True, dtype=torch.float16, shape=torch.Size((2, 256, 512))
    )
    on_a_gpu.numel, on_a_gpu.is_contiguous, on_a_gpu.data_ptr = on_a_gpu.shape.numel, lambda: True, lambda: 0
    for _ in range(2):
        assert polar_chain.supports(on_a_gpu, ((1.0,),)) == (reason is None)
    told = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert told == ([] if reason is None else [f"polar_chain runs on torch (cuda: {reason})"])


# ---- the checks of doctor --------------------------------------------------------------------------------------------

CPU = ("elementwise", "cpu", torch.device("cpu"))


def outcome_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    """Exit status and outcome of a doctor that makes one check."""
    monkeypatch.setattr(doctor, "_every", lambda: iter([CPU]))
    status = cli.main(["doctor", "--json"])
    (outcome,) = json.loads(capsys.readouterr().out)["checks"]
    return status, outcome


def broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kernel: str) -> None:
    """In processes that doctor starts, what each elementwise op does."""
    text = f"""
import os, signal, sys
if "steepest.tools.doctor" in " ".join(sys.orig_argv):
    import steepest.ops.multi_tensor as multi_tensor
    right = multi_tensor._op
    def run(name):
        def kernel(*arguments):
            right(name, "cpu")(*arguments)
            {kernel}
        return kernel
    multi_tensor._op = lambda name, backend: run(name)
"""
    (tmp_path / "sitecustomize.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.slow
@needs_extension
@pytest.mark.parametrize(
    "kernel,said",
    [
        ("name == 'apply_update' and arguments[2][0].mul_(1.01)", "parameter of (40, 24)"),
        slow("os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
        slow("raise OSError('no compiler')", "OSError: no compiler"),
        slow("os._exit(3)", "exit status 3"),
        slow("os._exit(0)", "exit status 0"),
        slow("os.kill(os.getpid(), 40)", "killed by signal 40"),
    ],
    ids=["wrong", "a crash", "an error", "an exit", "an exit in silence", "a signal without a name"],
)
def test_doctor_fails_where_kernels_do(
    kernel: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken(monkeypatch, tmp_path, kernel)
    status, outcome = outcome_of(monkeypatch, capsys)
    assert (status, outcome["state"]) == (1, "wrong")
    assert outcome["text"].startswith(said)


@needs_extension
def test_doctor_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "TIMEOUT", 0.1)
    status, outcome = outcome_of(monkeypatch, capsys)
    assert (status, outcome["state"], outcome["text"]) == (1, "wrong", "no answer within 0.1 s")


def test_doctor_says_what_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every family, and why; what has been said is not said again."""
    monkeypatch.setattr(doctor.selfcheck, "enabled", False)
    outcomes = doctor.check_all()
    assert {(each.family, each.backend) for each in outcomes} == {
        (family, backend) for family, backends in doctor.selfcheck.FAMILIES.items() for backend in backends
    }
    assert {each.state for each in outcomes} == {"not run"}
    lines = doctor.describe(outcomes)
    assert lines[1] == "  elementwise    cuda    cuda:0  not run   STEEPEST_SELFCHECK=0 turns the checks off"
    assert lines[2] == "  elementwise    triton  cuda:0  not run   as elementwise, cuda"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("family", sorted(set(doctor.selfcheck.FAMILIES) - {"elementwise"}))
def test_without_a_gpu_the_reason_is_said(family: str) -> None:
    backend_name = doctor.selfcheck.FAMILIES[family][0]
    outcome = doctor._check(family, backend_name, torch.device("cuda", 0))
    assert outcome.state == "not run"
    assert outcome.text
    assert outcome.first_ms is None


def test_without_a_device_nothing_is_to_be_built_or_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A toolkit, a new build and Triton would help nobody there."""
    built = types.SimpleNamespace(build_info=lambda: {"cuda": None, "architectures": []})
    monkeypatch.setattr(backend, "extension", built)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    for there, said in (
        (False, ("no CUDA device", "no CUDA device")),
        (True, ("built without CUDA", "pip install triton")),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        for reason, part in zip((backend._cuda_reason.__wrapped__(0), backend._triton_reason.__wrapped__()), said):
            assert part in str(reason)


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    command = [sys.executable, "-m", "steepest", "plan", "--shape", "64x64"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert running.stdout is not None
    running.stdout.close()
    _, errors = running.communicate(timeout=120)
    assert errors == b""


def test_a_file_of_tuned_tiles_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("steepest.kernels.tuned")
    (tmp_path / "file").write_text("{")
    for path, option, said in (
        ("file", "--show", "cannot be read: Expecting property name enclosed in double quotes"),
        ("", "--show", "cannot be read: Is a directory; set STEEPEST_CACHE to another file"),
        ("", "--clear", "cannot be removed: Is a directory; set STEEPEST_CACHE to another file"),
    ):
        monkeypatch.setenv("STEEPEST_CACHE", str(tmp_path / path))
        with pytest.raises(SystemExit):
            cli.main(["tune", option])
        assert f"{tmp_path / path} {said}" in capsys.readouterr().err
    monkeypatch.setenv("STEEPEST_CACHE", "~nobody-of-this-name/file")
    with pytest.raises(SystemExit):
        cli.main(["tune", "--show"])
    assert "there is no home folder" in capsys.readouterr().err
