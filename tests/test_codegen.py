"""What the compilers made of the kernels, read on any machine: targets, spills, width of loads and stores."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture; `name` as in KERNELS, `sass` its machine code."""

    name: str
    registers: int
    stack: int
    local: int
    sass: str


#: Every kernel, by parts of its mangled name.
KERNELS = {
    "inspect flat": ("inspect", "FlatGradient"),
    "inspect strided": ("inspect", "StridedGradient"),
    "before flat": ("run", "Before", "FlatItem"),
    "before strided": ("run", "Before", "StridedItem"),
    "after flat": ("run", "After", "FlatItem"),
    "after strided": ("run", "After", "StridedItem"),
    "chain numbers": ("chain_numbers",),
}


def named(mangled: str) -> str:
    """The kernel's name in KERNELS; a part of a mangled name stands after its length."""
    for name, parts in KERNELS.items():
        if all(f"{len(part)}{part}" in mangled for part in parts):
            return name
    raise AssertionError(f"{mangled} is not one of {', '.join(KERNELS)}")


def by_architecture(text: str, begin: str) -> Iterator[tuple[str, str, str]]:
    """(architecture, mangled name, what follows) of each function in a dump."""
    for image in re.split(r"^arch = ", text, flags=re.MULTILINE)[1:]:
        for function in re.split(begin, image)[1:]:
            mangled, _, body = function.partition("\n")
            yield image.partition("\n")[0].strip(), mangled.strip().rstrip(":"), body


@pytest.fixture(scope="module")
def cubins(binary: str) -> dict[str, list[Kernel]]:
    """The kernels in the binary by architecture; reading its code takes seconds."""
    sass = {(arch, name): body for arch, name, body in by_architecture(dump("--dump-sass", binary), r"\bFunction : ")}
    found: dict[str, list[Kernel]] = {}
    for arch, mangled, body in by_architecture(dump("--dump-resource-usage", binary), r"\bFunction "):
        numbers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", body)
        assert numbers is not None, body
        registers, stack, local = map(int, numbers.groups())
        kernel = Kernel(named(mangled), registers, stack, local, sass[arch, mangled])
        found.setdefault(arch, []).append(kernel)
    return found


def test_every_architecture_has_every_kernel(cubins: dict[str, list[Kernel]]) -> None:
    assert backend.extension is not None
    compiled = {name for name in backend.extension.build_info()["architectures"] if name.startswith("sm_")}
    assert set(cubins) == compiled
    for architecture, held in cubins.items():
        assert sorted(kernel.name for kernel in held) == sorted(KERNELS), architecture


def test_kernels_do_not_spill(cubins: dict[str, list[Kernel]]) -> None:
    for architecture, held in cubins.items():
        for kernel in held:
            where = f"{kernel.name} on {architecture}"
            assert (kernel.stack, kernel.local) == (0, 0), where
            assert kernel.registers <= 128, f"{where}: two blocks of 256 threads share 65536 registers"
            assert not re.search(r"\b(LDL|STL)\b", kernel.sass), f"{where} uses local memory"


def test_flat_kernels_move_16_bytes(cubins: dict[str, list[Kernel]]) -> None:
    """The widest access there is before sm_100: eight elements are one of them or, of fp32, two."""
    for architecture, held in cubins.items():
        for kernel in (kernel for kernel in held if "flat" in kernel.name):
            where = f"{kernel.name} on {architecture}"
            assert re.search(r"\bLDG\.E\.128\b", kernel.sass), where
            stores = re.findall(r"\bSTG\.E(\.128)?(?:\.STRONG\.\w+)? ", kernel.sass)
            wide, narrow = stores.count(".128"), stores.count("")
            if kernel.name.startswith("inspect"):
                assert wide == 0, f"{where} stores elements; it only reads them"
            else:  # the last elements of a chunk go one by one, a few stores in the code
                assert wide > narrow, f"{where}: {wide} stores of 16 bytes and {narrow} of 4"


TARGETS = [80, 90, 100]

# Element types of gradient, momentum, second moment, direction's input, parameter, mantissa in `before` (Muon, MuAdam
# into fp16, AdamW in fp32, AdamW in bf16 with a mantissa), of the last four in `after`, of the gradient in `inspect`.
TRITON_GROUPS = {
    "inspect_kernel": ["fp32", "bf16"],
    "before_kernel": [
        "bf16 bf16 - bf16 - -",
        "fp32 fp32 fp32 fp16 - -",
        "fp32 fp32 fp32 - fp32 -",
        "bf16 bf16 bf16 - bf16 int16",
    ],
    "after_kernel": ["- bf16 fp32 -", "fp32 fp16 bf16 int16"],
}
POINTERS = {
    **dict.fromkeys(("table", "hypers", "skipped"), "*i64"),
    **dict.fromkeys(("rows", "sums", "partials"), "*fp64"),
    **dict.fromkeys(("found_inf", "grad_scale"), "*fp32"),
}


def compile_triton(kernel: Any, constants: dict[str, Any], options: dict[str, Any], capability: int) -> Any:
    """A kernel with these constants; its other arguments have the types in POINTERS or are integers."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: "constexpr" if name in constants else POINTERS.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def assert_no_spills(compiled: Any, path: Path) -> int:
    """At most one 8-byte number on the stack, which the ptxas of Triton 3.6 puts there outside all loops. Registers."""
    path.write_bytes(compiled.asm["cubin"])
    usage = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", dump("--dump-resource-usage", str(path)))
    assert usage is not None
    registers, stack, local = map(int, usage.groups())
    assert stack <= 8
    assert local == 0
    return registers


@pytest.fixture
def triton_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))  # what is read is what was compiled now
    return pytest.importorskip("steepest.kernels.multi_tensor", reason="steepest.kernels is not importable")


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("name,group", [(name, group) for name, groups in TRITON_GROUPS.items() for group in groups])
def test_triton_moves_16_bytes(capability: int, name: str, group: str, triton_kernels: Any, tmp_path: Path) -> None:
    kernel = getattr(triton_kernels, name)
    by_name = {str(dtype): dtype for dtype in triton_kernels.DTYPES.values()}
    types = [by_name.get(each) for each in group.split()]
    sizes = {"CHUNK": triton_kernels.CHUNK, "THREADS": triton_kernels.THREADS}
    elements = [argument for argument in kernel.arg_names if len(argument) == 1]
    assert len(elements) == len(types)
    constants = {**dict(zip(elements, types)), "ALIGNED": True, **sizes}
    compiled = compile_triton(kernel, constants, triton_kernels.OPTIONS, capability)
    assert assert_no_spills(compiled, tmp_path / "kernel.cubin") <= 128, "two programs share a multiprocessor"

    def vectors(instruction: str) -> int:
        return len(re.findall(rf"{instruction}\.global\S*\.v4\.b32", compiled.asm["ptx"]))

    # 16 bytes of a 2-byte type and twice 16 of a 4-byte one; a skipped `before` clears the direction's input as well.
    sixteens = {argument: 0 if t is None else t.primitive_bitwidth // 16 for argument, t in zip(elements, types)}
    d, p, low = (sixteens.get(argument, 0) for argument in "DPL")
    everything = sum(sixteens.values())
    if name == "inspect_kernel":
        loads, stores = everything, 0
    elif name == "before_kernel":
        loads, stores = everything - d, everything - sixteens["G"] + d
    else:
        loads, stores = everything, p + low
    assert (vectors("ld"), vectors("st")) == (loads, stores)


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("name", ["rows_kernel", "sums_kernel", "before_kernel"])
def test_triton_compiles_for(capability: int, name: str, triton_kernels: Any, tmp_path: Path) -> None:
    """The kernels that finish, and elements one at a time where an address is not a multiple of 16."""
    import triton.language as tl

    types = {"G": tl.bfloat16, "M": tl.bfloat16, "V": tl.float32, "D": None, "P": tl.bfloat16, "L": tl.int16}
    sizes = {"CHUNK": triton_kernels.CHUNK, "LINES": triton_kernels.LINES}
    constants, options = {
        "rows_kernel": (sizes, triton_kernels.FINISH_OPTIONS),
        "sums_kernel": ({"AFTER": False, **sizes}, triton_kernels.FINISH_OPTIONS),
        "before_kernel": (
            {**types, "ALIGNED": False, "CHUNK": triton_kernels.CHUNK, "THREADS": triton_kernels.THREADS},
            triton_kernels.OPTIONS,
        ),
    }[name]
    compiled = compile_triton(getattr(triton_kernels, name), constants, options, capability)
    assert_no_spills(compiled, tmp_path / "kernel.cubin")
