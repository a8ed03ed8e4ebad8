"""The build: what setup.py decides, what the binary says of itself, what it needs to load, and its host-only plans."""

from __future__ import annotations

import ctypes.util
import hashlib
import importlib
import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import steepest
from steepest.ops import backend, multi_tensor, selfcheck
from steepest.ops.extension import Extension
from steepest.tools import cli, facts
from support.problems import FEW

ROOT = Path(__file__).resolve().parents[2]
_C: Any = importlib.import_module("steepest._C") if importlib.util.find_spec("steepest._C") else None
needs_module = pytest.mark.skipif(_C is None, reason="only an editable build has steepest._C")
needs_extension = pytest.mark.skipif(backend.extension is None, reason=f"{backend.extension_reason}")


@pytest.fixture(scope="module")
def build() -> types.ModuleType:
    """setup.py as a module: it runs setup() only as a script."""
    pytest.importorskip("setuptools", reason="setuptools is not installed")
    spec = importlib.util.spec_from_file_location("steepest_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def extension() -> Extension:
    assert backend.extension is not None
    return backend.extension


@needs_extension
def test_a_binary_of_other_sources_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_interface", lambda: "0" * 64)
    assert backend._load_extension() == (
        None,
        "the compiled part is not of these sources; run `pip install --no-build-isolation -e .` again",
    )


def test_a_binary_that_does_not_load_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(backend, "LIBRARY", tmp_path / "libsteepest.so")
    assert backend._load_extension() == (
        None,
        "the compiled part is not built; run `pip install --no-build-isolation .` in the source tree",
    )
    (tmp_path / "libsteepest.so").write_bytes(b"of another machine")
    module, reason = backend._load_extension()
    assert module is None
    assert reason is not None
    assert reason.startswith("the compiled part does not load (")
    assert reason.endswith(f"); rebuild it against torch {torch.__version__}")


@needs_extension
@pytest.mark.parametrize("share", [0.001, 0.1, 0.999])
def test_a_binary_that_is_cut_off_is_a_reason(share: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And not the end of the process, which is what its missing pages would be to the loader."""
    whole = backend.LIBRARY.read_bytes()
    monkeypatch.setattr(backend, "LIBRARY", tmp_path / "libsteepest.so")
    backend.LIBRARY.write_bytes(whole[: int(share * len(whole))])
    module, reason = backend._load_extension()
    assert module is None
    assert reason is not None
    assert "is cut off" in reason


def test_a_library_that_is_another_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no error of `import steepest`."""
    name = ctypes.util.find_library("m")
    if name is None:
        pytest.skip("there is no libm to take for it")
    monkeypatch.setattr(backend, "LIBRARY", Path(name))
    monkeypatch.setattr(Path, "exists", lambda self: True)
    module, reason = backend._load_extension()
    assert module is None
    assert reason is not None
    assert reason.startswith("the compiled part is not of these sources; run")


# ---- setup.py


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what packaging reads, so that nothing is written into the sources."""
    pytest.importorskip("setuptools", minversion="77", reason="setuptools>=77 is not installed")
    copy = tmp_path / "tree"
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*_cache")
    for name in ("python", "kernels", "csrc", "docs", "licenses", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=unwanted)
    for name in (
        "setup.py",
        "pyproject.toml",
        "MANIFEST.in",
        "CMakeLists.txt",
        "LICENSE",
        "README.md",
        ".clang-format",
    ):
        shutil.copy(ROOT / name, copy)
    # What a checkout that has been worked in holds.
    for name in (
        "python/steepest/_C.cpython.so",
        "python/steepest/libsteepest.so",
        "tests/__pycache__/old.pyc",
        "tests/.mypy_cache/3.10/cache.db",
    ):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).touch()
    return copy


def python(tree: Path, *arguments: str) -> str:
    """Standard output of this Python run in the tree, where importing torch fails."""
    trap = tree.parent / "trap" / "torch" / "__init__.py"
    trap.parent.mkdir(parents=True, exist_ok=True)
    trap.write_text("raise AssertionError('packaging imported torch')")
    environment = {**os.environ, "STEEPEST_CUDA": "0", "PYTHONPATH": str(trap.parents[1])}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_metadata_does_not_import_torch(tree: Path) -> None:
    assert python(tree, "setup.py", "--version").split()[-1] == steepest.__version__
    hook = "from setuptools import build_meta; print(build_meta.prepare_metadata_for_build_wheel('.'))"
    metadata = tree / python(tree, "-c", hook).split()[-1] / "METADATA"
    assert f"\nVersion: {steepest.__version__}\n" in metadata.read_text()


def test_a_wheel_holds_the_packages_and_nothing_else(tree: Path) -> None:
    python(tree, "setup.py", "-q", "build_py", "--build-lib", str(tree / "out"))
    wanted = {f"steepest/{path.relative_to(ROOT / 'python/steepest')}" for path in ROOT.glob("python/steepest/**/*.py")}
    wanted |= {f"steepest/kernels/{path.name}" for path in ROOT.glob("kernels/*.py")}
    assert files(tree / "out") == wanted | {"steepest/py.typed"}


@pytest.fixture
def compilerless(tree: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tree, with a cmake that takes this build's library for what it compiled."""
    trap = tree.parent / "trap"
    for name in ("CMAKE_BIN_DIR", "BIN_DIR"):
        package = trap / name.partition("_")[0].lower().replace("bin", "ninja")
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(f"{name} = {str(trap / 'bin')!r}\n")
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    script(trap / "bin" / "ninja", "")
    script(
        trap / "bin" / "cmake",
        f'case $1 in -S) mkdir -p "$4" ;; --build) cp {extension().path} "$2"; touch "$2/_C{suffix}" ;; esac',
    )
    (trap / "torch").mkdir()
    (trap / "torch" / "version.py").write_text("__version__ = '2.10.0'\n")
    monkeypatch.setenv("CXX", "sh")
    return tree


def check_wheel() -> types.ModuleType:
    """.ci/check_wheel.py."""
    spec = importlib.util.spec_from_file_location("check_wheel", ROOT / ".ci" / "check_wheel.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_extension
@pytest.mark.slow
def test_a_wheel_is_for_every_python(compilerless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the library and the package, not with what an earlier wheel had or what only developers look into."""
    old = compilerless / "python" / "steepest" / "old.py"
    old.touch()
    for local in ("", "cu130"):
        monkeypatch.setenv("STEEPEST_LOCAL_VERSION", local)
        python(compilerless, "setup.py", "-q", "bdist_wheel")
        old.unlink(missing_ok=True)
    with_old, wheel = sorted((compilerless / "dist").iterdir(), key=lambda path: "+cu130" in path.name)
    assert with_old.name.startswith(f"steepest-{steepest.__version__}-py3-none-linux_")
    assert wheel.name.startswith(f"steepest-{steepest.__version__}+cu130-py3-none-linux_")
    check_wheel().check(wheel)
    with pytest.raises(AssertionError, match="too many: \\['steepest/old.py'\\], too few: \\[\\]"):
        check_wheel().check(with_old)


@needs_extension
def test_an_editable_build_has_the_module_for_developers(compilerless: Path) -> None:
    for path in (compilerless / "python" / "steepest").glob("*.so"):
        path.unlink()
    python(compilerless, "setup.py", "-q", "build_ext", "--inplace")
    built = {path.name for path in (compilerless / "python" / "steepest").glob("*.so")}
    assert built == {"libsteepest.so", f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"}


@needs_module
def test_no_source_sees_torchs_headers_and_pybind11(build: types.ModuleType, tmp_path: Path) -> None:
    """torch 2.11 has a pybind11 among its headers that is an error beside the stable ABI."""
    torch_folder, folder = tmp_path / "torch", tmp_path / "build"
    configure(build, folder, torch_folder)
    commands = {
        Path(each["file"]): each["command"] for each in json.loads((folder / "compile_commands.json").read_text())
    }
    with_torch = {path for path, command in commands.items() if f"-isystem {torch_folder}/include" in command}
    with_pybind11 = {path for path in commands if "#include <pybind11/" in path.read_text()}
    assert with_pybind11 == {ROOT / "csrc" / "module.cpp"}
    assert ROOT / "csrc" / "library.cpp" in with_torch
    assert not with_torch & with_pybind11


@needs_module
def test_a_shell_can_read_the_commands_of_a_folder_with_an_apostrophe(build: types.ModuleType, tmp_path: Path) -> None:
    """pybind11 has symbols stripped in one that it cannot."""
    folder = tmp_path / "it's a build"
    configure(build, folder, tmp_path / "torch")
    lines = (folder / "build.ninja").read_text().splitlines()
    commands = [line.partition(" = ")[2] for line in lines if re.match(r"  (COMMAND|PRE_LINK|POST_BUILD) = ", line)]
    assert commands
    for command in commands:
        read = subprocess.run(["sh", "-n", "-c", command.replace("$ ", " ").replace("$$", "$")], capture_output=True)
        assert read.returncode == 0, (command, read.stderr)


def configure(build: types.ModuleType, folder: Path, torch_folder: Path) -> None:
    """CMake's files for a build of all but CUDA in a folder."""
    pybind11 = importlib.import_module("pybind11")
    options = {
        "CMAKE_EXPORT_COMPILE_COMMANDS": "ON",
        "CMAKE_MAKE_PROGRAM": build.find_tool("ninja"),
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "STEEPEST_TORCH": str(torch_folder),
    }
    command = [build.find_tool("cmake"), "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"]
    subprocess.run([*command, *(f"-D{name}={value}" for name, value in options.items())], check=True, timeout=120)


def test_an_archive_of_the_sources_holds_what_it_needs(tree: Path) -> None:
    python(tree, "setup.py", "-q", "sdist", "--formats=gztar")
    (archive,) = (tree / "dist").iterdir()
    with tarfile.open(archive) as held:
        names = {name.partition("/")[2] for name in held.getnames()}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert sources | {"CMakeLists.txt", ".clang-format", "README.md", "docs/routing.md", "tests/conftest.py"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc")) or "_cache" in name]


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout, whose files git knows")
def test_an_archive_of_the_sources_is_what_git_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder where somebody has worked; what an older build has left is not in it, and a stray file is noticed."""
    pytest.importorskip("setuptools", minversion="77", reason="setuptools>=77 is not installed")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    copy = tmp_path / "tree"
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    (copy / "python/steepest.egg-info").mkdir()
    (copy / "python/steepest.egg-info/SOURCES.txt").write_text("setup.py\nold.py\n")
    for name in ("old.py", "docs/notebooks/copy.ipynb", "build/wheel/a.whl", "python/steepest/libsteepest.so"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).touch()
    wheels = check_wheel()
    for stray in (None, "tests/stray.py"):
        if stray:
            (copy / stray).touch()
        shutil.rmtree(copy / "dist", ignore_errors=True)
        python(copy, "setup.py", "-q", "sdist", "--formats=gztar")
        (archive,) = (copy / "dist").iterdir()
        if stray is None:
            wheels.check_sources(archive)
    with pytest.raises(AssertionError, match="too many: \\['tests/stray.py'\\]"):
        wheels.check_sources(archive)


def test_the_description_has_no_link_into_a_folder(build: types.ModuleType) -> None:
    """Links and pictures lead to the sources where pyproject.toml says where these are; else words alone are left."""
    text = (
        "![a picture](docs/a.png)\nSee [the\npage](docs/a.md#part), [arXiv](https://arxiv.org/abs/1) and [below](#b)."
    )
    plain = "\nSee the\npage, [arXiv](https://arxiv.org/abs/1) and [below](#b)."
    assert build.long_description(text, '[project.urls]\nPaper = "https://arxiv.org"\n', "1.2.3") == plain
    there = build.long_description(text, '[project.urls]\nSource = "https://host.example/us/steepest/"\n', "1.2.3")
    assert there == (
        "![a picture](https://host.example/us/steepest/raw/v1.2.3/docs/a.png)\n"
        "See [the\npage](https://host.example/us/steepest/blob/v1.2.3/docs/a.md#part), "
        "[arXiv](https://arxiv.org/abs/1) and [below](#b)."
    )


def test_the_version_is_written_in_one_place() -> None:
    """No other file of the package, of packaging or of the site says it."""
    version = re.escape(steepest.__version__)
    told = [path for path in (ROOT / "python").rglob("*.py") if re.search(rf"['\"]{version}['\"]", path.read_text())]
    assert told == [ROOT / "python" / "steepest" / "_version.py"]
    for name in (
        "pyproject.toml",
        "setup.py",
        "CMakeLists.txt",
        "CITATION.cff",
        "conda/meta.yaml",
        "docs/conf.py",
        "Makefile",
    ):
        text = (ROOT / name).read_text()
        assert not re.search(rf"(?<![\d.]){version}(?![\d.])", text), name
    assert f"## {steepest.__version__} (" in (ROOT / "CHANGELOG.md").read_text()


def test_an_issue_comes_with_what_doctor_prints() -> None:
    for name in ("bug", "slow"):
        _, doctor, rest = (ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text().partition("id: doctor\n")
        assert doctor
        assert "`steepest doctor` prints" in rest
        assert "required: true" in rest


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_what_the_host_reads_is_yaml(path: Path) -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    read = yaml.safe_load(path.read_text())
    assert isinstance(read, dict)
    for job in read.get("jobs", {}).values():
        assert job["steps"]
        assert job["runs-on"]


def workflow_jobs() -> dict[str, Any]:
    """The jobs of all workflows, by their file and name."""
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    files = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    return {f"{f.name} {name}": job for f in files for name, job in yaml.safe_load(f.read_text())["jobs"].items()}


def test_workflows_name_targets_and_files_that_there_are() -> None:
    jobs = workflow_jobs()
    commands = "\n".join(step["run"] for job in jobs.values() for step in job["steps"] if "run" in step)
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][\w-]*)(?=:|(?: [\w-]+)+:)", makefile, re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z][\w-]*)", commands)) - {"g"}
    assert {"check", "docs", "sdist", "test-all", "test-integrations", "check-torch"} <= named
    assert named <= targets, named - targets
    files = re.findall(r"(?:bash|python3?) (\.?[\w/]+(?:\.py)?)|(python/\S+\.py)", commands)
    assert len(files) > 3
    for name in filter(None, itertools.chain(*files)):
        assert (ROOT / name).exists(), name


def test_groups_that_are_installed_are_those_of_the_project() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    table = project.split("[dependency-groups]")[1].split("\n[")[0]
    groups = set(re.findall(r"^([a-z]\w*) = \[", table, re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text()
    trainers = re.search(r"^trainers := (.+)$", makefile, re.MULTILINE)
    assert trainers
    installed = set(re.findall(r"--group (\w+)", makefile)) | set(trainers[1].split())
    assert len(installed) > 8
    assert installed <= groups, installed - groups


def test_the_pythons_of_the_metadata_are_those_of_the_workflows() -> None:
    """A wheel is for every Python that a classifier names, and each is tried."""
    project = (ROOT / "pyproject.toml").read_text()
    named = re.findall(r"Python :: (3\.\d+)\"", project)
    tried = {
        name: job["strategy"]["matrix"]["python"]
        for name, job in workflow_jobs().items()
        if "python" in job.get("strategy", {}).get("matrix", {})
    }
    assert len(tried) == 2
    for name, pythons in tried.items():
        assert pythons == named, name
    assert f'requires-python = ">={named[0]}"' in project


def test_the_conda_recipe_reads_the_version() -> None:
    """The call in its head, as conda build makes it, and the requirements of pyproject.toml."""
    recipe = (ROOT / "conda" / "meta.yaml").read_text()
    file, pattern = (re.search(rf"{key}=[\"'](.+)[\"'],", recipe) for key in ("load_file", "regex_pattern"))
    assert file
    assert pattern
    found = re.search(pattern[1], (ROOT / "conda" / file[1]).read_text())
    assert found
    assert found[1] == steepest.__version__
    project = (ROOT / "pyproject.toml").read_text()
    assert 'dependencies = ["torch>=2.10"]' in project
    assert "- pytorch >=2.10" in recipe
    assert 'requires-python = ">=3.10"' in project
    assert "- python >=3.10" in recipe


ARCHITECTURES = {
    "8.0": ["sm_80"],
    "8.0;9.0a+PTX": ["sm_80", "sm_90a", "compute_90a"],
    "8.6 10.0 12.0+PTX": ["sm_86", "sm_100", "sm_120", "compute_120"],
}


@pytest.mark.parametrize("text", ARCHITECTURES)
def test_architecture_list(build: types.ModuleType, text: str) -> None:
    assert build.parse_architectures(text) == ARCHITECTURES[text]


def test_architecture_list_error(build: types.ModuleType) -> None:
    with pytest.raises(RuntimeError, match="TORCH_CUDA_ARCH_LIST: 'Hopper' is not an architecture; write it as 8.0"):
        build.parse_architectures("8.0;Hopper")


def script(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


Decide = Callable[..., Any]


@pytest.fixture
def machine(build: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Decide:
    """machine(*capabilities, nvcc=True, cutlass=True, knows="80 86 90", **environment): what is built on one with such
    GPUs, or none, and with an nvcc of these targets."""

    def decide(
        *capabilities: str, nvcc: bool = True, cutlass: bool = True, knows: str = "80 86 90", **environment: str
    ) -> Any:
        programs = tmp_path / "programs"
        shutil.rmtree(programs, ignore_errors=True)
        programs.mkdir()
        if nvcc:
            script(programs / "nvcc", f"printf 'sm_%s\\n' {knows}")
        if capabilities:
            script(programs / "nvidia-smi", "\n".join(f"echo {each}" for each in capabilities))
        monkeypatch.setattr(build, "find_cutlass", lambda: Path("/cutlass") if cutlass else None)
        return build.decide({"PATH": str(programs), **environment}, tmp_path)

    return decide


ALL = ["sm_80", "sm_86", "sm_90a", "compute_90"]


def test_default_architectures_follow_nvcc(machine: Decide) -> None:
    assert machine().architectures == machine("9.0", STEEPEST_CUDA="1").architectures == ALL
    assert backend.covers(ALL, (12, 0)), "a newer device runs the PTX"
    assert machine(TORCH_CUDA_ARCH_LIST="12.0", knows="80 120").architectures == ["sm_120"]
    assert machine("8.6", STEEPEST_CUDA="1", TORCH_CUDA_ARCH_LIST="8.0").architectures == ["sm_80"]


@pytest.mark.parametrize("listed,wanted", [("8.6;", ["sm_86"]), (" ;8.6 ; 9.0,", ["sm_86", "sm_90"]), (" ; ", ALL)])
def test_what_separates_architectures_may_be_at_the_ends_of_a_list(
    machine: Decide, listed: str, wanted: list[str]
) -> None:
    """A list of nothing else counts as unset."""
    built = machine(TORCH_CUDA_ARCH_LIST=listed, cutlass=wanted is ALL)
    assert built.architectures == wanted


@pytest.mark.parametrize("listed,named", [("8.0;99.0", "sm_990"), ("8.0 12.0+PTX", "sm_120, compute_120")])
def test_architectures_that_nvcc_does_not_know_are_named(machine: Decide, listed: str, named: str) -> None:
    """Before a minute of compilation, and not in the middle of a page of commands."""
    message = f"TORCH_CUDA_ARCH_LIST={listed!r}: .*/nvcc does not know {named}: leave them out, or set CUDACXX"
    with pytest.raises(RuntimeError, match=re.escape(message).replace(re.escape(".*"), ".*")):
        machine(TORCH_CUDA_ARCH_LIST=listed)


def test_an_nvcc_that_does_not_run_is_named(machine: Decide, tmp_path: Path) -> None:
    broken = script(tmp_path / "broken" / "nvcc", "echo no such toolkit >&2; exit 3")
    message = rf"{broken} --list-gpu-code ends with 3 \(no such toolkit\): set CUDACXX to an nvcc that works"
    with pytest.raises(RuntimeError, match=message):
        machine(CUDACXX=broken)


@pytest.mark.parametrize("wish", [{}, {"STEEPEST_CUDA": "local"}])
def test_a_machine_with_gpus_builds_for_them(machine: Decide, wish: dict[str, str]) -> None:
    assert machine("8.6", **wish).architectures == ["sm_86", "compute_86"]
    assert machine("9.0", "8.0", "9.0", **wish).architectures == ["sm_80", "sm_90a", "compute_90"]
    assert machine("9.0", **wish).hopper


def test_a_machine_without_a_gpu_builds_no_cuda_unless_asked(machine: Decide) -> None:
    for arguments in ({"STEEPEST_CUDA": "local"}, {"STEEPEST_CUDA": "local", "TORCH_CUDA_ARCH_LIST": "8.0"}):
        decided = machine(**arguments)
        assert (decided.nvcc, decided.architectures, decided.hopper) == (None, [], False)
        assert str(decided).startswith("compiling without CUDA (no GPU of compute capability 8.0 or newer here; STEEP")
    assert machine("7.5", STEEPEST_CUDA="local").nvcc is None
    assert (
        machine("9.0", nvcc=False, STEEPEST_CUDA="local").why
        == machine(nvcc=False).why
        == "no nvcc; a GPU runs the Triton kernels"
    )
    for named in ({}, {"CUDACXX": "/nowhere/nvcc"}):
        assert machine("9.0", STEEPEST_CUDA="0", **named).nvcc is None


def test_a_driver_that_answers_something_else_is_no_gpu(build: types.ModuleType, tmp_path: Path) -> None:
    path = {"PATH": str(tmp_path)}
    script(tmp_path / "nvidia-smi", "echo 'No devices were found'; exit 6")
    assert build.find_devices(path) == []
    script(tmp_path / "nvidia-smi", "echo '[N/A]'; echo 12.0; echo 9.0; echo 7.5; echo 9.0")
    assert build.find_devices(path) == ["9.0", "12.0"]


def test_a_gpu_newer_than_nvcc_runs_ptx(machine: Decide) -> None:
    assert machine("12.0", STEEPEST_CUDA="local").architectures == ALL
    assert machine("8.0", "12.0").architectures == ["sm_80", "compute_80"]


@pytest.mark.parametrize(
    "listed,with_cutlass,without",
    [
        ("9.0", ["sm_90a"], ["sm_90"]),
        ("9.0+PTX", ["sm_90a", "compute_90"], ["sm_90", "compute_90"]),
        ("8.0 9.0 9.0a", ["sm_80", "sm_90a"], ["sm_80", "sm_90", "sm_90a"]),
        ("8.0", ["sm_80"], ["sm_80"]),
    ],
)
def test_a_list_with_9_0_has_the_products_for_hopper(
    machine: Decide, listed: str, with_cutlass: list[str], without: list[str]
) -> None:
    """Images with torch preset it so."""
    built = machine(TORCH_CUDA_ARCH_LIST=listed)
    assert (built.architectures, built.hopper, built.warning) == (with_cutlass, "9.0" in listed, None)
    built = machine(TORCH_CUDA_ARCH_LIST=listed, cutlass=False)
    assert (built.architectures, built.hopper) == (without, False)
    assert (built.warning is not None) == ("9.0" in listed)


def test_what_the_kernels_are_not_for_is_left_out_of_a_list(machine: Decide) -> None:
    """Images with torch preset all that torch takes; ptxas refuses 7.5."""
    decided = machine(TORCH_CUDA_ARCH_LIST="5.2 7.5 8.0 9.0 10.0 12.0+PTX", knows="80 90 100 120")
    assert decided.architectures == ["sm_80", "sm_90a", "sm_100", "sm_120", "compute_120"]
    assert decided.why == "TORCH_CUDA_ARCH_LIST from 8.0 on"
    with pytest.raises(RuntimeError, match=r"TORCH_CUDA_ARCH_LIST='7\.5\+PTX': the kernels are for 8\.0 and newer"):
        machine(TORCH_CUDA_ARCH_LIST="7.5+PTX")


@pytest.mark.parametrize("local", ["", "cu130"])
def test_pip_shows_that_cutlass_is_missing(
    machine: Decide, build: types.ModuleType, monkeypatch: pytest.MonkeyPatch, local: str
) -> None:
    """In the version, which is all it shows of a build that works."""
    monkeypatch.setenv("STEEPEST_LOCAL_VERSION", local)
    with_it, without = (machine(TORCH_CUDA_ARCH_LIST="9.0", cutlass=cutlass) for cutlass in (True, False))
    for decided, label in ((with_it, local), (without, f"{local}.no.cutlass".lstrip("."))):
        monkeypatch.setattr(build, "decide", lambda decided=decided: decided)
        assert build.version() == steepest.__version__ + (f"+{label}" if label else "")


def test_a_local_version_that_is_none_is_named(build: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEEPEST_CUDA", "0")
    for named in ("foo bar", "+cu130", "cu130."):
        monkeypatch.setenv("STEEPEST_LOCAL_VERSION", named)
        with pytest.raises(RuntimeError, match=re.escape(f"STEEPEST_LOCAL_VERSION={named!r}: letters and digits")):
            build.version()


def test_an_archive_of_the_sources_has_one_version(
    machine: Decide, build: types.ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever the machine that made it has; pip discards one whose build on another has another version."""
    decided = machine(TORCH_CUDA_ARCH_LIST="9.0", cutlass=False)
    monkeypatch.setattr(build, "decide", lambda: decided)
    monkeypatch.delenv("STEEPEST_LOCAL_VERSION", raising=False)
    assert build.version() == f"{steepest.__version__}+no.cutlass"
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["setup.py", "sdist"])
        assert build.version() == steepest.__version__
    (tmp_path / "unpacked" / "python" / "steepest").mkdir(parents=True)
    shutil.copy(ROOT / "python" / "steepest" / "_version.py", tmp_path / "unpacked" / "python" / "steepest")
    (tmp_path / "unpacked" / "PKG-INFO").touch()
    monkeypatch.setattr(build, "ROOT", tmp_path / "unpacked")
    assert build.version() == steepest.__version__


def test_a_build_without_cutlass_warns(
    machine: Decide, build: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Python's warnings, which pip takes over from a build."""
    without = machine(TORCH_CUDA_ARCH_LIST="9.0", cutlass=False)
    monkeypatch.setattr(build, "decide", lambda: without)
    monkeypatch.setattr(build.CMakeBuild, "values", lambda self, decided: decided.nothing_of_the_kind)
    command = build.CMakeBuild(importlib.import_module("setuptools").Distribution())
    shown = pytest.warns(UserWarning, match="no CUTLASS headers: a Hopper GPU \\(H100, H200\\) gets the slower route")
    with shown, pytest.raises(AttributeError, match="nothing_of_the_kind"):
        command.build_extensions()


def test_how_long_it_takes_is_said_in_round_numbers(
    machine: Decide, build: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAX_JOBS", "2")
    host, half, all_of_it = machine(STEEPEST_CUDA="0"), machine("8.0", STEEPEST_CUDA="local"), machine()
    assert host.minutes().endswith("0 seconds")
    assert all_of_it.minutes().endswith(" minutes")
    assert f"compiling for sm_80, compute_80 (this machine's GPU): about {half.minutes()}" == str(half)
    assert "for sm_80, sm_86, sm_90a, compute_90, with the products for Hopper (all architectures)" in str(all_of_it)


def test_where_nvcc_is_looked_for(build: types.ModuleType, tmp_path: Path) -> None:
    on_path = script(tmp_path / "path" / "nvcc", "")
    at_home = script(tmp_path / "home" / "bin" / "nvcc", "")
    named = script(tmp_path / "mynvcc", "")
    usual = script(tmp_path / "root" / "usr" / "local" / "cuda" / "bin" / "nvcc", "")
    path = {"PATH": str(tmp_path / "path")}
    home = {**path, "CUDA_HOME": str(tmp_path / "home")}
    root = tmp_path / "root"
    assert build.find_nvcc(path, root) == on_path
    assert build.find_nvcc(home, root) == at_home
    assert build.find_nvcc({**home, "CUDACXX": named}, root) == named
    assert build.find_nvcc({"PATH": str(tmp_path)}, root) == usual
    assert build.find_nvcc({"PATH": str(tmp_path)}, tmp_path) is None


def test_missing_nvcc_is_an_error_when_asked_for(machine: Decide) -> None:
    with pytest.raises(RuntimeError, match="STEEPEST_CUDA=1 asks for the CUDA kernels, but nvcc is not at CUDACXX"):
        machine(nvcc=False, STEEPEST_CUDA="1")
    with pytest.raises(RuntimeError, match="STEEPEST_CUDA='yes': 0 leaves CUDA out, 1 builds for all"):
        machine(STEEPEST_CUDA="yes")


def test_an_nvcc_that_is_named_is_not_replaced_by_another(machine: Decide) -> None:
    with pytest.raises(RuntimeError, match="CUDACXX='/nowhere/nvcc' is no program: set it to nvcc's path, or unset it"):
        machine(CUDACXX="/nowhere/nvcc")
    assert machine(CUDACXX="/nowhere/nvcc", STEEPEST_CUDA="local").nvcc is None, "where none is needed it may be stale"


@pytest.mark.parametrize("name", ["CUDA_HOME", "CUDA_PATH"])
def test_a_cuda_home_without_nvcc_is_named(machine: Decide, tmp_path: Path, name: str) -> None:
    """An nvcc from elsewhere is of another toolkit than the one that is named."""
    home = {name: "/nowhere/cuda"}
    message = f"STEEPEST_CUDA=1 asks for the CUDA kernels, but {name}='/nowhere/cuda' has no bin/nvcc: set it to"
    with pytest.raises(RuntimeError, match=message):
        machine(STEEPEST_CUDA="1", **home)
    taken = f"{name}='/nowhere/cuda' has no bin/nvcc, {tmp_path / 'programs' / 'nvcc'} is taken"
    assert machine(**home).why == f"all architectures; {taken}"
    assert machine("8.6", STEEPEST_CUDA="local", **home).why == f"this machine's GPU; {taken}"
    assert machine(nvcc=False, **home).why == (
        f"no nvcc; {name}='/nowhere/cuda' has no bin/nvcc; a GPU runs the Triton kernels"
    )
    named = script(tmp_path / "mynvcc", "printf 'sm_80\\n'")
    assert machine(STEEPEST_CUDA="1", CUDACXX=named, **home).nvcc == named, "CUDACXX comes before it"
    assert machine(STEEPEST_CUDA="0", **home).why == "STEEPEST_CUDA=0"


@pytest.mark.parametrize("jobs", ["0", "-2", "many", "2.5"])
def test_a_number_of_jobs_that_is_none_is_named(machine: Decide, monkeypatch: pytest.MonkeyPatch, jobs: str) -> None:
    monkeypatch.setenv("MAX_JOBS", jobs)
    with pytest.raises(RuntimeError, match=f"MAX_JOBS='{jobs}': a number of compilations at once, 1 or more"):
        machine().minutes()


def test_a_number_of_nvccs_threads_that_is_none_is_named(build: types.ModuleType) -> None:
    assert [build.asked_threads(said) for said in ({}, {"NVCC_THREADS": ""}, {"NVCC_THREADS": "0"})] == ["1", "1", "0"]
    with pytest.raises(RuntimeError, match="NVCC_THREADS='banana': a number of architectures"):
        build.asked_threads({"NVCC_THREADS": "banana"})


def test_missing_or_old_torch_is_an_error(
    build: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "package_folder", lambda name: None)
    with pytest.raises(RuntimeError, match="this Python has no torch: install torch>=2.10 first"):
        build.find_torch()
    (tmp_path / "version.py").write_text("__version__ = '2.9.1+cpu'\n")
    monkeypatch.setattr(build, "package_folder", lambda name: tmp_path)
    with pytest.raises(RuntimeError, match=r"needs torch>=2\.10 and found 2\.9\.1\+cpu"):
        build.find_torch()


@pytest.mark.parametrize("version", ["65.5.0", "76.1.0.post0"])
def test_an_old_setuptools_is_named(tmp_path: Path, version: str) -> None:
    """A virtual environment of Python 3.11 brings one along, and the build does not replace it."""
    (tmp_path / "setuptools").mkdir()
    (tmp_path / "setuptools" / "__init__.py").write_text(f"__version__ = {version!r}\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(ROOT / "setup.py"), "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert f"steepest needs setuptools>=77 to build and found {version}: `pip install 'setuptools>=77'`" in done.stderr


def test_missing_compiler_is_an_error(build: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RuntimeError, match="needs a C\\+\\+17 compiler"):
        build.require_compiler()
    for named in ("no-such-compiler -O2", " "):
        monkeypatch.setenv("CXX", named)
        with pytest.raises(RuntimeError, match=rf"none of \['{named.partition(' -')[0]}'\] is on PATH"):
            build.require_compiler()


def test_where_build_tools_are_looked_for(
    build: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the installed package, on PATH, in the scripts folder, in this order."""
    scripts = script(tmp_path / "scripts" / "ninja", "")
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: str(tmp_path / "scripts"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setitem(sys.modules, "ninja", None)  # importing it raises ImportError
    assert build.find_tool("ninja") == scripts
    on_path = script(tmp_path / "path" / "ninja", "")
    assert build.find_tool("ninja") == on_path
    packaged = script(tmp_path / "package" / "ninja", "")
    monkeypatch.setitem(sys.modules, "ninja", types.SimpleNamespace(BIN_DIR=str(tmp_path / "package")))
    assert build.find_tool("ninja") == packaged
    monkeypatch.setitem(sys.modules, "cmake", None)
    with pytest.raises(RuntimeError, match="building steepest needs cmake: `pip install cmake`"):
        build.find_tool("cmake")


def test_each_set_of_inputs_has_its_build_folder(build: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"STEEPEST_TORCH": "/a/torch", "STEEPEST_COMMIT": "1"}
    folder = build.build_folder(values, {})
    assert folder.parent == ROOT / "build"
    assert (
        build.build_folder({**values, "STEEPEST_COMMIT": "2", "STEEPEST_NVCC_THREADS": "4"}, {"HOME": "/b"}) == folder
    )
    others = [
        build.build_folder({**values, "STEEPEST_TORCH": "/b/torch"}, {}),
        build.build_folder({**values, "CMAKE_CUDA_COMPILER": "/b/nvcc"}, {}),
        build.build_folder(values, {"CXX": "clang++"}),
    ]
    monkeypatch.setattr(build, "ROOT", Path("/moved"))
    others.append(build.build_folder(values, {}))
    assert len({path.name for path in (folder, *others)}) == 5


def test_commit_is_our_own(build: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "around"], check=True)
    monkeypatch.setattr(build, "ROOT", tmp_path)
    assert len(build.commit()) == 12
    (tmp_path / "unpacked").mkdir()
    monkeypatch.setattr(build, "ROOT", tmp_path / "unpacked")
    assert build.commit() == ""


# ---- the makefile


def run_make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a fresh clone, whatever is set around the tests."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    command = ["make", "-C", str(ROOT), "--no-print-directory", "VENV=no-such-folder", *arguments]
    others = ("STEEPEST", "MAKE", "PYTHON")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


def make(*arguments: str) -> str:
    """What it would do from a fresh clone; without a warning."""
    done = run_make(*arguments)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    return done.stdout


def test_the_demo_installs_no_tools_for_developers() -> None:
    assert "examples/train_gpt.py" in make("-n", "demo")
    assert "--group" not in make("-n", "demo")
    assert "--group test" in make("-n", "test")
    assert "triton" not in make("-n", "check")


def test_results_may_lie_in_a_folder_with_a_space() -> None:
    assert "bench/gpu.sh 'my results' doctor" in make("-n", "gpu", "RESULTS=my results", "ARGS=doctor").replace(
        '"', "'"
    )


def test_long_steps_are_announced() -> None:
    """Before them, in lines that begin with ==."""
    for target, least in (
        ("demo", 3),
        ("test", 4),
        ("test-kernels", 4),
        ("check", 2),
        ("check-torch", 1),
        ("wheel", 2),
    ):
        assert make("-n", target).count('"==') >= least, target


def test_the_build_is_for_this_machine_unless_asked() -> None:
    show = "--eval=show: ; @echo $$STEEPEST_CUDA"
    assert make(show, "show") == "local\n"
    assert make(show, "show", "STEEPEST_CUDA=1") == "1\n"


def test_a_check_of_no_torch_says_so() -> None:
    done = run_make("-n", "check-torch", "TORCH=")
    assert done.returncode != 0
    assert 'check-torch builds against the torch that is named: make check-torch TORCH="torch==2.11.0"' in done.stderr


def test_an_environment_of_another_python_is_named(tmp_path: Path) -> None:
    """It keeps the Python that it was made with, and PYTHON= would be read and not followed."""
    (tmp_path / "venv").mkdir()
    script(tmp_path / "venv" / "bin" / "python", "echo Python 3.11.7")
    other = script(tmp_path / "other", "echo Python 3.13.1")
    same = script(tmp_path / "same", "echo Python 3.11.7")
    venv = f"VENV={tmp_path / 'venv'}"
    assert run_make("same-python", venv, f"PYTHON={other}").returncode == 0, "nothing is made yet"
    (tmp_path / "venv" / ".torch").touch()
    done = run_make("same-python", venv, f"PYTHON={other}")
    assert done.returncode != 0
    wanted = f"was made with Python 3.11.7, and PYTHON={other} is Python 3.13.1: make clean, or set VENV to another"
    assert wanted in done.stderr
    for arguments in ((f"PYTHON={same}",), ()):
        assert run_make("same-python", venv, *arguments).returncode == 0
    for target in ("test", "check", "wheel", "demo"):
        assert "was made with" in make("-n", target, f"PYTHON={sys.executable}")
    for target in ("gpu", "check-torch", "clean"):
        assert "was made with" not in make("-n", target, f"PYTHON={sys.executable}")


# ---- the binary


@needs_extension
def test_build_info() -> None:
    info = extension().build_info()
    assert info["version"] == steepest.__version__
    assert info["torch"].split(".")[0] == "2"
    assert info["compiler"]
    assert info["interface"] == hashlib.sha256((ROOT / "csrc" / "library.cpp").read_bytes()).hexdigest()
    assert bool(info["architectures"]) == (info["cuda"] is not None)
    assert all(name.startswith(("sm_", "compute_")) for name in info["architectures"])


@needs_extension
@pytest.mark.parametrize(
    "op,written",
    [
        ("grad_stats", {"steps", "rows", "skipped", "scratch"}),
        ("decide_steps", {"steps", "rows", "skipped"}),
        ("update_moments", {"momenta", "seconds", "inputs", "params", "mantissas", "sums", "scratch"}),
        ("apply_update", {"params", "mantissas", "sums", "scratch"}),
        ("normalize_updates", {"seconds", "divided", "factors", "scratch"}),
        (
            "normalize_and_apply_update",
            {"params", "mantissas", "factors", "averages", "divided", "sums", "scratch", "meeting"},
        ),
    ],
)
def test_ops_are_registered(op: str, written: set[str]) -> None:
    schema = getattr(torch.ops.steepest, op).default._schema
    assert {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write} == written
    keys = ["CPU"] if extension().build_info()["cuda"] is None else ["CPU", "CUDA"]
    assert all(torch._C._dispatch_has_kernel_for_dispatch_key(f"steepest::{op}", key) for key in keys)


@needs_extension
def test_loads_without_a_cuda_library() -> None:
    """No strong symbol that only libtorch_cuda has, no CUDA library asked for, no folder to look for libraries in."""
    nm, readelf = shutil.which("nm"), shutil.which("readelf")
    if nm is None or readelf is None:
        pytest.skip("nm and readelf (binutils) are not installed")
    path = str(extension().path)
    symbols = subprocess.run([nm, "-D", "--undefined-only", path], capture_output=True, text=True, check=True).stdout
    strong = {line.split()[-1] for line in symbols.splitlines() if line.split()[-2] == "U"}
    in_libtorch_cpu = {"aoti_torch_device_type_cuda"}
    assert {name for name in strong if "cuda" in name.lower() or name.startswith("cu")} <= in_libtorch_cpu
    dynamic = subprocess.run([readelf, "-d", path], capture_output=True, text=True, check=True).stdout
    assert "PATH" not in dynamic
    assert "cuda" not in dynamic


@needs_extension
def test_knows_no_python() -> None:
    """So that one file serves every version."""
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("readelf (binutils) is not installed")
    command = [readelf, "--wide", "--dynamic", "--dyn-syms", str(extension().path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu" in text
    assert not re.search(r" _?Py[A-Z_]|libpython|pybind", text)


@needs_extension
def test_names_no_folder_of_the_build_machine() -> None:
    held = extension().path.read_bytes()
    assert b"csrc/library.cpp" in held or b"torch/csrc/stable/" in held, "messages still name their files"
    for folder in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), ROOT):
        assert os.fsencode(folder) not in held


def test_imports_without_the_compiled_part_triton_or_kernels(tmp_path: Path) -> None:
    shutil.copytree(
        ROOT / "python" / "steepest", tmp_path / "steepest", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    code = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name in ("steepest.kernels", "triton"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocker())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "triton" else find(name, package)
import torch, steepest
p, q = torch.nn.Parameter(torch.zeros(3, 2)), torch.nn.Parameter(torch.ones(3))
optimizer = steepest.MuAdam([{"params": [p]}, {"params": [q], "use_muon": False}], adamw_lr=0.5)
p.grad, q.grad = torch.ones(3, 2), torch.ones(3)
optimizer.step()
assert bool((p < 0).all()), p
print(f"{q.sum().item():.3f}", steepest.backends()["cuda"][1])
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.stdout.startswith("1.500 the compiled part is not built; run `pip install"), done.stderr


# ---- functions of the binary that take no tensor


@needs_extension
def test_facts_are_the_same_in_the_module_for_developers() -> None:
    """A module of an older build beside a newer library would differ in the interface at least."""
    if _C is not None:
        assert _C.build_info() == extension().build_info()


@needs_extension
def test_errors_come_with_the_words_of_the_library() -> None:
    with pytest.raises(ValueError, match="majors are kk, mnmn, kmn, got 'mk'"):
        extension().symm_gemm_plan([(1, 8, 8, 8, "mk", False)], 132)
    with pytest.raises(ValueError, match="multiprocessors and capacity must be at least 1, got 0"):
        extension().symm_gemm_plan([(1, 128, 128, 64, "kk", False)], 0)


GRAM = ([1, 2, 0, 0, 0, -1, -1], [1.0, 0.0, 0.0])
TOO_MUCH = "stacks have 1 to 1048576 matrices and at most 137438953472 elements in all, got "


@needs_extension
@pytest.mark.parametrize(
    "name,arguments,message",
    [
        ("polar_chunks", (*GRAM, [(0, 0, 0)], 132, 1 << 25), f"{TOO_MUCH}0 matrices of 0 x 0"),
        ("polar_chunks", (*GRAM, [(1, 2**62, 2**62)], 132, 1 << 25), TOO_MUCH),
        ("polar_chunks", (*GRAM, [(2**64 + 1, 4, 4)], 132, 1 << 25), "18446744073709551617 does not fit into 64 bits"),
        ("symm_gemm_plan", ([(2**64 + 1, 128, 128, 64, "kk", False)], 132), "does not fit into 64 bits"),
        ("polar_chunks", (*GRAM, [(2**60, 1024, 4096)], 132, 1 << 25), TOO_MUCH),
        ("polar_chunks", (*GRAM, [(500_000, 512, 512)] * 2, 132, 1 << 25), f"{TOO_MUCH}500000 matrices of 512 x 512"),
        ("polar_chunks", (*GRAM, [(-1, 1024, 4096)], 132, 1 << 25), f"{TOO_MUCH}-1 matrices of 1024 x 4096"),
        ("polar_chunks", (*GRAM, [(24, 1024, 4096)], 132, -5), "at least 1 and l2_bytes 0, got 132 and -5"),
        ("polar_chunks", (*GRAM, [(24, 1024, 4096)], 0, 5), "at least 1 and l2_bytes 0, got 0 and 5"),
        (
            "polar_chunks",
            (GRAM[0], [1.0], [(24, 1024, 4096)], 132, 5),
            "a node is 7 integers and 3 numbers, got 7 and 1",
        ),
        ("polar_chunks", ([1, 99, 0, 0, 0, -1, -1], GRAM[1], [], 132, 5), "node 0 names buffer 99"),
        ("polar_chunks", ([9, 2, 0, 0, 0, -1, -1], GRAM[1], [], 132, 5), "node 0 is of kind 9"),
        ("polar_chunks", ([1, 2, 0, 2, 0, -1, -1], GRAM[1], [], 132, 5), "node 0 multiplies what it writes, buffer 2"),
        ("polar_chunks", ([1, 2, 0, 0, 0, -1, -2], GRAM[1], [], 132, 5), "node 0 names a column that there is not: -2"),
    ],
)
def test_sizes_that_no_device_has_are_errors(name: str, arguments: tuple[Any, ...], message: str) -> None:
    """And neither a crash of the process nor a plan for what is left of a number in 64 bits."""
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(extension(), name)(*arguments)


@needs_extension
@pytest.mark.parametrize(
    "tables,least,words",
    [
        ((((1.5, -0.5),) * 3,), (), None),
        ((((1.5, -0.5), (1.5, -0.5, 0.25)), ((2.0, -1.0), (3.0, -1.0, 0.5))), (0.5,), None),
        (
            (((1.5, -0.5),), ((1.5, -0.5),) * 2),
            (0.5,),
            "tables must have the same 1 to 8 steps, got 2 where the first has 1",
        ),
        ((((1.0,) * 6,),), (), "a step must have 2 to 5 coefficients and no zero at degree 9, got 6"),
        ((((1.5, -0.5),),), (0.5,), "a slack for each but the last, got 1 and 1"),
        ((), (), "a schedule must have 1 to 3 tables"),
    ],
)
def test_schedules_of_any_form_are_refused_with_a_reason(
    tables: tuple[tuple[tuple[float, ...], ...], ...], least: tuple[float, ...], words: str | None
) -> None:
    reason = extension().small_polar_refusal(tables, least)
    assert reason is None if words is None else words in str(reason)


# ---- which backend


COVERED = [
    (["sm_80"], (8, 0), True),
    (["sm_80"], (8, 6), True),
    (["sm_86"], (8, 0), False),
    (["sm_80"], (9, 0), False),
    (["sm_90a"], (9, 0), True),
    (["sm_90a"], (10, 0), False),
    (["compute_90a"], (10, 0), False),
    (["sm_80", "compute_90"], (12, 1), True),
    (["sm_120", "compute_120"], (10, 0), False),
]


@pytest.mark.parametrize("architectures,capability,wanted", COVERED)
def test_covers(architectures: list[str], capability: tuple[int, int], wanted: bool) -> None:
    assert backend.covers(architectures, capability) is wanted


DRIVERS = [
    ("12.8.93", "13.0", False),
    ("13.0.88", "13.0", False),
    ("13.1.2", "13.0", False),
    ("13.0.88", "12.8", True),
    ("12.8.93", "12.1", False),
    ("12.8.93", "12.0", True),  # cannot pass a launch more than 4 KB
    ("12.0.76", "12.0", False),
]


@pytest.mark.parametrize("built,driver,too_old", DRIVERS)
def test_a_driver_older_than_the_toolkit_is_a_reason(
    built: str, driver: str, too_old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = {"cuda": built, "architectures": ["sm_90"]}
    version = 1000 * int(driver.split(".")[0]) + 10 * int(driver.split(".")[1])
    monkeypatch.setattr(backend, "extension", types.SimpleNamespace(build_info=lambda: info))
    monkeypatch.setattr(backend, "_cuda_reason", backend._cuda_reason.__wrapped__)  # without the cache
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: version, raising=False)
    way_out = "update the driver or rebuild with an older toolkit"
    wanted = f"built with CUDA {built[:4]}, the driver takes {driver}; {way_out}"
    assert backend.cuda_reason(0) == (wanted if too_old else None)


def test_a_device_that_the_kernels_are_not_for_is_not_to_be_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    info = {"cuda": "13.0.88", "architectures": ["sm_80"]}
    monkeypatch.setattr(backend, "extension", types.SimpleNamespace(build_info=lambda: info))
    monkeypatch.setattr(backend, "_cuda_reason", backend._cuda_reason.__wrapped__)  # without the cache
    monkeypatch.setattr(backend, "_driver_reason", lambda built: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert backend.cuda_reason(0) == "the kernels are for compute capability 8.0 and newer, not 7.5"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 7))
    info["architectures"] = ["sm_90a"]
    assert backend.cuda_reason(0) == "built for sm_90a and the device is 8.7; rebuild with TORCH_CUDA_ARCH_LIST=8.7"


def test_reason_follows_the_current_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_cuda_reason", lambda index: f"device {index}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for current in (0, 1):
        monkeypatch.setattr(torch.cuda, "current_device", lambda current=current: current)
        assert backend.cuda_reason() == f"device {current}"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend.cuda_reason() == "device None"


def test_doctor_names_the_driver_or_why_not() -> None:
    machine = facts.diagnose()
    assert "driver: CUDA 12.8)" in facts.describe({**machine, "driver_cuda": "12.8"})
    assert "driver: not asked (torch sees no CUDA device))" in facts.describe({**machine, "driver_cuda": None})


def test_doctor_says_what_a_forced_backend_does() -> None:
    machine = facts.diagnose()
    for name, then in (("torch", "every op that has kernels uses it, or fails"), ("gpu", "no backend has this name")):
        assert f"STEEPEST_BACKEND={name} is set: {then}" in facts.describe({**machine, "forced": name})


@pytest.mark.slow
def test_backends_and_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    states = steepest.backends()
    assert list(states) == ["cuda", "triton", "cpu", "torch"]
    assert states["torch"][0]
    assert all(reason for _, reason in states.values())
    assert cli.main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["torch"] == torch.__version__
    assert {name: (s["available"], s["reason"]) for name, s in facts["backends"].items()} == states
    for check in [check for check in facts["checks"] if check["backend"] == "cpu" and backend.extension is not None]:
        assert (check["state"], check["text"]) == ("right", "")
        assert check["again_ms"] > 0
        assert check["first_ms"] > 0
    monkeypatch.setattr(selfcheck, "enabled", False)  # the checks are made above, each in a new process
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert all(reason in text for _, reason in states.values())


# ---- host-only plans


@needs_module
@FEW
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 100)), max_size=20), st.integers(1, 64), st.integers(1, 7))
def test_chunks_cover_every_element_once(items: list[tuple[int, int]], chunk: int, capacity: int) -> None:
    """An item is (matrices, elements of each); no chunk holds elements of two matrices."""
    seen = [[0] * (matrices * size) for matrices, size in items]
    launches = _C.plan_chunks(items, chunk, capacity)
    for launch in launches:
        assert 1 <= len({item for item, *_ in launch}) <= capacity
        for item, matrix, start, stop in launch:
            size = items[item][1]
            assert 0 < stop - start <= chunk
            assert matrix * size <= start < stop <= (matrix + 1) * size
            for i in range(start, stop):
                seen[item][i] += 1
    assert all(count == 1 for item in seen for count in item)
    needed = sum(1 for each in seen if each)
    assert len(launches) == -(-needed // capacity), "no launch more than the capacity asks for"


@needs_module
def test_chunks_of_a_matrix_follow_one_another() -> None:
    wanted = [(0, 0, 0, 4), (0, 0, 4, 5), (0, 1, 5, 9), (0, 1, 9, 10), (2, 0, 0, 3)]
    assert _C.plan_chunks([(2, 5), (3, 0), (1, 3)], 4, 2) == [wanted]


CHUNK_ERRORS = [
    (([(1, 1)], 0, 3), "chunk and capacity must be at least 1, got 0 and 3"),
    (([(1, 1)], 3, 0), "chunk and capacity must be at least 1, got 3 and 0"),
    (([(1, 1), (1, -1)], 4, 3), "item 1 has 1 matrices of -1 elements; a launch takes 0 to 2147483647 chunks of 4"),
    (([(-2, 5)], 4, 3), "item 0 has -2 matrices of 5 elements"),
    (([(2**31, 5)], 4, 3), "item 0 has 2147483648 matrices of 5 elements"),
    (([(2, 2**62)], 4, 3), "item 0 has 2 matrices of 4611686018427387904 elements"),
]


@needs_module
@pytest.mark.parametrize("arguments,message", CHUNK_ERRORS)
def test_chunk_errors(arguments: tuple[list[tuple[int, int]], int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _C.plan_chunks(*arguments)


@st.composite
def strides(draw: st.DrawFn, sizes: list[int]) -> list[int]:
    """Of a tensor of these sizes: its dimensions in any order in memory, some of them with a step."""
    out, expected = [0] * len(sizes), 1
    for d in draw(st.permutations(range(len(sizes)))):
        out[d] = expected * draw(st.sampled_from([1, 1, 1, 2]))
        expected = out[d] * sizes[d]
    return out


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[int], list[list[int]]]:
    """Sizes, and the strides of up to six tensors: the same ones half of the time."""
    sizes = draw(st.lists(st.integers(1, 4), max_size=4))
    first, count = draw(strides(sizes)), draw(st.integers(1, 6))
    return sizes, [first if draw(st.booleans()) else draw(strides(sizes)) for _ in range(count)]


def offsets(sizes: list[int], strides: list[int]) -> list[int]:
    """Where each element is, in the order of the indices."""
    return [sum(i * s for i, s in zip(index, strides)) for index in itertools.product(*map(range, sizes))]


@needs_module
@FEW
@given(layouts())
def test_layouts(layout: tuple[list[int], list[list[int]]]) -> None:
    sizes, every = layout
    at = [offsets(sizes, each) for each in every]
    flat = all(one == at[0] for one in at) and sorted(at[0]) == list(range(math.prod(sizes)))
    assert _C.is_flat(sizes, every) == flat
    assert not any(_C.may_overlap(sizes, each) for each in every)
    walk = _C.merge_dims(sizes, every)
    assert math.prod(size for size, _ in walk) == math.prod(sizes)
    for t, wanted in enumerate(at):
        assert offsets([size for size, _ in walk], [each[t] for _, each in walk]) == wanted


MERGED = [
    ([3, 4], [[4, 1]], [(12, [1])]),
    ([3, 4], [[4, 1], [4, 1]], [(12, [1, 1])]),
    ([3, 4], [[4, 1], [1, 3]], [(3, [4, 1]), (4, [1, 3])]),
    ([3, 1, 4], [[4, 7, 1], [8, 5, 2]], [(12, [1, 2])]),
    ([2, 3, 4], [[24, 8, 2], [12, 4, 1]], [(24, [2, 1])]),
    ([2, 3, 4], [[24, 4, 1], [12, 4, 1]], [(2, [24, 12]), (12, [1, 1])]),
    ([], [[], []], []),
]


@needs_module
@pytest.mark.parametrize("sizes,every,wanted", MERGED)
def test_dimensions_merge_where_all_tensors_let_them(
    sizes: list[int], every: list[list[int]], wanted: list[tuple[int, list[int]]]
) -> None:
    assert _C.merge_dims(sizes, every) == wanted


@needs_module
@FEW
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 4)), max_size=4))
def test_no_overlap_is_a_promise(dims: list[tuple[int, int]]) -> None:
    """Any strides, as of torch.as_strided; the test may be too careful (3 x 2 with strides 2 and 3), never too bold."""
    sizes, any_strides = [size for size, _ in dims], [stride for _, stride in dims]
    at = offsets(sizes, any_strides)
    assert _C.may_overlap(sizes, any_strides) or len(set(at)) == len(at)


@needs_module
def test_layout_limits() -> None:
    assert _C.may_overlap([3, 4], [0, 1])
    assert _C.may_overlap([3, 4], [2, 1])
    six = torch.empty([4] * 6)[::2, ::2, ::2, ::2, ::2, ::2]
    assert _C.merge_dims(list(six.shape), [list(six.stride())] * 2) is None
    with pytest.raises(ValueError, match="at most 6 tensors meet in an item"):
        _C.merge_dims([3], [[1]] * 7)


# ---- numbers that Python and C++ both know


@needs_module
def test_python_and_the_binary_agree_on_sizes() -> None:
    found = (_C.CHUNK, _C.COLUMNS, _C.SUMS, _C.STRIDED_DIMS)
    assert found == (multi_tensor.CHUNK, len(multi_tensor.COLUMNS), len(multi_tensor.SUMS), multi_tensor.STRIDED_DIMS)
