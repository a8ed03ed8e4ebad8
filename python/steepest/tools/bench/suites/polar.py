"""The polar factor of stacks of matrices, beside torch's own and the peers'.

Presets, torch.optim.Muon's function (eager and compiled, matrix by matrix), peers that can be imported, and one product
of the stack by torch.bmm. FLOP are those of `steepest plan` on a GPU, what the tiles of the launches execute, and on a
CPU those of the products that torch makes. Torch's function and the peers convert to a dtype of their own, so what
takes long to compile is there for the first dtype alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from steepest.linalg import newton_schulz
from steepest.linalg import polar as linalg
from steepest.linalg.chain import Sum, multiplication
from steepest.ops import polar_chain

from ... import planner
from ...shapes import matrices, parse, spelled
from .. import peers
from ..case import Case, Errors, Job, Settings, Variant
from ..counting import flop_of
from ..truth import Error, Truth
from .common import BASE, dtypes, muon, name_of, one_by_one, sizes, stacks, timed

SHAPES = (
    "12x3072x768",  # GPT-2 124M
    "24x1024x4096",  # a 430M Llama
    "16x2048x8192",  # Llama 1B
    "192x1408x2048",  # 64 experts
    "28x2048x6144",
    "4096x4096",  # Llama 7B
    "4096x11008",
    "4096x14336",  # Llama 3 8B
    "216x2048x7168",  # Kimi K2, 72 experts
    "8192x28672",  # a 70B Llama
)
QUICK = ("12x3072x768", "24x1024x4096", "4x2048x6144", "4096x4096")
CPU = ("2x64x128", "2x256x1024")
BMM = "torch.bmm"
MOST_CAPTURED = 1 << 29  # elements; a graph keeps its memory while it lives
# Of Gaussian matrices: every polynomial leaves .02 to .25, bf16 .006 to .03 of rounding.
BOUNDS = {"relative_error": 0.4, "off_diagonal": 0.05}


def polar(settings: Settings) -> Iterator[Job]:
    for each in sizes(settings, SHAPES, QUICK, CPU):
        for name in spelled(matrices(parse(each))):
            for dtype in dtypes(settings):
                yield from timed("polar", name, dtype, settings, functools.partial(_case, name, dtype, settings))


@torch.no_grad()
def _case(name: str, dtype: torch.dtype, settings: Settings) -> Case:
    (x,) = stacks(name, dtype, settings.device)
    count, m, n = x.shape
    errors = Gate([x])
    variants = references([x], settings, errors)
    square = torch.randn(count, min(m, n), min(m, n), device=x.device).to(x.dtype)
    pair = (x, square) if m > n else (square, x)
    moved = sum(each.nbytes for each in pair) + x.nbytes
    variants[BMM] = Variant(lambda: torch.bmm(*pair), flop=2.0 * count * m * n * min(m, n), bytes=moved)
    for preset in settings.presets:
        # bf16 matrices of a user go through fp16 as well; here they show what bf16 products do.
        compute = torch.bfloat16 if dtype == torch.bfloat16 else None
        run = functools.partial(linalg.polar, x, preset, dtype=compute)
        variants[f"polar {preset}"] = Variant(
            lambda run=run: [run()],  # type: ignore[misc]
            ours=True,
            errors=errors,
            bounds=BOUNDS,
            flop=flop([x], preset),
            bytes=2.0 * x.nbytes,
            rate=name_of(compute or linalg.compute_dtype(preset, dtype, settings.device)),
            captured=preset in ("auto", "turbo") and may_capture([x]),
        )
    if settings.cuda and "polar auto" in variants:
        variants["polar auto, uncut"] = replace(variants["polar auto"], run=uncut(variants["polar auto"].run))
    return Case("polar", name, name_of(dtype), variants | theirs(x, settings, errors), BASE)


def uncut(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call with its whole batch in every launch, beside chunks that are to stay in the L2 cache."""

    def run() -> Any:
        whole = functools.partial(polar_chain.polar_chain, chunks=1)
        with mock.patch.object(newton_schulz, "polar_chain", whole):
            return call()

    return run


def may_capture(xs: Sequence[Tensor]) -> bool:
    return sum(x.numel() for x in xs) <= MOST_CAPTURED


class Gate:
    """The errors of polar factors of stacks: the worst over the first and last matrix of each, against fp64.

    ``norms`` is how far the norm of any matrix is from that of a semi-orthogonal one, relatively; it takes part in the
    relative error, so that every matrix is looked at.
    """

    def __init__(self, xs: Sequence[Tensor]) -> None:
        self.xs = xs
        self._truths: list[dict[int, Truth]] | None = None

    @property
    def truths(self) -> list[dict[int, Truth]]:
        if self._truths is None:
            self._truths = [{i: Truth(x[i]) for i in {0, len(x) - 1}} for x in self.xs]
        return self._truths

    @torch.no_grad()
    def __call__(self, factors: Sequence[Sequence[Tensor] | Tensor]) -> Errors:
        worst = Error(0.0, 0.0)
        for of_stack, ys in zip(self.truths, factors, strict=True):
            for i, truth in of_stack.items():
                worst = worst.worse(truth.error(ys[i]))
            norms = torch.stack([torch.linalg.vector_norm(y, dtype=torch.float32) for y in ys])
            # The norm of the difference is at least the difference of the norms.
            worst = worst.worse(Error((norms / min(ys[0].shape) ** 0.5 - 1).abs().max().item(), 0.0))
        return worst.row()


def references(xs: list[Tensor], settings: Settings, errors: Callable[[Any], Errors]) -> dict[str, Variant]:
    """torch.optim.Muon's function, matrix by matrix: eager, and compiled."""
    work = float(sum(planner.Stack(*x.shape).reference_flop for x in xs))
    function = muon()
    eager = Variant(
        lambda: one_by_one(function, xs),
        version=torch.__version__,
        errors=errors,
        bounds=BOUNDS,
        flop=work,
        bytes=2.0 * sum(x.nbytes for x in xs),
        rate="bfloat16",
    )
    variants = {BASE: eager}
    wanted = settings.cuda and not settings.quick if settings.compiled is None else settings.compiled
    if wanted and xs[0].dtype == dtypes(settings)[0]:
        compiled = torch.compile(function, dynamic=False)
        variants[f"{BASE} compiled"] = replace(eager, run=lambda: one_by_one(compiled, xs))
    return variants


def theirs(x: Tensor, settings: Settings, errors: Callable[[Any], Errors]) -> dict[str, Variant]:
    if not settings.peers or x.dtype != dtypes(settings)[0]:
        return {}
    copy = x.clone()  # some write into what they are given

    def variant(run: peers.Polar, version: str) -> Variant:
        return Variant(
            lambda: [run(copy)],
            version=version,
            errors=errors,
            bounds=BOUNDS,
            before=lambda: copy.copy_(x),
            bytes=2.0 * x.nbytes,
        )

    return {peer.name: variant(peer.make(), peer.version) for peer in peers.installed("polar")}


def _chain_flop(x: Tensor, preset: str) -> int:
    count, m, n = x.shape
    nodes = linalg.nodes_of(linalg.choose(m, n, preset, device=x.device, x_dtype=x.dtype))
    return count * sum(multiplication(node, m, n).flop for node in nodes if not isinstance(node, Sum))


def flop(xs: Sequence[Tensor], preset: str) -> float:
    """What the preset executes: on a GPU by its plan, elsewhere what torch's products do, or the compiled chain's."""
    if not xs[0].is_cuda:
        return flop_of(lambda: [linalg.polar(x, preset) for x in xs]) or float(sum(_chain_flop(x, preset) for x in xs))
    dtype = "bfloat16" if xs[0].dtype == torch.bfloat16 else None
    plans = [planner.Stack(*x.shape) for x in xs]
    count = torch.cuda.get_device_properties(xs[0].device).multi_processor_count
    return float(planner.plan(plans, preset, dtype=dtype, multiprocessors=count).totals()["executed_flop"])
