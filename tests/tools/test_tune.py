"""`steepest tune`: which products it measures, what it keeps in its file, and who looks there. A timer stands in."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from steepest.linalg.coefficients import SCHEDULES
from steepest.linalg.newton_schulz import newton_schulz
from steepest.ops import backend, tuning
from steepest.ops.symm_gemm import Workspace
from steepest.ops.tuning import Problem
from steepest.tools import cli, tune

pytest.importorskip("triton", reason="Triton is not installed")
kernels = pytest.importorskip("steepest.kernels.symm_gemm", reason="steepest.kernels is not importable")
tuned = pytest.importorskip("steepest.kernels.tuned")

H, B, F = torch.float16, torch.bfloat16, torch.float32
H200, CAPABILITY, MULTIPROCESSORS = "NVIDIA H200", (9, 0), 132
CPU = torch.device("cpu")
PROBLEM = Problem(3, 256, 256, 512, H, symmetric=True, b_rows=False, c=False)


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the file is to be; nothing that a process remembers comes in or stays."""
    path = tmp_path / "deep" / "tuned.json"
    monkeypatch.setenv("STEEPEST_CACHE", str(path))
    forget()
    yield path
    forget()


def forget() -> None:
    for remembered in (kernels.configuration, tuned.held, tuned.note):
        remembered.cache_clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """An H200 that is there, whose products torch takes on the CPU."""
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=MULTIPROCESSORS)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: CAPABILITY)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: H200)
    monkeypatch.setattr(kernels, "product", by_torch)


def by_torch(a: Any, b: Any, c: Any, alpha: float, beta: float, gamma: float, out: Any, **options: Any) -> None:
    result = alpha * (a.float() @ b.float())
    out.copy_(result if c is None else result + beta * c)


def timer(seconds: Callable[[str], float]) -> tuning.Timer:
    return lambda calls: {name: seconds(name) for name in calls}


def chosen(problem: Problem = PROBLEM, gpu: str | None = H200, aligned: bool = True, **changes: Any) -> Any:
    """The configuration that a product takes on that GPU."""
    problem = replace(problem, **changes)
    sizes = (problem.m, problem.n, problem.k, CAPABILITY, MULTIPROCESSORS, problem.batch, problem.symmetric, aligned)
    return kernels.configuration(*sizes, problem.fp32_precision, problem.wide, gpu)


def slowest(problem: Problem = PROBLEM) -> Any:
    """A candidate that is not the model's choice."""
    listed = kernels.candidates(CAPABILITY, problem.symmetric, True, problem.fp32_precision, problem.wide)
    return next(c for c in reversed(listed) if c != chosen(problem, None))


def keep(file: Path, problem: Problem, fields: Mapping[str, Any], machine: str | None = None) -> None:
    tuned.write(file, machine or kernels.machine(H200, CAPABILITY), {str(problem): fields})
    kernels.configuration.cache_clear()


# ---- the file --------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_and_added_to(file: Path) -> None:
    assert tuned.read(file) == {}
    tuned.write(file, "one", {"p": {"x": 1}, "q": {"x": 2}})
    tuned.write(file, "two", {"p": {"x": 3}})
    tuned.write(file, "one", {"q": {"x": 4}})
    assert tuned.read(file) == {"one": {"p": {"x": 1}, "q": {"x": 4}}, "two": {"p": {"x": 3}}}
    assert tuned.fields("one", "q") == {"x": 4}
    assert tuned.fields("one", "r") is tuned.fields("three", "q") is None


def test_what_cannot_be_read_counts_as_none(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    file.parent.mkdir()
    file.write_text("[" * 100_000)
    assert tuned.held() == {}
    assert "is ignored: it is nested more deeply" in caplog.text


def test_without_a_home_nothing_is_tuned(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def unknown(_: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", unknown)
    monkeypatch.delenv("STEEPEST_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert tuned.held() == {}
    assert "there is no home folder" in caplog.text
    assert "set STEEPEST_CACHE to a file" in caplog.text
    with pytest.raises(OSError, match="there is no home folder"):
        tuned.path()


def test_what_killed_writers_left_is_swept(file: Path) -> None:
    file.parent.mkdir()
    old, new, other = (file.parent / name for name in (".tuned.json.old", ".tuned.json.new", "tuned.json.mine"))
    for each in (old, new, other):
        each.write_text("{")
    for each in (old, other):
        os.utime(each, (0, 0))
    tuned.write(file, "one", {"p": {"x": 1}})
    assert sorted(each.name for each in file.parent.iterdir()) == [".tuned.json.new", "tuned.json", "tuned.json.mine"]


def test_a_write_that_fails_leaves_the_file_as_it_was(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned.write(file, "one", {"p": {"x": 1}})
    with pytest.raises(TypeError):
        tuned.write(file, "one", {"p": {"x": object()}})

    def full(*names: Any) -> None:
        raise OSError("no space")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(OSError, match="no space"):
            tuned.write(file, "one", {"p": {"x": 2}})
    assert tuned.read(file) == {"one": {"p": {"x": 1}}}
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b'{"a": 1}', b'{"a": {"b": 1}}', b"null"], ids=repr)
def test_a_file_that_is_none_of_ours_is_ignored_and_replaced(
    file: Path, text: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    file.parent.mkdir()
    file.write_bytes(text)
    with caplog.at_level(logging.WARNING, "steepest"):
        for batch in range(1, 4):
            assert chosen(batch=batch) == chosen(gpu=None, batch=batch)
    assert len(caplog.records) == 1
    assert f"{file} is ignored" in caplog.text
    with pytest.raises(ValueError):
        tuned.read(file)
    keep(file, PROBLEM, asdict(slowest()))
    assert chosen() == slowest()


def test_a_file_that_may_not_be_read_is_ignored(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    file.mkdir(parents=True)
    assert chosen() == chosen(gpu=None)
    assert "is ignored" in caplog.text


def test_where_the_file_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("STEEPEST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuned.path() == tmp_path / "steepest" / "tuned.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuned.path() == tmp_path / ".cache" / "steepest" / "tuned.json"


# ---- who looks there -------------------------------------------------------------------------------------------------


def test_what_was_measured_counts_for_that_product_alone(file: Path) -> None:
    model, won = chosen(), slowest()
    keep(file, PROBLEM, asdict(won))
    assert chosen() == won
    assert chosen(gpu=None) == model
    others: list[dict[str, Any]] = [{"batch": 4}, {"m": 264, "n": 264}, {"k": 520}, {"symmetric": False}]
    others += [{"wide": True}, {"gpu": "NVIDIA H100"}, {"dtype": F, "precision": "tf32x3"}, {"aligned": False}]
    for change in others:
        assert chosen(**change) == chosen(**{**change, "gpu": None}), change
    assert chosen(dtype=B, a_rows=False, b_rows=True, c=True) == won


@pytest.mark.parametrize("part", ["Triton", "sm_90"])
def test_another_triton_or_architecture_measures_anew(file: Path, part: str) -> None:
    own = kernels.machine(H200, CAPABILITY)
    assert part in own
    keep(file, PROBLEM, asdict(slowest()), own.replace(part, "other"))
    assert chosen() == chosen(gpu=None)


def test_a_configuration_that_is_no_longer_listed_is_ignored(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    for fields in ({**asdict(slowest()), "stages": 9}, {"block_m": 64}, {}):
        keep(file, PROBLEM, fields)
        assert chosen() == chosen(gpu=None)
        kernels.configuration.cache_clear()
        assert chosen() == chosen(gpu=None)
    assert caplog.text.count("is not in the table") == 3


def test_the_file_is_read_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    read = tuned.read
    monkeypatch.setattr(tuned, "read", lambda path: reads.append(path) or read(path))
    for batch in range(1, 5):
        chosen(batch=batch)
    assert reads == [file]


def test_a_product_takes_what_won(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By address or by TMA, whose descriptors are made for whatever has some."""
    launches: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *arguments, **options: launches.append((arguments, options))

    monkeypatch.setattr(kernels, "product_kernel", Recorder())
    monkeypatch.setattr(kernels, "_machine", lambda device: (CAPABILITY, MULTIPROCESSORS))
    monkeypatch.setattr(kernels, "_name", lambda device: H200)
    a, out = torch.empty(3, 256, 512, dtype=H), torch.empty(3, 256, 256, dtype=H)
    for x in (a, a.new_empty(3, 512, 256).mT, a[:, :1].expand(3, 256, 512), a.new_empty(3, 256, 513)[:, :, :512]):
        won = slowest()
        assert won.tma
        keep(file, PROBLEM, asdict(won))
        kernels.product(x, x.mT, None, 1.0, 0.0, 0.0, out, symmetric=True)
    assert [options["TMA"] for _, options in launches] == [True, True, False, False]
    for (arguments, options), block in zip(launches, ([1, 64, 64], [1, 64, 64]), strict=False):
        assert (options["BLOCK_M"], options["BLOCK_N"], options["num_warps"]) == (won.block_m, won.block_n, won.warps)
        for x in arguments[:2]:
            assert x.block_shape == block
    assert (launches[0][0][0].shape, launches[0][0][0].strides) == ([3, 256, 512], [256 * 512, 512, 1])
    assert (launches[1][0][1].shape, launches[1][0][1].strides) == ([3, 512, 256], [256 * 512, 256, 1])


# ---- candidates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_candidates_add_up_in_one_order(capability: tuple[int, int]) -> None:
    """So that a matrix has the same result whichever of them wins; the model leaves TMA alone."""
    by_tma = (((9, 0), None), ((9, 0), "tf32x3"), ((10, 0), None))
    for precision, wide in ((None, False), (None, True), ("tf32", False), ("tf32x3", False), ("ieee", False)):
        listed = kernels.candidates(capability, False, True, precision, wide)
        assert len({c.block_k for c in listed}) == 1
        assert any(c.tma for c in listed) == ((capability, precision) in by_tma)
        assert {replace(c, tma=False) for c in listed if c.tma} <= set(listed)
        assert not any(c.tma for c in kernels.candidates(capability, False, False, precision, wide))
        for m in range(64, 2048, 192):
            assert not kernels.configuration(m, m, m, capability, 100, 1, False, True, precision, wide).tma


def test_products_of_a_polar_call_are_those_that_it_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As its chain calls them, on the way through `gemm`."""
    from steepest.linalg import runner

    for rows, columns, restarts in ((256, 512, (2,)), (512, 256, (2,)), (256, 256, (1, 2, 3))):
        made = []
        gemm = runner.gemm

        def record(a: Any, b: Any, c: Any = None, *, inner: Any = gemm, into: Any = made, **options: Any) -> Any:
            symmetric = options.get("symmetric", False)
            lie = {"a_rows": a.stride(-1) == 1, "b_rows": b.stride(-1) == 1}
            into.append(Problem(*a.shape[:2], b.shape[2], a.shape[2], H, symmetric, c=c is not None, **lie))
            return inner(a, b, c, **options)

        with monkeypatch.context() as patched:
            patched.setattr(runner, "gemm", record)
            x, slack = torch.randn(2, rows, columns), torch.empty(2)
            newton_schulz([x], SCHEDULES["auto"], restarts, Workspace(), eps=1e-7, slacks=[slack])
        found = tune.products([(2, rows, columns)], of=["polar"])
        assert {str(each) for each in found} == {str(each) for each in made}
        assert {(str(each), each.a_rows, each.b_rows) for each in found} <= {
            (str(each), each.a_rows, each.b_rows) for each in made
        }


def test_products_of_kronecker_factors() -> None:
    found = tune.products([(2, 256, 512), (3, 512, 512)], dtypes=[B], of=["kronecker"])
    assert [str(each) for each in found] == [
        "2 x 256 x 256 x 512, symmetric, 16 bits into fp32",
        "2 x 512 x 512 x 256, symmetric, 16 bits into fp32",
        "3 x 512 x 512 x 512, symmetric, 16 bits into fp32",
        "2 x 256 x 256 x 256, tf32x3",
        "2 x 256 x 256 x 256, symmetric, tf32x3",
        "2 x 256 x 256 x 256, tf32",
        "8 x 512 x 512 x 512, tf32x3",
        "8 x 512 x 512 x 512, symmetric, tf32x3",
        "8 x 512 x 512 x 512, tf32",
    ]
    everything = tune.products([(1, 64, 128)])
    assert len({str(each) for each in everything}) == len(everything)
    assert {each.dtype for each in everything} == {H, F}


# ---- measuring -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    "problem",
    [
        PROBLEM,
        replace(PROBLEM, symmetric=False),
        replace(PROBLEM, dtype=B, wide=True, c=True),
        Problem(1, 64, 64, 64, H, True),
    ]
    + [Problem(2, 128, 64, 192, F, precision="tf32x3"), Problem(2, 64, 64, 72, F, True, "tf32x3", a_rows=False)],
    ids=str,
)
def test_the_fastest_is_kept_and_taken(problem: Problem, file: Path) -> None:
    won = slowest(problem)
    found = tuning.measure(problem, CPU, timer(lambda name: 1.0 if name == tuning.describe(won) else 2.0), file)
    assert found is not None
    assert found.won == tuning.describe(won) != found.model == tuning.describe(chosen(problem, None))
    assert not found.left_out
    assert chosen(problem) == won
    assert json.loads(file.read_text()) == {kernels.machine(H200, CAPABILITY): {str(problem): asdict(won)}}
    assert re.search(rf"^ -> +1000000\.0 us  {re.escape(found.won)}$", tune.describe(found), re.MULTILINE)
    assert re.search(
        rf"^ +2000000\.0 us  {re.escape(found.model)} +the model's choice$", tune.describe(found), re.MULTILINE
    )


@pytest.mark.usefixtures("gpu")
def test_of_equals_the_model_decides(file: Path) -> None:
    found = tuning.measure(PROBLEM, CPU, timer(lambda name: 1.0), file)
    assert found is not None
    assert found.won == found.model
    assert chosen() == chosen(gpu=None)


@pytest.mark.usefixtures("gpu")
def test_what_is_wrong_or_does_not_run_is_left_out(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = [c for c in kernels.candidates(CAPABILITY, True) if c != chosen(gpu=None)]

    def product(*arguments: Any, chosen: Any, **options: Any) -> None:
        if chosen == listed[0]:
            raise RuntimeError("out of resources")
        by_torch(*arguments)
        if chosen == listed[1]:
            arguments[6][0, 0, 0] += 1

    monkeypatch.setattr(kernels, "product", product)
    found = tuning.measure(PROBLEM, CPU, timer(lambda name: 1.0), file)
    assert found is not None
    first, second = (tuning.describe(c) for c in listed[:2])
    assert found.left_out == {
        first: "RuntimeError: out of resources",
        second: "the result is not the same to the bit",
    }
    assert not {first, second} & set(found.seconds)
    assert f"{first}: RuntimeError" in tune.describe(found)


@pytest.mark.usefixtures("gpu")
def test_where_nothing_is_to_be_chosen(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows that are no multiple of 16 bytes have one configuration; fp64 and slow TF32 go to torch."""
    odd = replace(PROBLEM, m=255, n=255, k=511)
    assert tune.tune([odd], CPU, timer(lambda name: 1.0), file) == []
    assert not file.exists()
    assert "255 x 255 x 511, symmetric, 16 bits\n    nothing to choose\n0 of 1 products" in capsys.readouterr().out


def test_a_product_without_memory_is_passed_over(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(problem: Problem, *_: Any) -> None:
        if problem.batch == 1000:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(tuning, "measure", measure)
    assert tune.tune([replace(PROBLEM, batch=1000), PROBLEM], CPU, timer(lambda name: 1.0), file) == []
    assert "1000 x 256 x 256 x 512, symmetric, 16 bits\n    not measured: no memory" in capsys.readouterr().out


def test_torch_multiplies_fp32_where_tf32_is_no_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert Problem(1, 64, 64, 64, F, precision="tf32").candidates(CPU) == []
    assert len(Problem(1, 64, 64, 64, H).candidates(CPU)) > 1


# ---- the command -----------------------------------------------------------------------------------------------------


def stopped(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as error:
        cli.main(["tune", *arguments])
    assert error.value.code == 2
    return capsys.readouterr().err


def test_errors(file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "triton_reason", lambda: "no CUDA device; `nvidia-smi` shows one")
    message = stopped("--shape", "64x64", capsys=capsys)
    assert "tune measures on a GPU, with Triton, and cannot here: no CUDA device; `nvidia-smi` shows one" in message
    assert "nothing to tune for: pass --shape 24x1024x4096 or --model" in stopped(capsys=capsys)
    assert "shapes '64' are not known" in stopped("--shape", "64", capsys=capsys)
    assert "rounds are at least 1, got 0" in stopped("--shape", "64x64", "--rounds", "0", capsys=capsys)
    assert "invalid choice: 'gpt9'" in stopped("--model", "gpt9", capsys=capsys)
    monkeypatch.setattr(backend, "triton_reason", lambda: None)
    assert "preset 'svd' has no products" in stopped("--shape", "64x64", "--preset", "svd", capsys=capsys)
    assert not file.exists()


@pytest.mark.usefixtures("gpu")
def test_a_run(file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "triton_reason", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    device = torch.device
    monkeypatch.setattr(torch, "device", lambda *of: CPU if of == ("cuda", 0) else device(*of))
    asked = []

    def seconds(calls: Mapping[str, Any], rounds: int, device: str) -> dict[str, float]:
        asked.append((rounds, device))
        return {name: float(len(calls) - i) for i, name in enumerate(calls)}

    monkeypatch.setattr(tune, "_seconds", seconds)
    assert cli.main(["tune", "--shape", "2x64x128", "--of", "polar", "--rounds", "3", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["file"] == str(file)
    assert [each["product"] for each in printed["products"]] == [
        str(x) for x in tune.products([(2, 64, 128)], of=["polar"])
    ]
    assert {each["product"].rsplit(", ", 1)[1] for each in printed["products"]} == {"16 bits"}
    assert set(asked) == {(3, "cpu")}
    assert cli.main(["tune", "--show", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert set(shown[kernels.machine(H200, CAPABILITY)]) == {each["product"] for each in printed["products"]}
    assert cli.main(["tune", "--show"]) == 0
    assert kernels.machine(H200, CAPABILITY) in capsys.readouterr().out
    for text in ("is removed", "was not there"):
        assert cli.main(["tune", "--clear"]) == 0
        assert f"{file} {text}" in capsys.readouterr().out
    assert cli.main(["tune", "--show"]) == 0
    assert "holds nothing" in capsys.readouterr().out


@pytest.mark.slow
def test_the_timer_times_every_call_interleaved() -> None:
    made: list[str] = []
    found = tune._seconds({name: lambda name=name: made.append(name) for name in "ab"}, rounds=4, device="cpu")
    assert set(found) == {"a", "b"}
    assert made[-8:] == list("abbaabba")


@pytest.mark.slow
@pytest.mark.gpu
def test_on_a_gpu(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every candidate runs and gives the bits of the model's choice, and products take what won."""
    assert cli.main(["tune", "--shape", "2x256x512", "--rounds", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["products"]
    assert found
    assert {each["product"]: each["left_out"] for each in found if each["left_out"]} == {}
    a, out = torch.randn(2, 256, 512, device="cuda", dtype=H), torch.empty(2, 256, 256, device="cuda", dtype=H)
    taken = tuning.describe(kernels._choose(a, 256, True, True, None, False))
    assert taken == next(each["won"] for each in found if each["product"] == "2 x 256 x 256 x 512, symmetric, 16 bits")
    kernels.product(a, a.mT, None, 1.0, 0.0, 0.0, out, symmetric=True)
    torch.testing.assert_close(out.float(), a.float() @ a.float().mT, rtol=1e-3, atol=5e-2)
