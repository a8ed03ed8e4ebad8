"""The build: what setup.py decides, what the binary says of itself, what it needs to load, and its host-only plans."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import steepest
from steepest import cli
from steepest.ops import backend

ROOT = Path(__file__).resolve().parents[1]
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


def extension() -> types.ModuleType:
    assert backend.extension is not None
    return backend.extension


# ---- setup.py


def test_metadata_does_not_import_torch(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise AssertionError('metadata imported torch')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split()[-1] == steepest.__version__, done.stderr


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


def test_default_architectures_follow_nvcc(build: types.ModuleType, tmp_path: Path) -> None:
    nvcc = script(tmp_path / "nvcc", "printf 'sm_80\\nsm_86\\nsm_90\\n'")
    assert build.architectures(nvcc, {}) == ["sm_80", "sm_86", "sm_90a", "compute_90a"]
    assert build.architectures(nvcc, {"TORCH_CUDA_ARCH_LIST": "12.0"}) == ["sm_120"]


def test_where_nvcc_is_looked_for(build: types.ModuleType, tmp_path: Path) -> None:
    on_path = script(tmp_path / "path" / "nvcc", "")
    at_home = script(tmp_path / "home" / "bin" / "nvcc", "")
    named = script(tmp_path / "mynvcc", "")
    path = {"PATH": str(tmp_path / "path")}
    home = {**path, "CUDA_HOME": str(tmp_path / "home")}
    assert build.find_nvcc(path) == on_path
    assert build.find_nvcc(home) == at_home
    assert build.find_nvcc({**home, "CUDACXX": named}) == named
    assert build.find_nvcc({**home, "STEEPEST_CUDA": "0"}) is None
    assert build.find_nvcc({"PATH": str(tmp_path)}) is None


def test_missing_nvcc_is_an_error_when_asked_for(build: types.ModuleType, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="STEEPEST_CUDA=1 asks for the CUDA kernels, but nvcc is not at CUDACXX"):
        build.find_nvcc({"PATH": str(tmp_path), "STEEPEST_CUDA": "1"})
    with pytest.raises(RuntimeError, match="STEEPEST_CUDA='yes': 0 leaves CUDA out"):
        build.find_nvcc({"PATH": str(tmp_path), "STEEPEST_CUDA": "yes"})


def test_missing_or_old_torch_is_an_error(
    build: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "package_folder", lambda name: None)
    with pytest.raises(RuntimeError, match="install torch>=2.10 first"):
        build.find_torch()
    (tmp_path / "version.py").write_text("__version__ = '2.9.1+cpu'\n")
    monkeypatch.setattr(build, "package_folder", lambda name: tmp_path)
    with pytest.raises(RuntimeError, match=r"needs torch>=2\.10 and found 2\.9\.1\+cpu"):
        build.find_torch()


def test_missing_compiler_is_an_error(build: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RuntimeError, match="needs a C\\+\\+17 compiler"):
        build.require_compiler()


# ---- the binary


@needs_extension
def test_build_info() -> None:
    info = extension().build_info()
    assert info["version"] == steepest.__version__
    assert info["torch"].split(".")[0] == "2"
    assert info["compiler"]
    assert bool(info["architectures"]) == (info["cuda"] is not None)
    assert all(name.startswith(("sm_", "compute_")) for name in info["architectures"])


@needs_extension
def test_ops_are_registered() -> None:
    schema = "steepest::after(Tensor(a0!)[] params, Tensor[] updates, Tensor keep, Tensor step) -> ()"
    assert str(torch.ops.steepest.after.default._schema).replace("(a!)", "(a0!)") == schema
    if extension().build_info()["cuda"] is not None:
        assert torch._C._dispatch_has_kernel_for_dispatch_key("steepest::after", "CUDA")


@needs_extension
def test_loads_without_a_cuda_library() -> None:
    """No strong symbol that only libtorch_cuda has, no CUDA library asked for, no path of the build machine."""
    nm, readelf = shutil.which("nm"), shutil.which("readelf")
    if nm is None or readelf is None:
        pytest.skip("nm and readelf (binutils) are not installed")
    path = str(extension().__file__)
    symbols = subprocess.run([nm, "-D", "--undefined-only", path], capture_output=True, text=True, check=True).stdout
    strong = {line.split()[-1] for line in symbols.splitlines() if line.split()[-2] == "U"}
    in_libtorch_cpu = {"aoti_torch_device_type_cuda"}
    assert {name for name in strong if "cuda" in name.lower() or name.startswith("cu")} <= in_libtorch_cpu
    dynamic = subprocess.run([readelf, "-d", path], capture_output=True, text=True, check=True).stdout
    assert "PATH" not in dynamic
    assert "cuda" not in dynamic


def test_imports_without_the_compiled_part_triton_or_kernels() -> None:
    blocker = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name in ("steepest._C", "steepest.kernels", "triton"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocker())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in ("steepest._C", "triton") else find(name, package)
import torch, steepest
from steepest.ops.after import after
p = torch.ones(3)
after([p], [torch.ones(3)], torch.ones(1), torch.ones(1))
print(p.sum().item(), steepest.backends()["cuda"][1])
"""
    done = subprocess.run([sys.executable, "-c", blocker], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("0.0 the compiled part is not built; run `pip install"), done.stderr


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


def test_backends_and_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    states = steepest.backends()
    assert list(states) == ["cuda", "triton", "torch"]
    assert states["torch"][0]
    assert all(reason for _, reason in states.values())
    assert cli.main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["torch"] == torch.__version__
    assert {name: (s["available"], s["reason"]) for name, s in facts["backends"].items()} == states
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert all(reason in text for _, reason in states.values())


# ---- host-only plans


@needs_extension
@given(st.lists(st.integers(0, 300), max_size=40), st.integers(1, 64), st.integers(1, 7))
def test_chunks_cover_every_element_once(sizes: list[int], chunk: int, capacity: int) -> None:
    seen = [[0] * size for size in sizes]
    for launch in extension().plan_chunks(sizes, chunk, capacity):
        assert len({tensor for tensor, _, _ in launch}) <= capacity
        for tensor, start, stop in launch:
            assert 0 < stop - start <= chunk
            for i in range(start, stop):
                seen[tensor][i] += 1
    assert all(count == 1 for tensor in seen for count in tensor)


@needs_extension
def test_chunk_errors() -> None:
    with pytest.raises(ValueError, match="chunk and capacity must be at least 1, got 0 and 3"):
        extension().plan_chunks([1], 0, 3)
    with pytest.raises(ValueError, match="tensor 1 has -1 elements"):
        extension().plan_chunks([1, -1], 4, 3)


@st.composite
def views(draw: st.DrawFn) -> torch.Tensor:
    """A view of up to four dimensions: permuted, with steps, with dimensions of one."""
    sizes = draw(st.lists(st.integers(1, 4), max_size=4))
    steps = draw(st.lists(st.integers(1, 2), min_size=len(sizes), max_size=len(sizes)))
    base = torch.empty([size * step for size, step in zip(sizes, steps)])
    return base[tuple(slice(None, None, step) for step in steps)].permute(draw(st.permutations(range(len(sizes)))))


def offsets(sizes: list[int], strides: list[int]) -> list[int]:
    """Where each element is, in the order of the indices."""
    return [sum(i * s for i, s in zip(index, strides)) for index in itertools.product(*map(range, sizes))]


@needs_extension
@given(views(), views())
def test_layouts(p: torch.Tensor, u: torch.Tensor) -> None:
    u = u if u.shape == p.shape else torch.empty(p.shape)
    sizes, p_strides, u_strides = list(p.shape), list(p.stride()), list(u.stride())
    p_at, u_at = offsets(sizes, p_strides), offsets(sizes, u_strides)
    flat = p_at == u_at and sorted(p_at) == list(range(p.numel()))
    assert extension().is_flat(sizes, p_strides, u_strides) == flat
    assert not extension().may_overlap(sizes, p_strides)
    walk = extension().merge_dims(sizes, p_strides, u_strides)
    assert math.prod(size for size, _, _ in walk) == p.numel()
    assert offsets([s for s, _, _ in walk], [s for _, s, _ in walk]) == p_at
    assert offsets([s for s, _, _ in walk], [s for _, _, s in walk]) == u_at


@needs_extension
def test_layout_limits() -> None:
    assert extension().may_overlap([3, 4], [0, 1])
    assert extension().may_overlap([3, 4], [2, 1])
    six = torch.empty([4] * 6)[::2, ::2, ::2, ::2, ::2, ::2]
    assert extension().merge_dims(list(six.shape), list(six.stride()), list(six.stride())) is None
