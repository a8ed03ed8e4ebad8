"""The weight update that ends every step, for many tensors at once.

    p_i <- keep[i] p_i - step[i] u_i          decoupled weight decay (keep = 1 - lr wd) and the scaled direction

Backends: `torch.ops.steepest.after` (csrc/multi_tensor/after.cu), `steepest.kernels.after` (Triton), and `reference`
below, which is also what the compiled op runs on CPU tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from . import backend as _backend

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KERNEL_FLOATS = FLOATS[:3]
STRIDED_DIMS = 5  # what the CUDA kernel walks; kMaxDims in csrc/multi_tensor/layout.h
# Elements the CPU reference handles at a time: its temporaries take 1 MB in fp32 instead of the size of an embedding.
# A pair that is not contiguous goes by whole rows, as many as fit and at least one.
# On two cores no slower than whole tensors, within the noise of the measurement.
CPU_CHUNK = 1 << 18


def after(
    params: Sequence[Tensor], updates: Sequence[Tensor], keep: Tensor, step: Tensor, *, backend: str = "auto"
) -> None:
    """p_i <- keep[i] p_i - step[i] u_i, in place, in as few launches as the backend allows.

    params:  fp32, bf16, fp16 (fp64 on torch) tensors of any shapes and strides; mutated.
    updates: one for each parameter, of its shape, in any of these types; not mutated, and not read where step[i] is 0,
             so it may hold NaN there. (keep, step) = (1, 0) leaves a parameter as it is, bit for bit.
    keep, step: (len(params),) on the parameters' device, fp32 (fp64 when a parameter is fp64); read on the device, so
             the host never waits.
    backend: "auto", "cuda", "triton" or "torch".

    Arithmetic is fp32 (fp64 for fp64 parameters) with one rounding when a parameter is stored.
    Raises ValueError (lengths, shapes, devices, unknown backend), TypeError (types) and RuntimeError (a forced backend
    that cannot run, with the reason).
    """
    _check(params, updates, keep, step)
    name = route(params, updates, keep.device, backend)
    with torch.no_grad():
        if name == "cuda":
            torch.ops.steepest.after(params, updates, keep, step)
        elif name == "triton":
            from ..kernels.after import after as triton_after

            triton_after(params, updates, keep, step)
        else:
            reference(params, updates, keep, step)
    if name != "torch" and not torch.compiler.is_compiling():
        # The kernels write to memory; autograd must still see that what it saved has changed.
        torch.autograd.graph.increment_version([p for p in params if not p.is_inference()])


def reference(params: Sequence[Tensor], updates: Sequence[Tensor], keep: Tensor, step: Tensor) -> None:
    """The same on torch ops, traceable, without a host read. Arguments as for `after`, unchecked."""
    eager_cpu = keep.device.type == "cpu" and not torch.compiler.is_compiling()
    reads = (step != 0).unbind()
    for p, u, k, s, read in zip(params, updates, keep.unbind(), step.unbind(), reads):
        pieces = _pieces(p, u) if eager_cpu and p.numel() > CPU_CHUNK else ((p, u),)
        for p_piece, u_piece in pieces:
            _update(p_piece, u_piece, k, s, read)


def _pieces(p: Tensor, u: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    """Views of both that cover them once: CPU_CHUNK elements each, or whole rows where a pair is not contiguous."""
    if p.is_contiguous() and u.is_contiguous():
        return zip(p.view(-1).split(CPU_CHUNK), u.view(-1).split(CPU_CHUNK))
    rows = max(1, CPU_CHUNK * p.shape[0] // p.numel())
    return zip(p.split(rows), u.split(rows))


def _update(p: Tensor, u: Tensor, keep: Tensor, step: Tensor, read: Tensor) -> None:
    compute = torch.float64 if p.dtype is torch.float64 else torch.float32
    u = torch.where(read, u, 0).to(compute)  # 0 NaN is NaN, so a zero step alone would not do
    if p.dtype is compute:
        p.mul_(keep).addcmul_(u, step, value=-1)
    else:
        p.copy_(p.to(compute).mul_(keep).addcmul_(u, step, value=-1))


def _check(params: Sequence[Tensor], updates: Sequence[Tensor], keep: Tensor, step: Tensor) -> None:
    count = len(params)
    if len(updates) != count:
        raise ValueError(f"after: {count} params and {len(updates)} updates; they are taken in pairs")
    wanted = torch.float64 if any(p.dtype is torch.float64 for p in params) else torch.float32
    for name, factor in (("keep", keep), ("step", step)):
        if factor.shape != (count,):
            raise ValueError(
                f"after: {name} has shape {tuple(factor.shape)}; it holds one number per parameter: ({count},)"
            )
        if factor.dtype is not wanted:
            raise TypeError(f"after: {name} is {factor.dtype}; with these params it must be {wanted}")
        if factor.device != keep.device:
            raise ValueError(f"after: {name} is on {factor.device} and keep on {keep.device}; call once per device")
    for i, (p, u) in enumerate(zip(params, updates)):
        if p.shape != u.shape:
            raise ValueError(
                f"after: params[{i}] is {tuple(p.shape)} and updates[{i}] {tuple(u.shape)}; shapes must be equal"
            )
        for name, tensor in (("params", p), ("updates", u)):
            if tensor.dtype not in FLOATS:
                accepted = ", ".join(str(dtype) for dtype in FLOATS)
                raise TypeError(f"after: {name}[{i}] is {tensor.dtype}; accepted are {accepted}")
            if tensor.device != keep.device:
                raise ValueError(
                    f"after: {name}[{i}] is on {tensor.device} and keep on {keep.device}; call once per device"
                )


def route(params: Sequence[Tensor], updates: Sequence[Tensor], device: torch.device, backend: str = "auto") -> str:
    """The backend that takes this call; RuntimeError, with the reason, where a forced one cannot."""
    return _backend.choose("after", backend, _reasons(params, updates, device), device)


def _reasons(params: Sequence[Tensor], updates: Sequence[Tensor], device: torch.device) -> dict[str, str | None]:
    """Why the kernels cannot take this call, by backend; None where they can."""
    if device.type != "cuda":
        reason = f"the tensors are on {device.type}"
        return {"cuda": reason, "triton": reason}
    wide = next((t.dtype for pair in zip(params, updates) for t in pair if t.dtype not in KERNEL_FLOATS), None)
    if wide is not None:
        reason = f"a tensor is {wide}; the kernels take float32, bfloat16 and float16"
        return {"cuda": reason, "triton": reason}
    return {
        "cuda": _backend.cuda_reason(device.index) or _cuda_strides(params, updates),
        "triton": _backend.triton_reason() or _triton_call(params, updates),
    }


def _cuda_strides(params: Sequence[Tensor], updates: Sequence[Tensor]) -> str | None:
    for i, pair in enumerate(zip(params, updates)):
        if pair[0].dim() > STRIDED_DIMS and not all(t.is_contiguous() for t in pair):
            return f"pair {i} is not contiguous and has more than {STRIDED_DIMS} dimensions"
    return None


def _triton_call(params: Sequence[Tensor], updates: Sequence[Tensor]) -> str | None:
    from ..kernels.after import can_use

    return can_use(params, updates)


if _backend.extension is not None:
    torch.library.impl("steepest::after", "CPU")(reference)

    @torch.library.register_fake("steepest::after")
    def _(params: Sequence[Tensor], updates: Sequence[Tensor], keep: Tensor, step: Tensor) -> None:
        """Mutates params and returns nothing; their metadata stays as it is."""
