"""What the compilers made of the kernels, read on any machine: targets, spills, width of loads and stores."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from steepest.ops import backend


def tool(name: str) -> str:
    """A CUDA binary tool from PATH or from inside the Triton package; skips when neither has it."""
    found = shutil.which(name)
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        found = shutil.which(name, path=str(Path(spec.origin).parent / "backends" / "nvidia" / "bin"))
    if found is None:
        pytest.skip(f"{name} is neither on PATH nor in an installed Triton")
    return found


@pytest.fixture(scope="module")
def binary() -> str:
    if backend.extension is None:
        pytest.skip(str(backend.extension_reason))
    if backend.extension.build_info()["cuda"] is None:
        pytest.skip("the compiled part was built without CUDA")
    return str(backend.extension.__file__)


def dump(*arguments: str) -> str:
    command = [tool("cuobjdump"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout


def test_binary_holds_the_architectures_it_claims(binary: str) -> None:
    assert backend.extension is not None
    images = re.findall(r"\.(sm_\w+)\.(cubin|ptx)$", dump("--list-elf", "--list-ptx", binary), re.MULTILINE)
    held = {name if kind == "cubin" else name.replace("sm_", "compute_") for name, kind in images}
    assert held == set(backend.extension.build_info()["architectures"])


def test_kernels_do_not_spill(binary: str) -> None:
    line = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)"
    usage = re.findall(line, dump("--dump-resource-usage", binary))
    kernels = {name for name, *_ in usage}
    assert sum("after_flat" in name for name in kernels) == 9, "one for each pair of dtypes"
    assert sum("after_strided" in name for name in kernels) == 1
    for name, registers, stack, local in usage:
        assert (int(stack), int(local)) == (0, 0), name
        assert int(registers) <= 64, f"{name}: more than 64 registers leave a multiprocessor half empty"


def test_flat_kernels_move_16_bytes(binary: str) -> None:
    sass = dump("--dump-sass", binary)
    functions = re.split(r"^\s*Function : ", sass, flags=re.MULTILINE)[1:]
    flat = [text for text in functions if "after_flat" in text.splitlines()[0]]
    assert flat
    for text in flat:
        # A pair of types of 2 and 4 bytes moves 16 bytes of the narrow one and twice 16 of the wide one.
        assert re.search(r"LDG\.E\.(\w+\.)*128", text), text.splitlines()[0]
        assert re.search(r"STG\.E\.(\w+\.)*128", text), text.splitlines()[0]


TARGETS = [80, 90, 100]


def compile_triton(p: str, u: str, capability: int) -> Any:
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    kernel = pytest.importorskip("steepest.kernels.after", reason="steepest.kernels is not importable")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {"fp32": triton.language.float32, "bf16": triton.language.bfloat16, "fp16": triton.language.float16}
    signature = {"table": "*i64", "index": "*i64", "keep": "*fp32", "step": "*fp32", "n": "i32"}
    constants = {"P": types[p], "U": types[u], "ALIGNED": True, "BLOCK": kernel.BLOCK}
    source = ASTSource(kernel.after_kernel, {**signature, **dict.fromkeys(constants, "constexpr")}, constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=kernel.OPTIONS)


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("p,u", [("fp32", "bf16"), ("bf16", "bf16"), ("fp16", "fp32")])
def test_triton_compiles_for(capability: int, p: str, u: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))  # what is read is what was compiled now
    compiled = compile_triton(p, u, capability)
    assert re.search(r"ld\.global\S*\.v4\.b32", compiled.asm["ptx"]), "16-byte loads"
    assert re.search(r"st\.global\S*\.v4\.b32", compiled.asm["ptx"]), "16-byte stores"
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    assert re.search(r"STACK:0 .*LOCAL:0", dump("--dump-resource-usage", str(cubin))), "no spills"
