"""The polar factors of matrices: U V^T for X = U S V^T.   x: (..., m, n).

The arguments are checked here; `choose` says how a stack is computed, and what is computed alike shares launches.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from ...ops import cpu_chain, solvers
from ...ops.cpu_chain import CpuChain
from ...ops.matmul import matmul
from ...ops.polar_chain import BUFFERS, Update
from ...ops.reductions import vector_norm
from ...ops.small_polar import small_polar, supports
from ...ops.symm_gemm import Workspace
from ..chain import Chain
from ..coefficients import Coefficients, Schedule, check_preset
from ..newton_schulz import newton_schulz, newton_schulz_plain
from ..scaling import prescaled
from .choice import COMPUTE_DTYPES, FORMS, Choice, choose, compute_dtype
from .jobs import Job, Result, add_factors, at_once, workspace_bytes
from .nodes import chain_of

UNBOUNDED = 1 << 30  # matrices that may be worked on at once


@torch.no_grad()
def polar(
    x: Tensor,
    preset: str = "auto",
    *,
    coefficients: Coefficients | None = None,
    steps: int | None = None,
    eps: float = 1e-7,
    dtype: torch.dtype | None = None,
    form: str = "auto",
    restarts: Collection[int] | None = None,
    max_workspace_bytes: int | None = None,
    slack: Tensor | None = None,
) -> Tensor:
    """Approximate polar factor of every matrix in x.   x: (..., m, n) floating; returned in x's dtype, x untouched.

    What each preset promises, in exact arithmetic.  *Gain* is the lift of a vanishing singular value after division by
    ||X||_F; s = ||X||_F / bound, at least 1, is what the tight norm bound finds beyond that.  *Lands* is where singular
    values from l times the norm up to the norm end.

        preset         steps  gain        l       lands           norm
        auto           4      215 s       8e-3    [.995, 1.005]   bound, where s >= 2.26
                              316 s       4e-3    [.954, 1.046]   bound, where s >= 1.54
                              497 s       1.7e-3  [.775, 1.225]   bound, otherwise
        turbo          3      81 s        1.5e-2  [.945, 1.055]   bound, where s >= 5.93; degrees 5, 5, 9
                              114 s       8e-3    [.817, 1.183]   bound, otherwise
        exact, jordan  5      484         1e-2    [.681, 1.135]   Frobenius
        you            5      492         1e-2    [.977, 1.032]   Frobenius
        polar_express  5      966         1e-3    [.840, 1.124]   1.01 Frobenius; any number of steps
        tight_8e-3     4      168 s       8e-3    [.968, 1.032]   bound
        tight_4e-3     4      247 s       4e-3    [.859, 1.141]   bound
        cans           5      1008        1e-3    [.862, 1.114]   Frobenius; published x / 1.01 in all but the last step
        deepseekv4     10     79262       1e-3    [.9999, 1.001]  Frobenius
        cubic5         5      119         7e-3    [.774, 1.300]   Frobenius; degree 3
        dion           5      970         1e-3    [.846, 1.142]   1.02 Frobenius
        polar_express_safer   5   970     1e-3    [.846, 1.142]   Frobenius
        svd            -      any         eps     [1, 1]          singular values up to eps are dropped

    "auto" lifts vanishing singular values at least as much as "jordan" on every spectrum, at less work, and those near
    1.5e-3 ||X||_F up to 4.5% less where s is just over 2.26 (2.6% just over 1.54); the choice among its tables is made
    per matrix on the device.  "turbo" lifts vanishing ones so from s = 4.25 on (2.5% less near 1.5e-3 from 5.93 on).
    "simple" and "quintic" are other names of "jordan" and "you".
    "jordan" is, operation for operation, torch.optim.Muon's function (full products); "exact" is the same polynomial
    with symmetric products, whose rounding is up to twice as large; in fp32, where torch has bf16, they are the same.
    "svd" is computed in fp64 whatever x is.  In bf16 rounding comes on top: on matrices of a few large singular values,
    or of one, "auto" in the Gram form was seen to err by .33 (160 x 200, rank 1) where "jordan" errs by .25.
    form="gram" is not bounded in 16 bits on matrices with a short side below 100.

    Args:
        coefficients: instead of a preset, (a, b, c) or a list of such; 2 to 5 numbers, odd degrees 3 to 9.
        steps: how often one tuple is applied (5), or the length of "polar_express".
        eps: relative to the largest entry of a matrix: its norm is never taken below eps, and "svd" drops singular
            values below eps times the largest, and below 2.4e-7 ||X||_F (fp32), which rounding leaves of 0.  The scale
            of x does not matter.
        dtype: compute dtype; `compute_dtype` chooses by default.  fp16 is refused on a CPU.
        form: "standard", "gram", or "auto" by shape, device and dtype.
        restarts: steps (1 .. steps - 1) before which the Gram form takes a new X X^T; overrides ``form``.
        max_workspace_bytes: bound on what one chunk of the batch allocates; at least one matrix is worked on.
        slack: (batch,) fp32 on x's device, batch the product of the leading dimensions; filled with ||X||_F over the
            norm that X was divided by, the s above: 1 with the Frobenius norm (also of "polar_express", whose 1.01 is
            in its first step), NaN for "svd", 0 for a zero matrix.

    A zero matrix gives zero.  A matrix with a non-finite entry gives NaN and leaves the rest of its batch alone.
    Deterministic, not differentiable; no host synchronisation and traceable, but for "svd", whose LAPACK-like solver
    on a GPU reads its own status, and which takes no steps, form or restarts.

    Raises:
        ValueError: an unknown preset or form, x with fewer than two dimensions, steps, restarts or coefficients out of
            range, a negative eps, fp16 on a CPU, slack of another shape.
        TypeError: x is not real floating point, or dtype is not a compute dtype.
    """
    slacks = None if slack is None else [slack]
    return polars(
        [x],
        preset,
        coefficients=coefficients,
        steps=steps,
        eps=eps,
        dtype=dtype,
        form=form,
        restarts=restarts,
        max_workspace_bytes=max_workspace_bytes,
        slacks=slacks,
    )[0]


@torch.no_grad()
def polars(
    xs: Sequence[Tensor],
    preset: str = "auto",
    *,
    coefficients: Coefficients | None = None,
    steps: int | None = None,
    eps: float = 1e-7,
    dtype: torch.dtype | None = None,
    form: str = "auto",
    restarts: Collection[int] | None = None,
    max_workspace_bytes: int | None = None,
    slacks: Sequence[Tensor] | None = None,
    updates: Sequence[Update] | None = None,
) -> list[Tensor]:
    """`polar` of every x, of any shapes, all on one device; launches are shared where kernels take several stacks.

    updates: one for each x, whose polar factors then go into the weights, W <- beta W + eta polar(x), and nothing is
    returned. Where a chain of products ends in them, the factors are not written anywhere (csrc/symm_gemm/update.cuh).
    """
    for x in xs:
        check(x, preset, dtype, form, eps, max_workspace_bytes)
    optional: Sequence[Tensor | None] = [None] * len(xs) if slacks is None else slacks
    buffers = [slack_buffer(x, slack) for x, slack in zip(xs, optional, strict=True)]
    if preset == "svd" and coefficients is None:
        return _svds(xs, buffers, updates, eps, dtype)
    results = [Result(x) for x in xs]
    targets: Sequence[Update | None] = [None] * len(xs) if updates is None else updates
    alike: dict[tuple[str, torch.dtype, tuple[int, ...]], tuple[Choice, list[Job]]] = {}
    for x, slack, result, update in zip(xs, buffers, results, targets, strict=True):
        choice = choose(
            x.shape[-2],
            x.shape[-1],
            preset,
            device=x.device,
            coefficients=coefficients,
            steps=steps,
            x_dtype=x.dtype,
            dtype=dtype,
            form=form,
            restarts=restarts,
            small=functools.partial(_small_kernel_takes, x),
        )
        if x.numel():
            job = Job(x.reshape(-1, *x.shape[-2:]), slack, result, 0, update)
            alike.setdefault((choice.form, choice.dtype, choice.restarts), (choice, []))[1].append(job)
    for choice, jobs in alike.values():
        if choice.form == "small":
            _by_small_kernel(jobs, choice.schedule, eps)
            continue
        products = chain_of(choice)
        if cpu_chain.supports(jobs[0].x, choice.dtype, products.constants):  # all are on one device
            _by_cpu_chain(jobs, choice, products, eps, max_workspace_bytes)
            continue
        chunks = [chunk for job in jobs for chunk in job.chunks(choice.dtype, max_workspace_bytes)]
        if choice.form == "plain":
            _by_plain_products(chunks, choice, eps)
        else:
            _by_chain(list(at_once(chunks, choice.dtype, max_workspace_bytes)), choice, eps)
    return [result.whole() for result in results] if updates is None else []


def _small_kernel_takes(x: Tensor, table: Schedule) -> bool:
    return supports([x], table.tables, table.slacks)


def _by_small_kernel(jobs: list[Job], table: Schedule, eps: float) -> None:
    outs = [job.result.batch() for job in jobs]
    xs, slacks = [job.x for job in jobs], [job.slack for job in jobs]
    small_polar(xs, outs, slacks, table.tables, table.slacks, tight=table.norm == "tight", eps=eps)
    for job, out in zip(jobs, outs, strict=True):
        if job.update is not None:
            add_factors(out, job.update)


def _by_cpu_chain(jobs: list[Job], choice: Choice, products: Chain, eps: float, max_bytes: int | None) -> None:
    """All matrices in one call, which converts and scales them itself."""
    xs = [job.x if job.x.dtype in cpu_chain.DTYPES else prescaled(job.x, choice.dtype) for job in jobs]
    straight = [job.update is None and job.result.x.dtype in cpu_chain.DTYPES for job in jobs]
    outs = [job.result.batch() if s else torch.empty_like(x) for job, x, s in zip(jobs, xs, straight, strict=True)]
    most = max(workspace_bytes(job.x.shape[1], job.x.shape[2], choice.dtype) for job in jobs)
    chain = _cpu_chain_of(choice, products, eps, max_bytes, most)
    cpu_chain.cpu_chain([x.contiguous() for x in xs], outs, [job.slack for job in jobs], chain)
    for job, out, done in zip(jobs, outs, straight, strict=True):
        if not done:
            job.finish(out)


def _cpu_chain_of(choice: Choice, products: Chain, eps: float, max_bytes: int | None, most: int) -> CpuChain:
    """A choice as `cpu_chain` takes it; most: the workspace of a matrix, in bytes."""
    plain, table = choice.form == "plain", choice.schedule
    return CpuChain(
        products.pack() if torch.compiler.is_compiling() else products.packed,
        products.constants,
        products.powers,
        () if plain else table.slacks,
        tight=table.norm == "tight",
        eps=eps,
        result=BUFFERS.index(products.result),
        divides=plain,
        dtype=choice.dtype,
        at_once=UNBOUNDED if max_bytes is None else max(1, max_bytes // most),
    )


def cpu_chains(
    shapes: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    preset: str,
    *,
    coefficients: Coefficients | None = None,
    steps: int | None = None,
    eps: float = 1e-7,
    max_workspace_bytes: int | None = None,
) -> list[CpuChain] | None:
    """How one call of the library on a CPU takes the polar factors of matrices of these shapes, (m, n), of fp32 or
    bf16, as `polars` does; None where not all of them go by such a call. Equal chains are one object.
    """
    if dtype not in cpu_chain.DTYPES or (preset == "svd" and coefficients is None):
        return None
    options: dict[str, Any] = {"coefficients": coefficients, "steps": steps, "x_dtype": dtype}
    choices = [choose(m, n, preset, device="cpu", **options) for m, n in shapes]
    most: dict[tuple[str, torch.dtype, tuple[int, ...]], int] = {}
    keys = [(choice.form, choice.dtype, choice.restarts) for choice in choices]
    for key, (m, n) in zip(keys, shapes, strict=True):
        most[key] = max(most.get(key, 1), workspace_bytes(m, n, key[1]))
    chains: dict[tuple[str, torch.dtype, tuple[int, ...]], CpuChain] = {}
    for key, choice in zip(keys, choices, strict=True):
        products = chain_of(choice)
        if not cpu_chain.takes(choice.dtype, products.constants):
            return None
        if key not in chains:
            chains[key] = _cpu_chain_of(choice, products, eps, max_workspace_bytes, most[key])
    return [chains[key] for key in keys]


def _by_plain_products(jobs: list[Job], choice: Choice, eps: float) -> None:
    for job in jobs:
        job.finish(newton_schulz_plain(prescaled(job.x, choice.dtype), choice.schedule.tables[0], eps=eps))
        job.slack.fill_(1)


def _by_chain(runs: list[list[Job]], choice: Choice, eps: float) -> None:
    """Each run of jobs goes through the chain together; the next one takes its buffers."""
    workspace = Workspace()
    for jobs in runs:
        xs, slacks = [prescaled(job.x, choice.dtype) for job in jobs], [job.slack for job in jobs]
        updates = [job.update for job in jobs if job.update is not None]
        ys = newton_schulz(xs, choice.schedule, choice.restarts, workspace, eps=eps, slacks=slacks, updates=updates)
        for job, y in zip(jobs, ys, strict=not updates):
            job.finish(y, reused=len(runs) > 1)


def _svds(
    xs: Sequence[Tensor],
    slacks: Sequence[Tensor],
    updates: Sequence[Update] | None,
    eps: float,
    dtype: torch.dtype | None,
) -> list[Tensor]:
    for slack in slacks:
        slack.fill_(math.nan)
    factors = [_svd(x, eps, dtype) for x in xs]
    if updates is None:
        return factors
    for u, update in zip(factors, updates, strict=True):
        add_factors(u, update)
    return []


def check(
    x: Tensor, preset: str, dtype: torch.dtype | None, form: str, eps: float, max_workspace_bytes: int | None
) -> None:
    if not x.is_floating_point():
        raise TypeError(f"polar takes a real floating-point tensor, got {x.dtype}; convert it first")
    if x.ndim < 2:
        raise ValueError(f"polar takes matrices (..., m, n), got shape {tuple(x.shape)}; add a dimension")
    check_preset(preset)
    if form not in FORMS:
        raise ValueError(f"form {form!r} is not known; choose one of {', '.join(FORMS)}")
    if dtype is not None and dtype not in COMPUTE_DTYPES:
        raise TypeError(f"dtype {dtype} cannot be computed in; choose one of {', '.join(map(str, COMPUTE_DTYPES))}")
    if dtype == torch.float16 and x.device.type == "cpu":
        raise ValueError(
            "dtype torch.float16 is not used on a CPU, whose fp16 products are slow; choose torch.bfloat16"
        )
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    if max_workspace_bytes is not None and max_workspace_bytes <= 0:
        raise ValueError(f"max_workspace_bytes must be positive or None, got {max_workspace_bytes}")


def slack_buffer(x: Tensor, slack: Tensor | None) -> Tensor:
    count = math.prod(x.shape[:-2])
    if slack is None:
        return torch.empty(count, dtype=torch.float32, device=x.device)
    if slack.shape != (count,) or slack.dtype is not torch.float32 or slack.device != x.device:
        raise ValueError(
            f"slack must be a float32 tensor of shape ({count},) on {x.device}, got {slack.dtype} "
            f"{tuple(slack.shape)} on {slack.device}"
        )
    return slack


def _svd(x: Tensor, eps: float, dtype: torch.dtype | None) -> Tensor:
    """U V^T in fp64 over the singular values above x's rounding; LAPACK refuses NaN: such matrices go in as zero."""
    known = dtype if dtype in (torch.float32, torch.float64) else compute_dtype("svd", x.dtype, x.device)
    if x.numel() == 0:
        return torch.empty_like(x)
    y = prescaled(x.reshape(-1, *x.shape[-2:]), torch.float64)
    finite = y.isfinite().all(-1).all(-1)[:, None, None]
    u, s, vh = solvers.svd(torch.where(finite, y, torch.zeros_like(y)))
    rounding = 2 * torch.finfo(known).eps * vector_norm(s, -1, keepdim=True)
    least = torch.maximum(s[:, :1] * eps, rounding)
    kept = (s > least).to(s.dtype)[:, None, :]
    return torch.where(finite, matmul(u * kept, vh), torch.nan).to(x.dtype).reshape(x.shape)
