"""The polar factor: the nearest semi-orthogonal matrix, U V^T for X = U S V^T.   x: (..., m, n).

This is the door: it checks what was asked, puts the matrix into a sane range and a compute dtype, chooses the form for
the shape, bounds the workspace, and hands the rest to `newton_schulz`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..budget import cut
from ..ops.polar_chain import Update
from ..ops.small_polar import small_polar, takes
from ..ops.symm_gemm import Workspace, times
from ..ops.tracing import assume_constant_result
from ..ops.weight_update import add_into
from .coefficients import Coefficients, Schedule, presets, schedule
from .newton_schulz import newton_schulz, newton_schulz_plain
from .scaling import PowerOfTwo, inverse_power_of_two, largest_entry, narrowed

FORMS = ("auto", "standard", "gram")
COMPUTE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PLAIN = "jordan"
# Presets whose error budget is the reference's own in the standard form; the others run in fp16 on a GPU.
STANDARD_PRESETS = ("jordan", "you", "polar_express")
# Two steps in the Gram form cost 3a + 5 half products of m^3, in the standard form 6a + 2, a = long side / short side.
GRAM_ASPECT = 1.25
# Below this short side a 16-bit Gram form is not bounded: rounding errors of X X^T do not average out, its smallest
# eigenvalues turn negative, and the iteration carries them away. Largest singular value of the result over thousands of
# matrices with log-uniform singular values, bf16 and "auto": 2e12 at 4 x 5, 1e5 at 16 x 20, 1.4 at 32 x 40, 1.05 at 96.
GRAM_SHORT_SIDE = 128
# Elements of X worked on at once on a CPU: a larger matrix goes alone, whose products are then taken by block rows.
CPU_CHUNK = 1 << 17
# "0": this CPU counts as one without native bf16 products, "1": as one with, "": it is asked. Read once, at import.
cpu_bf16 = os.environ.get("STEEPEST_CPU_BF16", "")


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
        polar_express  5      976         1e-3    [.846, 1.124]   Frobenius; any number of steps
        tight_8e-3     4      168 s       8e-3    [.968, 1.032]   bound
        tight_4e-3     4      247 s       4e-3    [.859, 1.141]   bound
        svd            -      any         eps     [1, 1]          singular values up to eps are dropped

    "auto" lifts small singular values at least as much as "jordan" on every spectrum, at less work; the choice among
    its tables is made per matrix on the device.  "turbo" does so from s = 4.25 on.  "jordan" is, operation for
    operation, torch.optim.Muon's function (full products); "exact" is the same polynomial with symmetric products,
    whose rounding is up to twice as large.  In bf16 rounding comes on top: on small matrices (short side below 100) of
    a few equal large singular values and the rest 100 times smaller, "auto" was seen to err by .25 where "jordan" errs
    by .2.  form="gram" is not bounded in 16 bits on matrices with a short side below 100.

    Args:
        coefficients: instead of a preset, (a, b, c) or a list of such; 2 to 5 numbers, odd degrees 3 to 9.
        steps: how often one tuple is applied (5), or the length of "polar_express".
        eps: relative to the largest entry of a matrix: its norm is never taken below eps, and "svd" drops singular
            values below max(eps, rounding) times the largest.  The scale of x does not matter.
        dtype: compute dtype; `compute_dtype` chooses by default.  fp16 is refused on a CPU.
        form: "standard", "gram", or "auto" by shape, device and dtype.
        restarts: steps (1 .. steps - 1) before which the Gram form takes a new X X^T; overrides ``form``.
        max_workspace_bytes: bound on what one chunk of the batch allocates; at least one matrix is worked on.
        slack: (batch,) fp32 on x's device, batch the product of the leading dimensions; filled with ||X||_F over the
            norm that X was divided by, the s above: 1 with the Frobenius norm, NaN for "svd", 0 for a zero matrix.

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
    held = [None] * len(xs) if slacks is None else slacks
    for x in xs:
        _check(x, preset, dtype, form, eps, max_workspace_bytes)
    held = [_slack_buffer(x, slack) for x, slack in zip(xs, held, strict=True)]
    if preset == "svd" and coefficients is None:
        for slack in held:
            slack.fill_(math.nan)
        exact = [_svd(x, eps, dtype) for x in xs]
        for u, update in zip(exact, updates or [], strict=False):
            _take_into(u, update)
        return exact if updates is None else []
    plan = schedule(preset, coefficients, steps)
    name = preset if coefficients is None else None
    free = dtype is None and form == "auto" and restarts is None
    outs = [_Out(x) for x in xs]
    into = [None] * len(xs) if updates is None else updates
    given = zip(xs, held, outs, into, strict=True)
    jobs = [_Job(x.reshape(-1, *x.shape[-2:]), slack, out, 0, update) for x, slack, out, update in given if x.numel()]
    small: list[_Job] = []
    alike: dict[tuple[torch.dtype, tuple[int, ...]], list[_Job]] = {}
    for job in jobs:
        if free and name != PLAIN and takes([job.x], plan.tables, plan.slacks):
            small.append(job)
            continue
        work = dtype or compute_dtype(name or PLAIN, job.x.dtype, job.x.device)
        positions = _positions(plan, form, restarts, job.x, work)
        _, m, n = job.x.shape
        size = _chunk(job.x, workspace_bytes(m, n, work), max_workspace_bytes)
        alike.setdefault((work, positions), []).extend(job.split(size))
    if small:
        own, found = [job.x for job in small], [job.slack for job in small]
        targets = [job.out.batch() for job in small]
        small_polar(own, targets, found, plan.tables, plan.slacks, tight=plan.norm == "tight", eps=eps)
        for job, target in zip(small, targets, strict=True):
            if job.update is not None:
                _take_into(target, job.update)
    for (work, positions), some in alike.items():
        if name == PLAIN and form == "auto" and restarts is None:
            for job in some:
                job.take(newton_schulz_plain(_prescaled(job.x, work), plan.tables[0], eps=eps), own=True)
                job.slack.fill_(1)
            continue
        workspace, runs = Workspace(), list(_runs(some, work, max_workspace_bytes))
        for run in runs:
            ys = [_prescaled(job.x, work) for job in run]
            own, ends = [job.slack for job in run], [job.update for job in run if job.update is not None]
            ys = newton_schulz(ys, plan, positions, workspace, eps=eps, slacks=own, updates=ends)
            for job, y in zip(run, ys, strict=not ends):
                job.take(y, own=len(runs) == 1)
    return [out.result() for out in outs] if updates is None else []


def _take_into(factors: Tensor, update: Update) -> None:
    add_into(factors.reshape(-1, *factors.shape[-2:]), update.weights, update.eta, update.beta)


class _Out:
    """The result for x: memory of its own, or a tensor that happens to be it."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.held: Tensor | None = None

    def batch(self) -> Tensor:
        """(batch, m, n) to write to."""
        if self.held is None:
            self.held = torch.empty(self.x.shape, dtype=self.x.dtype, device=self.x.device)
        return self.held.view(math.prod(self.x.shape[:-2]), *self.x.shape[-2:])

    def result(self) -> Tensor:
        return self.batch().view(self.x.shape)


@dataclass(frozen=True, eq=False)
class _Job:
    """Matrices x, (batch, m, n), their slack, (batch,), and where the first of them goes, or the weights they move."""

    x: Tensor
    slack: Tensor
    out: _Out
    first: int
    update: Update | None

    def split(self, size: int) -> list[_Job]:
        firsts = range(0, len(self.x), size)
        ends = [None] * len(firsts) if self.update is None else self.update.split(size)
        parts = zip(self.x.split(size), self.slack.split(size), firsts, ends, strict=True)
        return [_Job(x, slack, self.out, first, end) for x, slack, first, end in parts]

    def take(self, y: Tensor, *, own: bool) -> None:
        """Puts y where it belongs; own: nobody else will write to it."""
        if self.update is not None:
            _take_into(y, self.update)
        elif own and y.numel() == self.out.x.numel() and y.dtype == self.out.x.dtype and y.is_contiguous():
            self.out.held = y
        else:
            self.out.batch()[self.first : self.first + len(y)].copy_(y)

    def workspace_bytes(self, work: torch.dtype) -> int:
        batch, m, n = self.x.shape
        return batch * workspace_bytes(m, n, work)


def _runs(jobs: list[_Job], work: torch.dtype, max_bytes: int | None) -> Iterable[list[_Job]]:
    """Jobs that are worked on at once: on a CPU one, whose buffers then stay in its cache."""
    if jobs[0].x.device.type == "cpu":
        return [[job] for job in jobs]
    return [jobs] if max_bytes is None else cut(jobs, lambda job: job.workspace_bytes(work), max_bytes)


def compute_dtype(preset: str, dtype: torch.dtype, device: torch.device | str) -> torch.dtype:
    """The dtype in which `polar` runs ``preset`` on a matrix of ``dtype`` on ``device``.

    fp64 stays.  On a CPU bf16 where its matrix products are native, else fp32, and never fp16 (1 GFLOP/s);
    STEEPEST_CPU_BF16=0 or 1 in the environment says whether they are.  On a GPU fp16 for the presets that may take the
    Gram form, in which bf16 has an off-diagonal error of .2, and bf16 for the rest. "svd" runs in fp32.
    """
    if dtype == torch.float64:
        return dtype
    if preset == "svd":
        return torch.float32
    if torch.device(device).type == "cpu":
        return torch.bfloat16 if _native_bf16() else torch.float32
    return torch.bfloat16 if preset in STANDARD_PRESETS else torch.float16


def default_restarts(plan: Schedule, form: str, m: int, n: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Steps before which a new Gram product of an m x n matrix is taken.

    Every step in the standard form.  In the Gram form, bf16: where the schedule says, else every second step.
    Otherwise none in three steps, after the second of four, after every third of more.  "auto" takes the Gram form
    where the long side is at least 1.25 times the short one; in 16 bits where the short side is at least 128, and in
    bf16 only where the schedule bears it.
    """
    if form == "auto":
        bears = dtype != torch.bfloat16 or plan.bf16_restarts is not None
        short = max(1, min(m, n))
        bounded = dtype.itemsize > 2 or short >= GRAM_SHORT_SIDE
        form = "gram" if bears and bounded and max(m, n) >= GRAM_ASPECT * short else "standard"
    if form == "standard":
        return tuple(range(1, plan.steps))
    if dtype == torch.bfloat16:
        return plan.bf16_restarts or tuple(range(2, plan.steps, 2))
    segment = 2 if plan.steps == 4 else 3
    return tuple(range(segment, plan.steps, segment))


@assume_constant_result
def _native_bf16() -> bool:
    """Whether a CPU takes bf16 products: where they are native, or as STEEPEST_CPU_BF16 says."""
    if cpu_bf16 not in ("", "0", "1"):
        raise ValueError(
            f"STEEPEST_CPU_BF16={cpu_bf16!r} is neither '0' (this CPU has no native bf16 products) nor '1' (it has "
            "them); unset it to have the CPU asked"
        )
    if cpu_bf16:
        return cpu_bf16 == "1"
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _check(
    x: Tensor, preset: str, dtype: torch.dtype | None, form: str, eps: float, max_workspace_bytes: int | None
) -> None:
    if not x.is_floating_point():
        raise TypeError(f"polar takes a real floating-point tensor, got {x.dtype}; convert it first")
    if x.ndim < 2:
        raise ValueError(f"polar takes matrices (..., m, n), got shape {tuple(x.shape)}; add a dimension")
    if preset not in presets():
        raise ValueError(f"preset {preset!r} is not known; choose one of {', '.join(presets())}")
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


def _slack_buffer(x: Tensor, slack: Tensor | None) -> Tensor:
    count = math.prod(x.shape[:-2])
    if slack is None:
        return torch.empty(count, dtype=torch.float32, device=x.device)
    if slack.shape != (count,) or slack.dtype is not torch.float32 or slack.device != x.device:
        raise ValueError(
            f"slack must be a float32 tensor of shape ({count},) on {x.device}, got {slack.dtype} "
            f"{tuple(slack.shape)} on {slack.device}"
        )
    return slack


def _positions(
    plan: Schedule, form: str, restarts: Collection[int] | None, x: Tensor, dtype: torch.dtype
) -> tuple[int, ...]:
    steps = plan.steps
    if restarts is None:
        return default_restarts(plan, form, x.shape[-2], x.shape[-1], dtype)
    if any(not 0 < position < steps for position in restarts):
        raise ValueError(f"restarts must lie in 1 .. {steps - 1} for {steps} steps, got {tuple(restarts)}")
    return tuple(restarts)


def _chunk(batch: Tensor, each: int, max_workspace_bytes: int | None) -> int:
    """How many matrices are worked on at once, of which each takes so many bytes."""
    count, m, n = batch.shape
    size = max(1, CPU_CHUNK // (m * n)) if batch.device.type == "cpu" else count
    if max_workspace_bytes is not None:
        size = min(size, max(1, max_workspace_bytes // each))
    return min(size, count)


def workspace_bytes(m: int, n: int, dtype: torch.dtype) -> int:
    """Upper bound on what one m x n matrix occupies while it is iterated.

    X, its second buffer and what is made of the result; six short-side squares, one more in which sums are taken, fp32
    at least, and the mask of a triangle.
    """
    wide = torch.promote_types(dtype, torch.float32)
    return 3 * m * n * dtype.itemsize + min(m, n) ** 2 * (6 * dtype.itemsize + wide.itemsize + 1)


def _prescaled(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A new contiguous x in ``dtype``, times a power of two that brings its largest entry into [1/2, 1).

    The factor is exact, so neither a Gram product nor a conversion over- or underflows and no digit is lost.  In fp16
    it brings the mean eigenvalue of X X^T into [1/4, 1) instead, the largest below m.  NaN if x is not finite.
    """
    if x.dtype == torch.float64 and dtype != torch.float64:  # whose range no other dtype has
        x = narrowed(x, torch.float32)
    if dtype != torch.float16:
        return _scaled(x, inverse_power_of_two(largest_entry(x)), _like(x, dtype))
    given, x = x, x if x.dtype == torch.float16 else narrowed(x, torch.float16)
    # fp32 holds the squares, and torch reads fp16 into it without a copy.
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    scale = inverse_power_of_two(norm / math.sqrt(min(x.shape[-2:])))
    return _scaled(x, scale, _like(x, dtype) if x is given else x)


def _like(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def _scaled(x: Tensor, scale: PowerOfTwo, out: Tensor) -> Tensor:
    """``scale x`` into ``out``, which may be x."""
    first, second = (factor.flatten() for factor in scale)
    if x.dtype == torch.float16:  # for whose range one number is enough
        return times(x, first * second, out=out)
    return times(times(x, first, out=out), second, out=out)


def _svd(x: Tensor, eps: float, dtype: torch.dtype | None) -> Tensor:
    """U V^T over the singular values above rounding; LAPACK refuses NaN, so such matrices go in as zero."""
    work = dtype if dtype in (torch.float32, torch.float64) else compute_dtype("svd", x.dtype, x.device)
    if x.numel() == 0:
        return torch.empty_like(x)
    y = _prescaled(x.reshape(-1, *x.shape[-2:]), work)
    finite = y.isfinite().all(-1).all(-1)[:, None, None]
    u, s, vh = torch.linalg.svd(torch.where(finite, y, torch.zeros_like(y)), full_matrices=False)
    least = s[:, :1] * max(eps, torch.finfo(work).eps * max(x.shape[-2:]))
    kept = (s > least).to(work)[:, None, :]
    return torch.where(finite, (u * kept) @ vh, torch.nan).to(x.dtype).reshape(x.shape)
