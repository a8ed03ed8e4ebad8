"""Fused weight update in Triton: p_i <- keep[i] p_i - step[i] u_i, one launch for each pair of dtypes.

Program (i, j) of a grid (tensors, lanes) takes blocks j, j + lanes, ... of tensor i, whose addresses come from a table,
so tensors of any sizes share a launch. Both tensors of a pair are read as one flat range: their strides are equal and
dense.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

# 16 bytes of bf16 or 32 of fp32 per thread and block, 4 warps: enough loads in flight to keep memory busy, and small
# enough for a bias. Nothing to tune by shape: the kernel is bound by memory alone.
BLOCK = 1024
# k x - s d as one fused multiply-add, said outright because the default differs between Triton versions.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
LANES = 256  # programs for each tensor at most
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def after_kernel(
    table,  # (3, n) int64: address of p, address of u, number of elements
    index,  # (n,) int64: position of each tensor in keep and step
    keep,
    step,
    n,
    P: tl.constexpr,  # element types
    U: tl.constexpr,
    ALIGNED: tl.constexpr,  # all addresses are multiples of 16 bytes
    BLOCK: tl.constexpr,
):
    # p: (numel,) P, read and written; u: (numel,) U.     p <- keep p - step u  in fp32
    i = tl.program_id(0)
    p = tl.load(table + i).to(tl.pointer_type(P))
    u = tl.load(table + n + i).to(tl.pointer_type(U))
    if ALIGNED:
        p = tl.multiple_of(p, 16)
        u = tl.multiple_of(u, 16)
    numel = tl.load(table + 2 * n + i)
    at = tl.load(index + i)
    k = tl.load(keep + at)
    s = tl.load(step + at)
    lane = tl.program_id(1)
    # A bound known to be a multiple of 16 lets the compiler move 16 bytes at a time; the last few elements come after.
    # Where step is 0 the update is not read: it may hold NaN.
    body = numel // 16 * 16
    readable = tl.where(s == 0, 0, numel // 16) * 16
    start = lane.to(tl.int64) * BLOCK
    while start < body:
        offsets = tl.multiple_of(start, BLOCK) + tl.arange(0, BLOCK)
        d = tl.load(u + offsets, mask=offsets < readable, other=0.0).to(tl.float32)
        x = tl.load(p + offsets, mask=offsets < body, other=0.0).to(tl.float32)
        tl.store(p + offsets, (k * x - s * d).to(P), mask=offsets < body)
        start += tl.num_programs(1) * BLOCK
    if lane == 0:
        offsets = body + tl.arange(0, 16)
        d = tl.load(u + offsets, mask=offsets < tl.where(s == 0, 0, numel), other=0.0).to(tl.float32)
        x = tl.load(p + offsets, mask=offsets < numel, other=0.0).to(tl.float32)
        tl.store(p + offsets, (k * x - s * d).to(P), mask=offsets < numel)


def can_use(params: Sequence[Tensor], updates: Sequence[Tensor]) -> str | None:
    """None when `after` takes this call, else the reason: it reads addresses, so it is neither traced nor captured."""
    if torch.compiler.is_compiling():
        return "a table of addresses cannot be traced by torch.compile"
    if _is_capturing(params):
        return "a table of addresses cannot be replayed by a CUDA graph"
    for i, (p, u) in enumerate(zip(params, updates)):
        if p.dtype not in DTYPES or u.dtype not in DTYPES:
            return f"pair {i} is {p.dtype} and {u.dtype}; accepted are {', '.join(map(str, DTYPES))}"
        if not _is_flat(p, u):
            return f"pair {i} is not one dense range of memory with equal strides"
    return None


def _is_capturing(params: Sequence[Tensor]) -> bool:
    if not params or params[0].device.type != "cuda":
        return False
    with _on(params[0].device):
        return torch.cuda.is_current_stream_capturing()


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches, and torch answers about streams, on the current device: makes it the tensors' own."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _is_flat(p: Tensor, u: Tensor) -> bool:
    if p.is_contiguous() and u.is_contiguous():
        return True
    by_stride = sorted(range(p.dim()), key=p.stride, reverse=True)
    return p.stride() == u.stride() and p.permute(by_stride).is_contiguous()


def after(params: Sequence[Tensor], updates: Sequence[Tensor], keep: Tensor, step: Tensor) -> None:
    """Equals `steepest.ops.after.reference` where `can_use` has no objection; params are mutated.

    Slower than the compiled kernel for many tiny tensors: the table of addresses is built in Python in every call.
    """
    groups: dict[tuple[torch.dtype, torch.dtype], list[int]] = {}
    for i, (p, u) in enumerate(zip(params, updates)):
        if p.numel() > 0:
            groups.setdefault((p.dtype, u.dtype), []).append(i)
    keep, step = keep.contiguous(), step.contiguous()
    for (p_dtype, u_dtype), members in groups.items():
        pointers = [[t[i].data_ptr() for i in members] for t in (params, updates)]
        sizes = [params[i].numel() for i in members]
        rows = _to_device([*pointers, sizes, members], keep.device)
        lanes = min(LANES, triton.cdiv(max(sizes), BLOCK))
        with _on(keep.device):
            after_kernel[(len(members), lanes)](
                rows,
                rows[3],
                keep,
                step,
                len(members),
                P=DTYPES[p_dtype],
                U=DTYPES[u_dtype],
                ALIGNED=all(address % 16 == 0 for address in pointers[0] + pointers[1]),
                BLOCK=BLOCK,
                **OPTIONS,
            )


def _to_device(rows: list[list[int]], device: torch.device) -> Tensor:
    """The table on the device, through pinned memory so that the host does not wait for the copy."""
    if device.type != "cuda":
        return torch.tensor(rows, dtype=torch.int64, device=device)
    return torch.tensor(rows, dtype=torch.int64, pin_memory=True).to(device, non_blocking=True)
