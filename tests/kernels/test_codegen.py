"""What the compilers made of the kernels, read on any machine: targets, spills, width of loads and stores."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from steepest.ops import backend
from support.cuobjdump import binary, by_architecture, dump

pytestmark = pytest.mark.kernels


def test_binary_holds_the_architectures_it_claims() -> None:
    assert backend.extension is not None
    images = re.findall(r"\.(sm_\w+)\.(cubin|ptx)$", dump("--list-elf", "--list-ptx", binary()), re.MULTILINE)
    held = {name if kind == "cubin" else name.replace("sm_", "compute_") for name, kind in images}
    assert held == set(backend.extension.build_info()["architectures"])


@dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture; `name` as in KERNELS, `shared` bytes of its own, `sass` its machine code."""

    name: str
    registers: int
    stack: int
    shared: int
    local: int
    sass: str


#: Every kernel of all architectures, by parts of its mangled name, where an identifier stands after its length.
KERNELS = {
    "grad_stats flat": ("10grad_stats", "12FlatGradient"),
    "grad_stats strided": ("10grad_stats", "15StridedGradient"),
    "decide_steps": ("12decide_steps",),
    "update_moments flat": ("14update_moments", "8FlatItem"),
    "update_moments strided": ("14update_moments", "11StridedItem"),
    "apply_update flat": ("12apply_update", "8FlatItem"),
    "apply_update strided": ("12apply_update", "11StridedItem"),
    "normalize flat": ("26normalize_and_apply_update", "8FlatItem"),
    "normalize strided": ("26normalize_and_apply_update", "11StridedItem"),
    "chain numbers": ("13chain_numbers",),
    "matrix sum": ("10matrix_sum",),
    "small polar 64": ("11small_polarILi64E",),
    "small polar 128": ("11small_polarILi128E",),
    "small polar 256": ("11small_polarILi256E",),
    **{f"eigh {32 * spans}": (f"7refreshILi{spans}E",) for spans in (1, 2, 3, 4)},
}
#: Where one block of 256 threads has a multiprocessor; elsewhere two share its 65536 registers.
ALONE = ("small polar 128", "small polar 256", "eigh 128")
IN_CLUSTERS = ("small polar 256",)  # empty before sm_90


def named(mangled: str) -> str:
    """The kernel's name in KERNELS."""
    for name, parts in KERNELS.items():
        if all(part in mangled for part in parts):
            return name
    raise AssertionError(f"{mangled} is not one of {', '.join(KERNELS)}")


@pytest.fixture(scope="module")
def cubins() -> dict[str, list[Kernel]]:
    """The kernels in the binary by architecture; reading its code takes seconds."""
    sass = {(arch, name): body for arch, name, body in by_architecture(dump("--dump-sass", binary()), r"\bFunction : ")}
    found: dict[str, list[Kernel]] = {}
    for arch, mangled, body in by_architecture(dump("--dump-resource-usage", binary()), r"\bFunction "):
        numbers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", body)
        assert numbers is not None, body
        if "symm_gemm" in mangled:
            continue  # for one architecture only: tests/kernels/test_codegen_hopper.py
        kernel = Kernel(named(mangled), *map(int, numbers.groups()), sass[arch, mangled])
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
            assert kernel.registers <= (255 if kernel.name in ALONE else 128), where
            assert not re.search(r"\b(LDL|STL)\b", kernel.sass), f"{where} uses local memory"


def test_small_polar_multiplies_on_tensor_cores(cubins: dict[str, list[Kernel]]) -> None:
    for architecture, held in cubins.items():
        for kernel in (kernel for kernel in held if kernel.name.startswith("small polar")):
            where = f"{kernel.name} on {architecture}"
            assert kernel.shared % 1024 == 0, where  # all is asked for at the launch; since sm_90 1 KB is the system's
            if kernel.name in IN_CLUSTERS and not has_clusters(architecture):
                assert "HMMA" not in kernel.sass, where
                continue
            assert kernel.sass.count("HMMA.16816.F32") >= 60, where
            for access in (r"LDSM\.16\.M88\.4", r"LDSM\.16\.MT88\.4", r"LDG\.E\.128", r"STS\.128"):
                assert re.search(rf"\b{access}\b", kernel.sass), (where, access)


def has_clusters(architecture: str) -> bool:
    return int(re.sub(r"\D", "", architecture)) >= 90


def test_small_polar_reaches_the_other_blocks_of_its_cluster(cubins: dict[str, list[Kernel]]) -> None:
    """By addresses that shared memory of any block has: 16 bytes of a row, 2 of a transposed entry."""
    for architecture, held in cubins.items():
        for kernel in (kernel for kernel in held if kernel.name.startswith("small polar")):
            where, clustered = f"{kernel.name} on {architecture}", kernel.name in IN_CLUSTERS
            # Before and after R from X, Z, R transposed and R are stored, twice in each of three sums, and around the
            # exchange of Q: 8 + 6 + 2.
            barriers = len(re.findall(r"\bUCGABAR_WAIT\b", kernel.sass))
            assert barriers == (16 if clustered and has_clusters(architecture) else 0), where
            for access in (r"LD\.E\.128", r"ST\.E\.U16"):
                assert bool(re.search(rf"\b{access}\b", kernel.sass)) == (barriers > 0), (where, access)


def test_eigh_computes_in_fp32_in_shared_memory(cubins: dict[str, list[Kernel]]) -> None:
    """Two elements at once, multiplied and added in one instruction, and no tensor cores."""
    for architecture, held in cubins.items():
        for kernel in (kernel for kernel in held if kernel.name.startswith("eigh")):
            where = f"{kernel.name} on {architecture}"
            assert kernel.shared % 1024 <= 512, where  # as above, in the 1 KB that plan.cpp leaves
            assert re.search(r"\bLDS\.64\b", kernel.sass), where
            spans = int(kernel.name.split()[1]) // 32
            assert len(re.findall(r"\bFFMA", kernel.sass)) >= 4 * 2 * (2 * spans) ** 2, where
            assert "HMMA" not in kernel.sass, where


def test_flat_kernels_move_16_bytes(cubins: dict[str, list[Kernel]]) -> None:
    """The widest access there is before sm_100: eight elements are one of them or, of fp32, two."""
    for architecture, held in cubins.items():
        for kernel in (kernel for kernel in held if "flat" in kernel.name and not kernel.name.startswith("normalize")):
            where = f"{kernel.name} on {architecture}"
            assert re.search(r"\bLDG\.E\.128\b", kernel.sass), where
            stores = re.findall(r"\bSTG\.E(\.128)?(?:\.STRONG\.\w+)? ", kernel.sass)
            wide, narrow = stores.count(".128"), stores.count("")
            if kernel.name.startswith("grad_stats"):
                assert wide == 0, f"{where} stores elements; it only reads them"
            else:  # the last elements of a chunk go one by one, a few stores in the code
                assert wide > narrow, f"{where}: {wide} stores of 16 bytes and {narrow} of 4"


def test_normalization_moves_16_bytes_and_waits_past_the_caches(cubins: dict[str, list[Kernel]]) -> None:
    """Second moments and divided entries, two stores each of eight, and the weights' five where items are flat."""
    for architecture, held in cubins.items():
        for kernel in (kernel for kernel in held if kernel.name.startswith("normalize")):
            where = f"{kernel.name} on {architecture}"
            assert re.search(r"\bLDG\.E\.128\b", kernel.sass), where
            stores = len(re.findall(r"\bSTG\.E\.128\b", kernel.sass))
            assert stores == (9 if "flat" in kernel.name else 4), f"{where}: {stores} stores of 16 bytes"
            assert len(re.findall(r"\bSTG\.E\.64\.STRONG\.GPU\b", kernel.sass)) == 1, f"{where}: the flag"
            waits = re.search(r"\bLDG\.E\.64\.STRONG\.GPU\b.*?\bNANOSLEEP\b", kernel.sass, re.DOTALL)
            assert waits is not None, f"{where}: the wait for it"
            assert "CCTL.IVALL" in kernel.sass, f"{where}: what the first-level cache has is forgotten"


TARGETS = [80, 90, 100]

# Element types of gradient, momentum, second moment, direction's input, parameter, mantissa in `update_moments` (Muon,
# MuAdam into fp16, AdamW in fp32, AdamW in bf16 with a mantissa), of the last four in `apply_update`, of the gradient
# in `grad_stats`.
TRITON_GROUPS = {
    "grad_stats_kernel": ["fp32", "bf16"],
    "update_moments_kernel": [
        "bf16 bf16 - bf16 - -",
        "fp32 fp32 fp32 fp16 - -",
        "fp32 fp32 fp32 - fp32 -",
        "bf16 bf16 bf16 - bf16 int16",
    ],
    "apply_update_kernel": ["- bf16 fp32 -", "fp32 fp16 bf16 int16"],
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

    # 16 bytes of a 2-byte type and twice 16 of a 4-byte one; a skipped `update_moments` clears the input as well.
    sixteens = {argument: 0 if t is None else t.primitive_bitwidth // 16 for argument, t in zip(elements, types)}
    d, p, low = (sixteens.get(argument, 0) for argument in "DPL")
    everything = sum(sixteens.values())
    if name == "grad_stats_kernel":
        loads, stores = everything, 0
    elif name == "update_moments_kernel":
        loads, stores = everything - d, everything - sixteens["G"] + d
    else:
        loads, stores = everything, p + low
    assert (vectors("ld"), vectors("st")) == (loads, stores)


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("name", ["rows_kernel", "rows_kernel, decided apart", "sums_kernel", "update_moments_kernel"])
def test_triton_compiles_for(capability: int, name: str, triton_kernels: Any, tmp_path: Path) -> None:
    """The kernels that finish, and elements one at a time where an address is not a multiple of 16."""
    import triton.language as tl

    types = {"G": tl.bfloat16, "M": tl.bfloat16, "V": tl.float32, "D": None, "P": tl.bfloat16, "L": tl.int16}
    sizes = {"CHUNK": triton_kernels.CHUNK, "LINES": triton_kernels.LINES}
    constants, options = {
        "rows_kernel": ({"MEASURE": True, "DECIDE": True, **sizes}, triton_kernels.FINISH_OPTIONS),
        "rows_kernel, decided apart": (
            {"partials": None, "found_inf": None, "MEASURE": False, "DECIDE": True, **sizes},
            triton_kernels.FINISH_OPTIONS,
        ),
        "sums_kernel": ({"AFTER": False, **sizes}, triton_kernels.FINISH_OPTIONS),
        "update_moments_kernel": (
            {**types, "ALIGNED": False, "CHUNK": triton_kernels.CHUNK, "THREADS": triton_kernels.THREADS},
            triton_kernels.OPTIONS,
        ),
    }[name]
    compiled = compile_triton(getattr(triton_kernels, name.split(",")[0]), constants, options, capability)
    assert_no_spills(compiled, tmp_path / "kernel.cubin")
