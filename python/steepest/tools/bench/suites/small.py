"""Many small matrices: torch's function one by one, and ours stack by stack and in one call.

A call is timed as it is made, with the gaps between its launches: they are what many small matrices cost.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

import torch

from steepest.linalg.polar import polar, polars

from ...shapes import matrices, parse, spelled
from ..case import Case, Job, Settings, Variant
from .common import BASE, dtypes, name_of, sizes, stacks, timed
from .polar import BOUNDS, Gate, flop, may_capture, references

# The last four: where clusters take over from blocks, and the chain from clusters.
SHAPES = ("ultralytics-126", "per-head", "lora-16", "42x136x136", "42x192x192", "42x256x256", "42x264x264")
QUICK = SHAPES[:2]
CPU = ("6x16x24+4x32x32",)


def small(settings: Settings) -> Iterator[Job]:
    for name in sizes(settings, SHAPES, QUICK, CPU):
        for dtype in dtypes(settings):
            yield from timed("small", name, dtype, settings, functools.partial(_case, name, dtype, settings))


@torch.no_grad()
def _case(name: str, dtype: torch.dtype, settings: Settings) -> Case:
    xs = stacks("+".join(spelled(matrices(parse(name)))), dtype, settings.device)
    errors = Gate(xs)
    variants = references(xs, settings, errors)
    variants[BASE] = replace(variants[BASE], captured=may_capture(xs))
    work, moved = flop(xs, "auto"), 2.0 * sum(x.nbytes for x in xs)
    stack_by_stack = Variant(
        lambda: [polar(x) for x in xs], ours=True, errors=errors, bounds=BOUNDS, flop=work, bytes=moved
    )
    variants["polar auto, stack by stack"] = stack_by_stack
    variants["polar auto, one call"] = replace(stack_by_stack, run=lambda: polars(xs), captured=may_capture(xs))
    return Case("small", name, name_of(dtype), variants, BASE, hide=False)
