"""bench/gpu.sh as far as it goes without a GPU: its commands, which all parse, and what becomes of those that fail,
hang or crash, in a repository of its own with a torch that is none."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from steepest.tools import bench, cli

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "bench" / "gpu.py"
STEPS = ["build", "doctor", "sanitizer", "tests", "bench", "compiled"]


def script(*arguments: object, file: Path = SCRIPT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(file), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], **environment},
    )


@pytest.fixture(scope="module")
def gpu() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def commands(*arguments: object, **environment: str) -> list[tuple[str, int, list[str]]]:
    """Step with name, seconds, and words after `env`."""
    done = script(*arguments, "--dry-run", PYTHON="some-python", **environment)
    assert done.returncode == 0, done.stderr
    lines = [line.split(": timeout ", 1) for line in done.stdout.splitlines() if line]
    words = [(name, shlex.split(rest)) for name, rest in lines]
    assert all(each[:2] == ["--signal=INT", "--kill-after=10"] and each[3] == "env" for _, each in words)
    return [(name, int(each[2]), each[4:]) for name, each in words]


# ---- what is run ---------------------------------------------------------------------------------------------------


def test_the_order(tmp_path: Path, gpu: types.ModuleType) -> None:
    names = [name for name, _, _ in commands(tmp_path / "results")]
    steps = [name.split()[0] for name in names]
    assert list(dict.fromkeys(steps)) == STEPS == list(gpu.STEPS)
    tests = [name.split()[1] for name in names if name.startswith("tests ")]
    assert tests[:2] == ["tests/kernels/test_gpu.py", "tests/kernels/test_grouped_gemm.py"]
    assert tests[-2:] == ["tests/tools/bench/test_suites.py", "tests/tools/test_tune.py"]
    assert not (tmp_path / "results").exists()
    for words in (("tests", "doctor", "--quick"), ("--quick", "tests", "--jobs", 2, "doctor")):
        asked = commands(tmp_path, *words)
        assert list(dict.fromkeys(name.split()[0] for name, _, _ in asked)) == ["doctor", "tests"]


@pytest.mark.parametrize("quick", [(), ("--quick",)])
def test_every_benchmark_parses(
    quick: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: types.ModuleType
) -> None:
    """A process for each suite, without torch.compile; with it at shapes that there are."""
    seen: list[argparse.Namespace] = []
    monkeypatch.setattr(bench, "run", lambda options: seen.append(options) or 0)
    for name, seconds, words in commands(tmp_path, "bench", "compiled", *quick, MODELS="tiny small"):
        assert words[:4] == ["some-python", "-m", "steepest", "bench"]
        assert cli.main(words[3:]) == 0
        options = seen[-1]
        assert options.suites == [name.split()[1]]
        assert options.device == "cuda"
        assert options.out == tmp_path
        assert options.quick == bool(quick)
        assert options.compiled == name.startswith("compiled")
        assert options.budget <= 0.75 * (seconds + 1)
        if name.split() in (["bench", "step"], ["bench", "memory"], ["bench", "launch"]):
            assert options.whole
            assert options.shapes == (["tiny"] if quick else ["tiny", "small"])
        settings = settings_of(options, monkeypatch)
        assert list(bench.command.SUITES[options.suites[0]](settings))
    assert [options.name for options in seen] == [*gpu.SUITES, *(f"{suite}-compiled" for suite in gpu.COMPILED)]
    assert sorted(gpu.SUITES) == sorted(bench.command.SUITES)


def settings_of(options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch) -> bench.command.Settings:
    monkeypatch.setattr(bench.command.torch.cuda, "is_available", lambda: True)
    return bench.command._settings(options)


@pytest.mark.slow
def test_files_without_a_test_for_a_gpu_are_not_imported(gpu: types.ModuleType) -> None:
    """All that are named have some; collecting them is a matter of seconds, of the whole suite it is not."""
    files = gpu.gpu_files()
    assert 10 < len(files) < 30
    words = [*commands("anywhere", "tests")[0][2]]
    assert words[words.index("pytest") + 1 : words.index("pytest") + 4] == ["-v", "-m", "gpu"]
    collect = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--collect-only", "-p", "no:cacheprovider", *files]
    done = subprocess.run(collect, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    for file in files:
        assert f"{file}::" in done.stdout


@pytest.mark.parametrize(("arguments", "minutes"), [((), 9), (("--quick",), 3)])
def test_it_ends_in_time(arguments: tuple[str, ...], minutes: int, tmp_path: Path) -> None:
    """No process may take more than is left, and those after one another no more together, with ten seconds to end."""
    found = commands(tmp_path, "sanitizer", "tests", "bench", "compiled", *arguments)
    left = 60 * minutes
    for name, seconds, _ in found:
        assert seconds + 10 <= left
        left -= 0 if name.startswith("tests") else seconds
    tests = max(seconds for name, seconds, _ in found if name.startswith("tests"))
    assert left >= tests
    train = next(seconds for name, seconds, _ in found if name == "bench train")
    assert train >= 0.08 * 60 * minutes


def test_a_build_for_elsewhere(tmp_path: Path) -> None:
    """On a machine without a GPU, and without an end to its time; there no GPU is asked what it is."""
    ((name, seconds, words),) = commands(tmp_path, "build", "--for", "9.0a", "--site", tmp_path / "site")
    assert name == "build package"
    assert seconds > 3600
    assert words[:2] == ["STEEPEST_CUDA=1", "TORCH_CUDA_ARCH_LIST=9.0a"]
    assert words[words.index("--target") + 1] == str(tmp_path / "site")
    pip = subprocess.run([sys.executable, "-m", "pip", "install", "--help"], capture_output=True, text=True)
    if pip.returncode == 0:
        options = [word for word in words[words.index("install") :] if word.startswith("--")]
        assert all(word in pip.stdout for word in options)


def test_a_build_is_for_the_gpu_at_hand(tmp_path: Path) -> None:
    """Whatever the image presets."""
    ((_, _, words),) = commands(tmp_path, "build", TORCH_CUDA_ARCH_LIST="7.5 8.0 9.0+PTX")
    assert words[1] == "TORCH_CUDA_ARCH_LIST=of-the-device"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: RESULTS"),
        (["a", "--fast"], "unrecognized arguments: --fast"),
        (["a", "--limit", "nan"], "--limit is a number of seconds above 0, got nan"),
        (["a", "--jobs", "0"], "--jobs is at least 1, got 0"),
        (["a", "dance"], "step 'dance' is not known; choose from build, doctor, sanitizer, tests, bench, compiled"),
    ],
)
def test_what_is_not_taken(arguments: list[str], message: str) -> None:
    done = script(*arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_from_the_shell(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(SCRIPT.with_suffix(".sh")), str(tmp_path), "doctor", "--dry-run"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable},
    )
    assert done.returncode == 0, done.stderr
    assert f"{sys.executable} -m steepest doctor" in done.stdout


# ---- what becomes of it --------------------------------------------------------------------------------------------

MARK = "@pytest.mark." + "gpu"  # in one piece it would make this file one with tests for a GPU
TESTS = {
    "kernels/test_gpu.py": "def test_good(): pass",
    "test_fails.py": "def test_good(): pass\n{mark}\ndef test_bad(): assert 1 == 2",
    "test_hangs.py": "def test_good(): pass\n{mark}\ndef test_slow(): time.sleep(600)\n{mark}\ndef test_slower(): pass",
    "kernels/test_deaf.py": "def test_deaf():\n    signal.signal(signal.SIGINT, signal.SIG_IGN)\n    time.sleep(600)",
    "test_crashes.py": (
        "def test_good(): pass\n{mark}\ndef test_crash():\n    os.write(2, b'what(): no')\n    os.abort()\n"
        "{mark}\n@pytest.mark.parametrize('x', ['a b', 'c'])\ndef test_crash_not(x): pass"
    ),
    "test_sticky.py": "def test_breaks(): torch.cuda.broken = True\n{mark}\ndef test_good(): pass",
    "test_import.py": "def test_good(): pass\nraise ImportError('no such library')",
}
TORCH = """
import types
__version__, version = "0.0", types.SimpleNamespace(cuda="13.0")
float32, bfloat16 = "fp32", "bf16"
backends = types.SimpleNamespace(cpu=types.SimpleNamespace(get_cpu_capability=lambda: "none"))
set_num_threads, get_num_threads, empty = (lambda n: None), (lambda: 1), (lambda *_, device: device)
manual_seed = set_num_threads
class cuda:
    broken = False
    is_available, get_device_name = (lambda: True), (lambda: "a GPU that is not there")
    def synchronize():
        if cuda.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\\nmore")
"""
#: `python -m steepest bench SUITE` of each kind.
STEEPEST = """
import json, os, pathlib, sys, time
words = sys.argv[1:]
print(*words)
if words[0] == "bench":
    name, out = words[words.index("--name") + 1], pathlib.Path(words[words.index("--out") + 1])
    rows = [{"status": "ok"}, {"ours": True, "case": "2x2", "variant": "mine", "status": "WRONG"}]
    rows += [{"status": "skipped: out of time, --budget 1"}]
    if name == "refresh":
        sys.exit("no such thing")
    (out / f"{name}.json").write_text(json.dumps({"rows": rows if name == "polar" else rows[:1]}))
    if name == "step":
        os.abort()
    if name == "launch":
        time.sleep(600)
    sys.exit(int(name == "polar"))
"""
HOPPER = "the products for Hopper were not built"


@pytest.fixture
def repository(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the script of a repository with these tests and this torch, in less time, on the folder `results`."""
    source = SCRIPT.read_text()
    for name, seconds in (("GRACE", 2), ("FILE_SECONDS", 15)):
        line = next(line for line in source.splitlines() if line.startswith(f"{name} = "))
        source = source.replace(line, f"{name} = {seconds}")
    files = {f"tests/{name}": "import os, signal, time, pytest, torch\n{mark}\n" + text for name, text in TESTS.items()}
    files = {name: text.format(mark=MARK) for name, text in files.items()}
    files["tests/test_other.py"] = "raise ImportError('of no concern')"
    files["pyproject.toml"] = '[tool.pytest.ini_options]\nmarkers = ["gpu: ..."]\naddopts = "-ra"\n'
    files |= {"bench/gpu.py": source, "site/torch.py": TORCH, "site/steepest/__init__.py": ""}
    files |= {"site/steepest/__main__.py": STEEPEST, "site/steepest/ops/__init__.py": ""}
    reason = "cuda_reason = triton_reason = lambda: None"
    files["site/steepest/ops/backend.py"] = f"import types\nextension, forced = None, 'auto'\n{reason}"
    files |= {
        f"site/steepest/linalg/{name}.py": "compute_dtype, cpu_bf16 = (lambda *_: 'fp32'), ''"
        for name in ("__init__", "polar")
    }
    files["site/steepest/ops/polar_chain.py"] = f"hopper_reason = lambda x: '{HOPPER}'"
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path / "tests" / "conftest.py")

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        options = ("--site", tmp_path / "site", "--pack", tmp_path / "pack", "--jobs", 8)
        return script(tmp_path / "results", *arguments, *options, file=tmp_path / "bench" / "gpu.py")

    return run


def packed(tmp_path: Path) -> set[str]:
    assert sorted(path.name for path in (tmp_path / "pack").iterdir()) == ["results.tar.gz", "summary.txt"]
    with tarfile.open(tmp_path / "pack" / "results.tar.gz") as tar:
        return set(tar.getnames())


def lines(tmp_path: Path) -> dict[str, str]:
    """What the summary says, by the second word of a line."""
    text = (tmp_path / "pack" / "summary.txt").read_text()
    assert text == (tmp_path / "results" / "summary.txt").read_text()
    found = [line.split(None, 2) for line in text.splitlines() if line.startswith(("tests ", "bench ", "doctor "))]
    return {words[1]: words[2] for words in found}


@pytest.mark.slow
def test_what_fails_hangs_or_crashes_leaves_the_others(
    tmp_path: Path, repository: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = repository("tests", "--limit", 90)
    assert done.returncode == 1, done.stderr
    said, text = lines(tmp_path), (tmp_path / "results" / "summary.txt").read_text()
    wanted = {
        "kernels/test_gpu.py": "1 passed",
        "test_fails.py": "1 passed, 1 failed",
        "test_hangs.py": "2 passed, 1 stopped",
        "kernels/test_deaf.py": "1 stopped",
        "test_crashes.py": "3 passed, 1 stopped",
        "test_sticky.py": "2 passed",
        "test_import.py": "not run to its end: failed with 2",
    }
    assert {name.removeprefix("tests/"): line.rsplit(", ", 1)[0] for name, line in said.items()} == wanted
    for note in (
        "FAILED tests/test_fails.py::test_bad - assert 1 == 2",
        "out of time: tests/test_hangs.py::test_slow\n",
        "out of time: tests/kernels/test_deaf.py::test_deaf",
        "crashed: SIGABRT: tests/test_crashes.py::test_crash\n",
        "the GPU is in error after tests/test_sticky.py::test_breaks: CUDA error: an illegal memory access was",
        "ERROR tests/test_import.py",
        "E   ImportError: no such library",
        f"the headline route is not measured: {HOPPER}",
        "gpu: a GPU that is not there",
        "not run: bench, not asked for",
    ):
        assert note in text, text
    names = packed(tmp_path)
    assert {"summary.txt", "machine.json"} < names
    # Interrupted, pytest still writes what it knows; the tests that were left over are in the second report.
    first, second = (
        ElementTree.parse(tmp_path / "results" / "logs" / f"tests-tests.test_hangs.py{more}.xml") for more in ("", "-2")
    )
    assert "test_good" in [case.get("name") for case in first.iter("testcase")]  # beside one that did not end
    assert [case.get("name") for case in second.iter("testcase")] == ["test_slower"]
    assert {"logs/tests-tests.test_hangs.py.log", "logs/tests-tests.test_hangs.py.xml"} < names


@pytest.mark.slow
def test_a_suite_that_fails_hangs_or_crashes_leaves_the_others(
    tmp_path: Path, repository: Callable[..., subprocess.CompletedProcess[str]], gpu: types.ModuleType
) -> None:
    (tmp_path / "results").mkdir()
    stale = tmp_path / "results" / "refresh.json"
    stale.write_text(json.dumps({"rows": [{"status": "ok"}]}))
    os.utime(stale, (0, 0))
    done = repository("doctor", "bench", "--limit", 100)
    assert done.returncode == 1
    said = {name: line.rsplit(", ", 1)[0] for name, line in lines(tmp_path).items()}
    rest = dict.fromkeys(("symm_gemm", "small", "fused", "memory", "train"), "ok; 1 rows")
    wanted = {"polar": "failed with 1; 1 rows, 1 cases not begun", "step": "crashed: SIGABRT; 1 rows"}
    assert {name: said[name] for name in gpu.SUITES} == {
        **wanted,
        **rest,
        "refresh": "failed with 1",
        "launch": "out of time; 1 rows",
    }
    assert said["doctor"] == said["plan"] == "ok"
    text = (tmp_path / "results" / "summary.txt").read_text()
    assert "2x2  mine: WRONG" in text
    assert "no such thing" in text
    names = packed(tmp_path)
    assert {"polar.json", "step.json", "launch.json", "train.json"} < names
    assert "refresh.json" not in names


@pytest.mark.slow
def test_what_is_stopped_is_packed(
    tmp_path: Path, repository: Callable[..., subprocess.CompletedProcess[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a signal, in the middle of a test: with all that runs ended."""
    started: list[subprocess.Popen[str]] = []

    def start(command: list[str], **more: object) -> subprocess.CompletedProcess[str]:
        process = subprocess.Popen(command, text=True, env=more["env"], stdout=-3, stderr=-3)  # type: ignore[call-overload]
        started.append(process)
        begun = tmp_path / "results" / "logs" / "tests-tests.test_hangs.py.begun"
        until = time.monotonic() + 30
        while not (begun.exists() and "test_slow" in begun.read_text()) and time.monotonic() < until:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        process.wait(20)
        return subprocess.CompletedProcess(command, process.returncode)

    monkeypatch.setattr(subprocess, "run", start)
    done = repository("tests", "bench", "--limit", 200)
    assert done.returncode != 0
    assert "logs/tests-tests.test_hangs.py.log" in packed(tmp_path)
    assert "not run: bench, stopped before it" in (tmp_path / "pack" / "summary.txt").read_text()


@pytest.fixture
def run(tmp_path: Path, gpu: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    monkeypatch.setattr(gpu, "PART_BYTES", 1000)
    monkeypatch.setattr(gpu, "LOG_BYTES", 3000)
    options = gpu.parse([str(tmp_path / "results"), "--pack", str(tmp_path / "pack")])
    made = gpu.Run(options)
    made.logs.mkdir(parents=True)
    return made


def test_much_is_packed_in_parts(tmp_path: Path, run: object) -> None:
    """And of a long log its end."""
    noise = os.urandom(3000).hex().encode()
    (tmp_path / "results" / "logs" / "long.log").write_bytes(noise)
    run.pack()  # type: ignore[attr-defined]
    parts = sorted((tmp_path / "pack").glob("results.tar.gz.*"))
    assert [part.name for part in parts] == [f"results.tar.gz.{i:02}" for i in range(len(parts))]
    assert len(parts) > 1
    whole = tmp_path / "whole.tar.gz"
    whole.write_bytes(b"".join(part.read_bytes() for part in parts))
    with tarfile.open(whole) as tar:
        found = tar.extractfile("logs/long.log")
        assert found is not None
        assert found.read() == b"(its beginning is left out)\n" + noise[-3000:]
    (tmp_path / "results" / "logs" / "long.log").unlink()
    run.pack()  # type: ignore[attr-defined]
    assert sorted(p.name for p in (tmp_path / "pack").iterdir()) == ["results.tar.gz", "summary.txt"]


@pytest.mark.parametrize("into", [".", "results", "results/packed"])
def test_packing_beside_the_results_leaves_nothing_out(tmp_path: Path, gpu: types.ModuleType, into: str) -> None:
    """`--pack .` with RESULTS below, or RESULTS itself; of an earlier archive nothing."""
    made = gpu.Run(gpu.parse([str(tmp_path / "results"), "--pack", str(tmp_path / into)]))
    made.logs.mkdir(parents=True)
    (made.logs / "some.log").write_text("what a process said")
    for _ in range(2):
        made.pack()
    with tarfile.open(tmp_path / into / "results.tar.gz") as tar:
        assert "logs/some.log" in tar.getnames()
        assert not [name for name in tar.getnames() if "tar.gz" in name]


@pytest.mark.slow
def test_another_build_than_the_one_asked_for_is_named(tmp_path: Path) -> None:
    """What is measured is not at --site: nothing is there, and Python finds a package elsewhere."""
    site, elsewhere = tmp_path / "site", ROOT / "python"
    done = script(tmp_path, "bench", "--site", site, PYTHON=sys.executable, PYTHONPATH=str(elsewhere))
    assert done.returncode == 1
    assert f"not the build at {site}, where there is none: another one is run and measured" in done.stdout
    assert str(elsewhere / "steepest" / "__init__.py") in done.stdout


@pytest.mark.slow
def test_the_error_of_a_build_is_in_the_summary(tmp_path: Path) -> None:
    """Before pip's last lines, which name none."""
    done = script(tmp_path, "build", "--for", "Hopper", "--site", tmp_path / "site", PYTHON=sys.executable)
    if "No module named pip" in done.stdout:
        pytest.skip("pip is not installed")
    assert "RuntimeError: TORCH_CUDA_ARCH_LIST: 'Hopper' is not an architecture; write it as 8.0, 9.0a" in done.stdout


@pytest.mark.slow
def test_without_a_gpu_nothing_is_said_to_be_measured(tmp_path: Path) -> None:
    """This machine's torch, where it sees none: every step but the doctor's says so."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = script(tmp_path, "bench", "--site", ROOT / "python", PYTHON=sys.executable)
    assert done.returncode == 1
    assert "bench" in done.stdout
    assert "not run: torch sees no GPU here" in done.stdout
    failed = script(tmp_path, "build", PYTHON=sys.executable)
    assert failed.returncode == 1
    assert "no GPU here; name its capability, as in --for 9.0a" in failed.stdout
