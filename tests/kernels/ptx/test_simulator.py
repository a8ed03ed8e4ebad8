"""The simulator alone: instructions against numpy, and each of its errors raised once, by PTX written here."""

from __future__ import annotations

import ctypes
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ptx.simulator_library import COMPILER, LaunchError, Module, library, registered

pytestmark = [
    pytest.mark.slow,  # compiling the simulator takes a minute, and nothing in `make test` is executed by it
    pytest.mark.skipif(
        sys.platform != "linux" or shutil.which(COMPILER) is None,
        reason=f"the simulator is for Linux, compiled by {COMPILER}",
    ),
]

Array = NDArray[Any]
SEEDS = range(8)


@pytest.fixture
def one_multiprocessor() -> Iterator[None]:
    library().ptxsim_multiprocessors(1)
    yield
    library().ptxsim_multiprocessors(8)


def module(body: str, *parameters: str, directives: str = "", variables: str = "") -> Module:
    """One kernel, `k`. Registers %r, %f, %d (fp64), %h (16 bits), %l (64 bits) and %p are there; %r0 is the thread."""
    listed = ", ".join(f".param .{kind} p{i}" for i, kind in enumerate(parameters or ["u64"] * 4))
    loads = " ".join(
        f"ld.param.{kind} {'%l' if kind == 'u64' else '%r'}{90 + i}, [p{i}];"
        for i, kind in enumerate(parameters or ["u64"] * 4)
    )
    return Module(
        f"""
.version 8.0
.target sm_90a
.address_size 64
{variables}
.visible .entry k({listed}) {directives}
{{
.reg .pred %p<20>; .reg .b32 %r<100>; .reg .f32 %f<100>; .reg .f64 %d<20>; .reg .b16 %h<20>; .reg .b64 %l<100>;
{loads}
mov.u32 %r0, %tid.x;
{body}
ret;
}}"""
    )


def loads(types: Sequence[tuple[str, str]]) -> str:
    """PTX that reads one element a thread of each array."""
    sizes = {"8": 1, "6": 2, "2": 4, "4": 8}
    lines = []
    for i, (kind, register) in enumerate(types):
        lines.append(f"mul.wide.u32 %l1, %r0, {sizes[kind[-1]]}; add.s64 %l2, %l{91 + i}, %l1;")
        lines.append(f"ld.global.{kind} {register}, [%l2];")
    return "\n".join(lines)


def apply(instruction: str, result: tuple[str, Any], *arguments: tuple[str, Array]) -> Array:
    """d = instruction(a, b, c) in as many threads as there are elements."""
    prefixes = {"f32": "%f", "f64": "%d", "b16": "%h", "u16": "%h", "u64": "%l1", "s64": "%l1", "b64": "%l1"}
    names = [(kind, f"{prefixes.get(kind, '%r')}{i + 1}") for i, (kind, _) in enumerate(arguments)]
    kind, dtype = result
    destination = f"{prefixes.get(kind, '%r')}9"
    count = len(arguments[0][1])
    out = np.zeros(count, dtype)
    text = instruction.format(destination, *(name for _, name in names))
    store = f"mul.wide.u32 %l1, %r0, {out.itemsize}; add.s64 %l2, %l90, %l1; st.global.{kind} [%l2], {destination};"
    padded = [*(array for _, array in arguments), *[out] * (3 - len(arguments))]
    module(loads(names) + text + ";" + store).launch("k", out, *padded, block=count)
    return out


RNG = np.random.default_rng(0)
X, Y, Z = (RNG.normal(size=96).astype(np.float32) for _ in range(3))
POSITIVE = np.abs(X) + np.float32(0.1)
LEFT, RIGHT = (RNG.integers(-(2**31), 2**31, 96).astype(np.int32) for _ in range(2))
TINY = (X * np.float32(1e-39)).astype(np.float32)


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("add.f32 {}, {}, {}", X + Y),
        ("sub.rn.f32 {}, {}, {}", X - Y),
        ("mul.f32 {}, {}, {}", X * Y),
        ("div.rn.f32 {}, {}, {}", X / Y),
        ("min.f32 {}, {}, {}", np.minimum(X, Y)),
        ("max.f32 {}, {}, {}", np.maximum(X, Y)),
    ],
)
def test_arithmetic_of_fp32_is_rounded_once(instruction: str, expected: Array) -> None:
    assert np.array_equal(apply(instruction, ("f32", np.float32), ("f32", X), ("f32", Y)), expected)


def test_a_fused_product_and_sum_is_rounded_once() -> None:
    got = apply("fma.rn.f32 {}, {}, {}, {}", ("f32", np.float32), ("f32", X), ("f32", Y), ("f32", Z))
    # The product of two fp32 is exact in fp64; sums of it here are too, but for the last place of fp64.
    assert np.array_equal(got, (X.astype(np.float64) * Y + Z).astype(np.float32))
    one = np.full(32, 1 + 2.0**-12, np.float32)
    got = apply("fma.rn.f32 {}, {}, {}, {}", ("f32", np.float32), ("f32", one), ("f32", one), ("f32", -one * one))
    assert np.all(got == np.float32(2.0**-24))


@pytest.mark.parametrize("rounding", ["rz", "rm", "rp"])
def test_sums_are_rounded_as_told(rounding: str) -> None:
    got = apply(f"add.{rounding}.f32 {{}}, {{}}, {{}}", ("f32", np.float32), ("f32", X), ("f32", Y)).astype(np.float64)
    exact = X.astype(np.float64) + Y
    side = {"rz": np.abs(got) <= np.abs(exact), "rm": got <= exact, "rp": got >= exact}[rounding]
    assert np.all(side)
    assert np.all(np.abs(got - exact) <= np.spacing(np.abs(got).astype(np.float32)))


@pytest.mark.parametrize(
    ("instruction", "function"),
    [
        ("sqrt.rn.f32", np.sqrt),
        ("sqrt.approx.f32", np.sqrt),
        ("rsqrt.approx.f32", lambda x: 1 / np.sqrt(x)),
        ("rcp.rn.f32", lambda x: 1 / x),
        ("ex2.approx.f32", np.exp2),
        ("lg2.approx.f32", np.log2),
        ("tanh.approx.f32", np.tanh),
    ],
)
def test_functions_are_within_one_unit_of_the_last_place(instruction: str, function: Any) -> None:
    got = apply(instruction + " {}, {}", ("f32", np.float32), ("f32", POSITIVE))
    exact = function(POSITIVE.astype(np.float64))
    assert np.all(np.abs(got - exact) <= np.spacing(np.abs(exact).astype(np.float32)))


def test_ftz_makes_subnormal_numbers_zero() -> None:
    one = np.ones_like(TINY)
    kept = apply("mul.f32 {}, {}, {}", ("f32", np.float32), ("f32", TINY), ("f32", one))
    flushed = apply("mul.ftz.f32 {}, {}, {}", ("f32", np.float32), ("f32", TINY), ("f32", one))
    assert np.array_equal(kept, TINY)
    assert np.all(kept != 0)
    assert np.all(flushed == 0)
    assert np.array_equal(np.signbit(flushed), np.signbit(TINY))


def test_a_nan_goes_through_minimum_only_where_it_is_told() -> None:
    nan = np.full(32, np.nan, np.float32)
    assert np.array_equal(apply("min.f32 {}, {}, {}", ("f32", np.float32), ("f32", nan), ("f32", X[:32])), X[:32])
    assert np.all(np.isnan(apply("min.NaN.f32 {}, {}, {}", ("f32", np.float32), ("f32", nan), ("f32", X[:32]))))


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("add.s32 {}, {}, {}", LEFT + RIGHT),
        ("mul.lo.s32 {}, {}, {}", LEFT * RIGHT),
        ("mul.hi.s32 {}, {}, {}", (LEFT.astype(np.int64) * RIGHT >> 32).astype(np.int32)),
        ("min.s32 {}, {}, {}", np.minimum(LEFT, RIGHT)),
        ("xor.b32 {}, {}, {}", LEFT ^ RIGHT),
        ("shr.s32 {}, {}, 5", LEFT >> 5),
        ("shr.u32 {}, {}, 5", (LEFT.view(np.uint32) >> 5).view(np.int32)),
        ("shl.b32 {}, {}, 40", LEFT * 0),
        ("bfe.u32 {}, {}, 4, 8", LEFT >> 4 & 255),
        ("bfe.s32 {}, {}, 4, 8", (LEFT >> 4 & 255).astype(np.uint8).view(np.int8).astype(np.int32)),
        ("prmt.b32 {}, {}, {}, 0x0123", LEFT.view(np.uint32).byteswap().view(np.int32)),
        ("lop3.b32 {}, {}, {}, 0, 0x3c", LEFT ^ RIGHT),
    ],
)
def test_integers(instruction: str, expected: Array) -> None:
    assert np.array_equal(apply(instruction, ("b32", np.int32), ("b32", LEFT), ("b32", RIGHT)), expected)


@pytest.mark.parametrize("scale", [1.0, 1e4, 1e-6, 1e30])
def test_fp32_to_16_bits(scale: float) -> None:
    x = (X * np.float32(scale)).astype(np.float32)
    with np.errstate(over="ignore"):
        expected = x.astype(np.float16)
    assert np.array_equal(apply("cvt.rn.f16.f32 {}, {}", ("b16", np.uint16), ("f32", x)), expected.view(np.uint16))
    bits = x.view(np.uint32).astype(np.uint64)
    expected_bf16 = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    assert np.array_equal(apply("cvt.rn.bf16.f32 {}, {}", ("b16", np.uint16), ("f32", x)), expected_bf16)
    packed = apply("cvt.rn.bf16x2.f32 {}, {}, {}", ("b32", np.uint32), ("f32", x), ("f32", x))
    assert np.array_equal(packed, expected_bf16.astype(np.uint32) << 16 | expected_bf16)


def test_floats_to_integers_saturate() -> None:
    x = np.array([1.5, -1.5, 2.5, 1e10, -1e10, np.nan, 0, 7.99] * 4, np.float32)
    nearest = apply("cvt.rni.s32.f32 {}, {}", ("b32", np.int32), ("f32", x))
    assert nearest[:8].tolist() == [2, -2, 2, 2**31 - 1, -(2**31), 0, 0, 8]
    assert apply("cvt.rzi.u32.f32 {}, {}", ("b32", np.uint32), ("f32", x))[:8].tolist() == [
        1,
        0,
        2,
        2**32 - 1,
        0,
        0,
        0,
        7,
    ]


def test_fp64() -> None:
    x, y = X.astype(np.float64), Y.astype(np.float64)
    assert np.array_equal(apply("div.rn.f64 {}, {}, {}", ("f64", np.float64), ("f64", x), ("f64", y)), x / y)
    assert np.array_equal(
        apply("cvt.rn.f32.f64 {}, {}", ("f32", np.float32), ("f64", x / 3)), (x / 3).astype(np.float32)
    )


def test_lanes_of_a_warp() -> None:
    x = np.arange(32, dtype=np.int32) * 3
    kinds = ("b32", np.int32)
    assert np.array_equal(apply("shfl.sync.bfly.b32 {}, {}, 1, 31, -1", kinds, ("b32", x)), x[np.arange(32) ^ 1])
    down = apply("shfl.sync.down.b32 {}, {}, 4, 31, -1", kinds, ("b32", x))
    assert np.array_equal(down, np.concatenate([x[4:], x[28:]]))
    ballot = apply("setp.gt.s32 %p1, {1}, 30; vote.sync.ballot.b32 {0}, %p1, -1", kinds, ("b32", x))
    assert np.all(ballot.view(np.uint32) == np.uint32(0xFFFFF800))
    assert np.all(apply("redux.sync.add.s32 {}, {}, -1", kinds, ("b32", x)) == x.sum())


def test_a_product_of_fragments() -> None:
    a, b = (RNG.normal(size=shape).astype(np.float16) for shape in ((16, 16), (8, 16)))  # b: by columns
    out = np.zeros((16, 8), np.float32)
    fragments = """
shr.u32 %r1, %r0, 2; and.b32 %r2, %r0, 3; shl.b32 %r3, %r1, 5; shl.b32 %r4, %r2, 2; add.s32 %r5, %r3, %r4;
cvt.u64.u32 %l1, %r5; add.s64 %l2, %l91, %l1; add.s64 %l3, %l92, %l1;
ld.global.b32 %r10, [%l2]; ld.global.b32 %r11, [%l2+256]; ld.global.b32 %r12, [%l2+16]; ld.global.b32 %r13, [%l2+272];
ld.global.b32 %r14, [%l3]; ld.global.b32 %r15, [%l3+16];
mov.f32 %f1, 0f00000000;
mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f10, %f11, %f12, %f13}, {%r10, %r11, %r12, %r13}, {%r14, %r15},
 {%f1, %f1, %f1, %f1};
shl.b32 %r6, %r2, 3; add.s32 %r7, %r3, %r6; cvt.u64.u32 %l4, %r7; add.s64 %l5, %l90, %l4;
st.global.v2.f32 [%l5], {%f10, %f11}; st.global.v2.f32 [%l5+256], {%f12, %f13};
"""
    module(fragments).launch("k", out, a, b, out)
    assert np.allclose(out, a.astype(np.float64) @ b.T.astype(np.float64), rtol=1e-6, atol=1e-6)


SHARED = ".shared .align 128 .b8 s[4096];"
ADDRESS = "shl.b32 %r1, %r0, 2; mov.u32 %r2, s; add.s32 %r3, %r2, %r1;"


@pytest.mark.parametrize("seed", SEEDS)
def test_cp_async_is_there_after_its_wait(seed: int) -> None:
    x, out = np.arange(32, dtype=np.int32), np.zeros(32, np.int32)
    body = (
        SHARED
        + ADDRESS
        + "cvt.u64.u32 %l1, %r1; add.s64 %l2, %l91, %l1; add.s64 %l3, %l90, %l1;"
        + "st.shared.b32 [%r3], -1; setp.lt.u32 %p1, %r0, 16; selp.b32 %r4, 4, 0, %p1;"
        + "cp.async.ca.shared.global [%r3], [%l2], 4, %r4; cp.async.commit_group;{}"
        + "ld.shared.b32 %r5, [%r3]; st.global.b32 [%l3], %r5;"
    )
    module(body.format("cp.async.wait_group 0;")).launch("k", out, x, x, x, seed=seed)
    assert np.array_equal(out, np.where(x < 16, x, 0))


def test_a_cp_async_without_a_wait_shows() -> None:
    x, seen = np.arange(32, dtype=np.int32), set()
    body = SHARED + ADDRESS + "cvt.u64.u32 %l1, %r1; add.s64 %l2, %l91, %l1; add.s64 %l3, %l90, %l1;"
    body += "st.shared.b32 [%r3], -1; cp.async.ca.shared.global [%r3], [%l2], 4; cp.async.commit_group;"
    body += "ld.shared.b32 %r5, [%r3]; st.global.b32 [%l3], %r5;"
    kernel = module(body)
    for seed in range(20):
        out = np.zeros(32, np.int32)
        kernel.launch("k", out, x, x, x, seed=seed)
        seen.add(bool(np.array_equal(out, x)))
    assert False in seen


# Block 0 writes a number and then a flag; block 1 polls the flag, then reads the number.
HANDSHAKE = """
setp.ne.u32 %p1, %r0, 0; @%p1 bra $end;
mov.u32 %r1, %ctaid.x; setp.ne.u32 %p2, %r1, 0; @%p2 bra $reader;
st.global.b32 [%l90], 7;
{release}
atom.global.exch.b32 %r2, [%l91], 1;
bra $end;
$reader: {early}
$wait: ld.volatile.global.b32 %r3, [%l91]; setp.eq.u32 %p3, %r3, 0; @%p3 bra $wait;
{acquire}
ld.global.b32 %r4, [%l90]; st.global.b32 [%l92], %r4;
$end:
"""


def handshakes(release: str, acquire: str, early: str = "") -> set[int]:
    kernel = module(HANDSHAKE.format(release=release, acquire=acquire, early=early))
    seen = set()
    for seed in range(40):
        number, flag, out = (np.zeros(8, np.int32) for _ in range(3))
        kernel.launch("k", number, flag, out, out, grid=2, seed=seed)
        seen.add(int(out[0]))
    return seen


def test_what_a_fence_orders_other_blocks_see() -> None:
    assert handshakes("fence.acq_rel.gpu;", "fence.acq_rel.gpu;") == {7}
    assert handshakes("membar.gl;", "membar.gl;") == {7}


@pytest.mark.parametrize(
    ("release", "acquire"), [("", "membar.gl;"), ("membar.cta;", "membar.gl;"), ("membar.gl;", "")]
)
def test_a_fence_that_is_not_there_shows(release: str, acquire: str) -> None:
    assert handshakes(release, acquire) == {0, 7}


TICKETS = """
atom.global.add.u32 %r1, [%l90], 1;
barrier.cluster.arrive; barrier.cluster.wait;
mov.u32 %r2, %ctaid.x; mul.wide.u32 %l1, %r2, 4; add.s64 %l2, %l91, %l1;
setp.eq.u32 %p1, %r0, 0; @%p1 st.global.b32 [%l2], %r1;
"""


@pytest.mark.parametrize("cluster", [1, 4])
def test_blocks_start_in_any_order(cluster: int, one_multiprocessor: None) -> None:
    """Forty blocks, of which eight are there at once; those of a cluster meet."""
    kernel, orders = module(TICKETS), set()
    for seed in SEEDS:
        count, tickets = np.zeros(1, np.int32), np.zeros(40, np.int32)
        kernel.launch("k", count, tickets, count, count, grid=40, block=1, cluster=cluster, seed=seed)
        assert sorted(tickets) == list(range(40))
        orders.add((tickets[0] < 8, tickets[-1] < 8))
    assert orders >= {(True, False), (False, True), (False, False)}


def test_a_block_that_waits_for_one_that_finds_no_room_is_a_deadlock(one_multiprocessor: None) -> None:
    """Nine blocks, of which eight are there at once, wait for one of them."""
    kernel = module(
        """
mov.u32 %r2, %ctaid.x; setp.ne.u32 %p1, %r2, 4; @%p1 bra $w; atom.global.add.u32 %r1, [%l90], 1;
$w: ld.volatile.global.b32 %r1, [%l90]; setp.eq.u32 %p1, %r1, 0; @%p1 bra $w;
"""
    )

    def outcome(seed: int) -> str:
        flag = np.zeros(1, np.int32)
        try:
            kernel.launch("k", flag, flag, flag, flag, grid=9, block=1, seed=seed)
        except LaunchError as error:
            return str(error).partition(",")[0]
        return "ends"

    assert {outcome(seed) for seed in range(40)} == {"ends", "deadlock (everybody polls"}


def failing(message: str, body: str, *arguments: Array, seeds: Sequence[int] = (1,), **launch: Any) -> None:
    """Asserts that the kernel fails with this message, and that a launch after it does not."""
    padded = [*arguments, *[np.zeros(64, np.int32)] * (4 - len(arguments))]
    kernel = module(body)
    errors = []
    for seed in seeds:
        try:
            kernel.launch("k", *padded, seed=seed, **launch)
        except LaunchError as error:
            errors.append(str(error))
    assert errors
    for error in errors:
        assert re.search(message, error), error
    module("").launch("k", *padded)


# Every lane leaves its number in shared memory, and takes its neighbour's.
NEIGHBOURS = """
.shared .align 4 .b8 t[128]; mov.u32 %r1, t; shl.b32 %r2, %r0, 2; add.u32 %r3, %r1, %r2;
st.shared.b32 [%r3], -1; bar.sync 0; st.shared.b32 [%r3], %r0;
{meet}
xor.b32 %r4, %r2, 4; add.u32 %r5, %r1, %r4; ld.shared.b32 %r6, [%r5];
cvt.u64.u32 %l1, %r2; add.s64 %l2, %l90, %l1; st.global.b32 [%l2], %r6;
"""


@pytest.mark.parametrize(("meet", "always"), [("bar.warp.sync 0xffffffff;", True), ("", False)])
def test_lanes_of_a_warp_go_apart(meet: str, always: bool) -> None:
    kernel, right = module(NEIGHBOURS.format(meet=meet)), set()
    for seed in range(60):
        out = np.zeros(32, np.int32)
        kernel.launch("k", out, out, out, out, seed=seed)
        right.add(bool(np.array_equal(out, np.arange(32) ^ 1)))
    assert right == ({True} if always else {True, False})


# The second warpgroup takes what the first gives back.
REGISTERS = "setp.lt.u32 %p1, %r0, 128; @%p1 bra $less; {more} bra $end; $less: {less} $end:"


def test_registers_go_from_warp_to_warp() -> None:
    x, bounds = np.zeros(4, np.int32), ".maxntid 256, 1, 1 .minnctapersm 2"
    more, less = "setmaxnreg.inc.sync.aligned.u32 200;", "setmaxnreg.dec.sync.aligned.u32 56;"
    for seed in SEEDS:
        module(REGISTERS.format(more=more, less=less), directives=bounds).launch("k", x, x, x, x, block=256, seed=seed)
    for message, body in (
        ("deadlock.*for registers", REGISTERS.format(more=more, less="")),
        ("the wrong way, from 128", REGISTERS.format(more=less.replace("dec", "inc"), less="")),
        ("setmaxnreg to 60", REGISTERS.format(more="", less=less.replace("56", "60"))),
    ):
        with pytest.raises(LaunchError, match=message):
            module(body, directives=bounds).launch("k", x, x, x, x, block=256)


WGMMA = "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%f0, %f1, %f2, %f3}, %l1, %l1, 0, 1, 1, 0, 0;"
BARRIER = ".shared .align 8 .b64 m; mov.u32 %r2, m;"
INIT = BARRIER + "setp.eq.u32 %p1, %r0, 0; @%p1 mbarrier.init.shared.b64 [%r2], 1; bar.sync 0;"


@pytest.mark.parametrize(
    ("message", "body"),
    [
        ("misaligned address.*PTX line", "ld.global.b32 %r1, [%l90+2];"),
        ("misaligned address", SHARED + "mov.u32 %r2, s; st.shared.v4.b32 [%r2+8], {%r0, %r0, %r0, %r0};"),
        ("null pointer", "mov.b64 %l1, 0; ld.global.b32 %r1, [%l1];"),
        ("not mapped", "mov.b64 %l1, 0x7000000000000000; ld.global.b32 %r1, [%l1];"),
        ("shared memory out of bounds", SHARED + "mov.u32 %r2, s; ld.shared.b32 %r1, [%r2+4096];"),
        ("before it was written, byte 4", SHARED + "mov.u32 %r2, s; st.shared.b32 [%r2], 1; ld.shared.b64 %l1, [%r2];"),
        ("under a predicate", "setp.eq.u32 %p1, %r0, 3; @%p1 bar.sync 0;"),
        (
            "wait at different instructions",
            "setp.lt.u32 %p1, %r0, 16; @%p1 bra $a; bar.sync 1; bra $e; $a: bar.sync 2; $e:",
        ),
        ("does not take part", "setp.lt.u32 %p1, %r0, 16; @%p1 shfl.sync.bfly.b32 %r1, %r0, 16, 31, 0xffff;"),
        ("not in the mask", "vote.sync.ballot.b32 %r1, 1, 0xffff;"),
        ("different masks", "setp.lt.u32 %p1, %r0, 16; selp.b32 %r1, 0x7fffffff, -1, %p1; bar.warp.sync %r1;"),
        ("trap", "trap;"),
        ("deadlock", "bar.sync 0, 64;"),
        ("deadlock.*mbarrier at byte 0", INIT + "$w: mbarrier.try_wait.parity.shared.b64 %p2, [%r2], 0; @!%p2 bra $w;"),
        ("nobody initialised", SHARED + "mov.u32 %r2, s; st.shared.b64 [%r2], 0; mbarrier.arrive.shared.b64 _, [%r2];"),
        ("too many arrivals", INIT + "mbarrier.arrive.shared.b64 _, [%r2], 5;"),
        ("different counts", "setp.lt.u32 %p1, %r0, 32; @%p1 bar.arrive 1, 96; @!%p1 bar.sync 1, 128;"),
        (
            "without wgmma.fence",
            "mov.b64 %l1, 0;\n" + WGMMA,
        ),
    ],
)
def test_an_error_names_itself(message: str, body: str) -> None:
    failing(message, body, block=64 if "counts" in message else 128 if "wgmma" in message else 32)


def test_a_spin_that_nobody_ends_is_a_deadlock() -> None:
    failing("everybody polls", "$w: ld.volatile.global.b32 %r1, [%l90]; setp.eq.u32 %p1, %r1, 0; @%p1 bra $w;")


def test_memory_that_is_not_registered_is_out_of_bounds() -> None:
    x = np.zeros(64, np.int32)
    with registered(x[:40]):
        module("ld.global.b32 %r1, [%l90+156];").launch("k", x, x, x, x)
        for body, message in (
            ("ld.global.b32 %r1, [%l90+160];", "a load of 4 bytes.*4 bytes beyond the end of 'array 0' of 160 bytes"),
            ("st.global.b32 [%l90+-4], %r1;", "a store to 4 bytes.*4 bytes before 'array 0'"),
            ("cp.async.ca.shared.global [s], [%l90+160], 4;", "a load of 4 bytes"),
        ):
            with pytest.raises(LaunchError, match=message):
                module((SHARED if "cp" in body else "") + body).launch("k", x, x, x, x)
    with registered(x, writable=False), pytest.raises(LaunchError, match="inside 'array 0'.*read only"):
        module("st.global.b32 [%l90], %r0;").launch("k", x, x, x, x)


class TensorMap:
    """A map of a matrix of fp32, aligned as the driver asks."""

    def __init__(self, matrix: Array, box: Sequence[int], swizzle: int = 0, columns: int | None = None) -> None:
        room = np.zeros(256, np.uint8)
        self.bytes = room[-room.ctypes.data % 64 :][:128]
        sides = (ctypes.c_uint64 * 2)(columns or matrix.shape[1], matrix.shape[0])
        strides = (ctypes.c_uint64 * 1)(matrix.strides[0])
        error = library().ptxsim_tensor_map(
            ctypes.c_void_p(self.bytes.ctypes.data), 4, 2, ctypes.c_void_p(matrix.ctypes.data), sides, strides,
            (ctypes.c_uint32 * 2)(*box), swizzle,
        )  # fmt: skip
        if error is not None:
            raise LaunchError(error.decode())


def aligned(rows: int, columns: int) -> Array:
    room = np.arange(rows * columns + 32, dtype=np.float32)
    return room[-room.ctypes.data // 4 % 32 :][: rows * columns].reshape(rows, columns)


TILE = """
setp.eq.u32 %p1, %r0, 0;
@%p1 mbarrier.init.shared.b64 [m], 1;
bar.sync 0;
@%p1 mbarrier.arrive.expect_tx.shared.b64 _, [m], {expected};
@%p1 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [s], [%l91, {{{x}, {y}}}], [m];
$w: mbarrier.try_wait.parity.shared.b64 %p2, [m], 0; @!%p2 bra $w;
shl.b32 %r1, %r0, 2; mov.u32 %r2, s; add.s32 %r3, %r2, %r1; ld.shared.b32 %r4, [%r3];
cvt.u64.u32 %l1, %r1; add.s64 %l2, %l90, %l1; st.global.b32 [%l2], %r4;
"""


def tile(x: int, y: int, expected: int = 128) -> str:
    return SHARED + ".shared .align 8 .b64 m;" + TILE.format(x=x, y=y, expected=expected)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("x", "y"), [(0, 0), (4, 3), (6, 2), (-2, -1)])
def test_a_tile_of_a_tensor_is_zero_outside(x: int, y: int, seed: int) -> None:
    matrix, out = aligned(8, 12), np.full(32, -1, np.float32)
    module(tile(x, y)).launch("k", out, TensorMap(matrix, (8, 4)).bytes, out, out, seed=seed)
    padded = np.pad(matrix, ((4, 4), (8, 8)))
    assert np.array_equal(out.reshape(4, 8), padded[y + 4 : y + 8, x + 8 : x + 16])


def test_tiles_that_go_wrong() -> None:
    matrix = aligned(8, 12)
    box = TensorMap(matrix, (8, 4)).bytes
    failing("deadlock", tile(0, 0, expected=256), np.zeros(32, np.float32), box)
    blank = aligned(8, 12)
    blank[:] = 0
    failing("not a tensor map", tile(0, 0), np.zeros(32, np.float32), blank)
    unfinished = tile(0, 0).split("$w:")[0]
    failing("left", unfinished, np.zeros(32, np.float32), box, seeds=range(20))
    with registered(matrix[:4]), pytest.raises(LaunchError, match="global memory out of bounds"):
        module(tile(0, 4)).launch("k", matrix, box, matrix, matrix)


@pytest.mark.parametrize(
    ("message", "box", "swizzle", "offset"),
    [
        ("inner side is not a multiple of 16", (3, 4), 0, 0),
        ("longer than the swizzle", (16, 4), 32, 0),
        ("a box of 300", (300, 4), 0, 0),
        ("address is not aligned", (4, 4), 0, 1),
    ],
)
def test_a_tensor_map_the_driver_would_refuse(message: str, box: Sequence[int], swizzle: int, offset: int) -> None:
    with pytest.raises(LaunchError, match=message):
        TensorMap(aligned(8, 12)[:, offset:], box, swizzle)


def test_a_stride_the_driver_would_refuse() -> None:
    with pytest.raises(LaunchError, match="a stride of 40 bytes"):
        TensorMap(aligned(8, 10), (4, 4))


# One product of 64 x 8 x 16 whose factors are written by threads: ones, in a core-matrix layout without swizzle.
PRODUCT = (
    SHARED
    + """
mov.u32 %r2, s; shl.b32 %r1, %r0, 5; add.s32 %r3, %r2, %r1;
st.shared.v4.b32 [%r3], {{0x3c003c00, 0x3c003c00, 0x3c003c00, 0x3c003c00}};
st.shared.v4.b32 [%r3+16], {{0x3c003c00, 0x3c003c00, 0x3c003c00, 0x3c003c00}};
{fence}
bar.sync 0;
shr.u32 %r4, %r2, 4; cvt.u64.u32 %l1, %r4; or.b64 %l2, %l1, 0x1000080000;
mov.f32 %f0, 0f00000000; mov.f32 %f1, %f0; mov.f32 %f2, %f0; mov.f32 %f3, %f0;
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {{%f0, %f1, %f2, %f3}}, %l2, %l2, 0, 1, 1, 0, 0;
wgmma.commit_group.sync.aligned;
wgmma.wait_group.sync.aligned 0;
shl.b32 %r5, %r0, 2; cvt.u64.u32 %l3, %r5; add.s64 %l4, %l90, %l3; st.global.f32 [%l4], %f2;
"""
)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_warpgroup_reads_what_a_proxy_fence_published(seed: int) -> None:
    out = np.zeros(128, np.float32)
    module(PRODUCT.format(fence="fence.proxy.async;")).launch("k", out, out, out, out, block=128, seed=seed)
    assert np.all(out == 16)


def test_a_proxy_fence_that_is_not_there_shows() -> None:
    wrong = 0
    for seed in SEEDS:
        out = np.zeros(128, np.float32)
        module(PRODUCT.format(fence="")).launch("k", out, out, out, out, block=128, seed=seed)
        wrong += not np.all(out == 16)
    assert wrong > 0


@pytest.mark.parametrize(
    ("message", "launch"),
    [
        ("2048 threads of at most 1024", {"block": 2048}),
        ("a grid of 0", {"grid": 0}),
        ("not a multiple of the cluster", {"grid": 3, "cluster": 2}),
        ("a cluster of 16", {"grid": 16, "cluster": 16}),
        ("300000 bytes of dynamic shared memory", {"shared": 300000}),
    ],
)
def test_a_launch_that_is_refused(message: str, launch: dict[str, Any]) -> None:
    x = np.zeros(4, np.int32)
    with pytest.raises(LaunchError, match=message):
        module("").launch("k", x, x, x, x, **launch)


@pytest.mark.parametrize(
    ("message", "body"),
    [
        ("does not know: frobnicate", "frobnicate.b32 %r1, %r2;"),
        ("no such label: \\$nowhere", "bra $nowhere;"),
        ("not known: %q1", "add.s32 %r1, %q1, 1;"),
        ("does not know: add.sat", "add.sat.s32 %r1, %r0, 1;"),
        ("does not know: add.cc", "add.cc.u32 %r1, %r0, 1;"),
        ("does not know: fma.rn.sat", "fma.rn.sat.f16 %h1, %h2, %h3, %h4;"),
        ("does not know: min.xorsign", "min.xorsign.abs.f32 %f1, %f2, %f3;"),
        ("does not know: set.eq.and", "set.eq.and.u32.s32 %r1, %r0, 1, %p1;"),
        ("does not know: ld.global.b128", "ld.global.b128 %l1, [%l90];"),
        ("two results", "lop3.or.b32 %r1|%p1, %r0, %r0, %r0, 0x80, %p2;"),
    ],
)
def test_ptx_that_is_not_understood(message: str, body: str) -> None:
    with pytest.raises(LaunchError, match=message):
        module(body)
