"""The elementwise part of a step: the bandwidth of each op beside a copy, and AdamW beside torch's.

Bytes count each tensor once for every time the op must read or write it. Results are compared with the parts in torch
ops before anything is timed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from steepest import zoo
from steepest.ops import multi_tensor
from steepest.ops.multi_tensor import Groups, Item, Items, Table
from steepest.ops.program import Program

from ...shapes import elements, parse
from ..case import Case, Job, Settings, Variant
from ..optimizers import LR, PARTS_BOUNDS, parameters, parts_error
from .common import name_of, sizes, timed

ELEMENTS = (100_000_000, 1_000_000_000)
CPU_ELEMENTS = (1_000_000,)
MODELS, CPU_MODELS = ("gpt2-124m", "llama-1b"), ("small", "tiny")

MUON = Program(nesterov=True)
MUADAM = Program(momentum_correction=True, power="quarter", second_correction=True, eps_inside=True)
ADAMW = Program(momentum_correction=True, power="quarter", second_correction=True, direction="identity")
PROGRAMS = {"Muon": MUON, "MuAdam": MUADAM, "AdamW": ADAMW}
PARTS = 8  # tensors that the elements are shared out among
HYPER = [1e-3, 0.01, 0.9, 0.999, 1e-8]
COPY, TORCH = "copy", "torch fused AdamW"


def fused(settings: Settings) -> Iterator[Job]:
    counts = settings.options.get("elements") or (ELEMENTS if settings.cuda else CPU_ELEMENTS)
    for count in counts[:1] if settings.quick else counts:
        for dtype in settings.dtypes or (torch.float32, torch.bfloat16):
            build = functools.partial(_bandwidth, count, dtype, settings)
            yield from timed("fused", f"{count:,} elements", dtype, settings, build)
    for name in sizes(settings, MODELS, MODELS[:1], CPU_MODELS[1:] if settings.quick else CPU_MODELS):
        yield from timed("fused", f"{name} AdamW", torch.float32, settings, functools.partial(_adamw, name, settings))


class Ops:
    """One program over `elements` elements in PARTS parameters of `dtype`, with fp32 averages."""

    def __init__(self, program: Program, elements: int, dtype: torch.dtype, device: str) -> None:
        size = elements // PARTS

        def some(dtype: torch.dtype, scale: float) -> list[Tensor]:
            return [(scale * torch.randn(size, device=device)).to(dtype) for _ in range(PARTS)]

        none: list[Tensor] = []
        self.program, self.elements = program, size * PARTS
        self.grads, self.params, self.momenta = some(dtype, 1e-3), some(dtype, 0.02), some(torch.float32, 1e-3)
        self.seconds = none if program.power == "none" else [m.square() for m in self.momenta]
        self.inputs = none if program.whole else some(torch.bfloat16 if device == "cpu" else torch.float16, 1.0)
        self.steps = [torch.ones((), device=device) for _ in range(PARTS)]
        skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.table = Table.empty(skipped, [size] * PARTS, [(1, size)] * PARTS)
        self.items = Items(tuple(Item(program, i, 1, i, (0, i, 0), 1.0) for i in range(PARTS)))
        self.groups = Groups(HYPER, [], [], [0] * PARTS)
        self.grad_stats()

    def grad_stats(self) -> None:
        packed = [self.program.packed()] * PARTS
        multi_tensor.grad_stats(self.grads, self.steps, self.table, packed, list(range(PARTS + 1)), self.groups)

    def update_moments(self) -> None:
        params = self.params if self.program.whole else []
        multi_tensor.update_moments(
            self.grads, self.momenta, self.seconds, self.inputs, params, [], self.table, self.items
        )

    def apply_update(self) -> None:
        multi_tensor.apply_update(self.inputs, self.seconds, self.params, [], [], [], self.table, self.items)

    def bytes_of(self, op: str) -> float:
        g, p, x = (each[0].itemsize if each else 0 for each in (self.grads, self.params, self.inputs))
        second = 4 if self.seconds else 0
        moved = {
            "grad_stats": g,
            "update_moments": g + 8 + 2 * second + x + (2 * p if self.program.whole else 0),
            "apply_update": x + second + 2 * p,
        }
        return float(moved[op] * self.elements)


def _bandwidth(count: int, dtype: torch.dtype, settings: Settings) -> Case:
    source = torch.randn(count, device=settings.device)
    target = torch.empty_like(source)
    variants = {COPY: Variant(lambda: target.copy_(source), version=torch.__version__, bytes=8.0 * count)}
    error = parts_error(zoo.MuAdam, settings.device, polar="svd")
    for name, program in PROGRAMS.items():
        ops = Ops(program, count, dtype, settings.device)
        for op in ("grad_stats",) * (name == "Muon") + ("update_moments",) + ("apply_update",) * (not program.whole):
            variants[f"{op} {name}"] = Variant(
                getattr(ops, op), ours=True, errors=lambda _: error, bounds=PARTS_BOUNDS, bytes=ops.bytes_of(op)
            )
    return Case("fused", f"{count:,} elements", name_of(dtype), variants, COPY)


def _adamw(name: str, settings: Settings) -> Case:
    """AdamW over all parameters of a model: torch's fused one, and ours."""
    model = parse(name)
    params = parameters(model, "matrix", settings.device) + parameters(model, "other", settings.device)
    values = {"lr": LR, "weight_decay": 0.01}
    ours = zoo.MuAdam([{"params": params, "use_muon": False, **values}])
    theirs = torch.optim.AdamW(params, fused=True, **values)  # type: ignore[arg-type]
    moved = 7.0 * 4 * elements(model)  # gradient, and two averages and the weight twice
    error = parts_error(zoo.MuAdam, settings.device, polar="svd")
    variants = {
        TORCH: Variant(theirs.step, version=torch.__version__, bytes=moved),
        "AdamW": Variant(ours.step, ours=True, errors=lambda _: error, bounds=PARTS_BOUNDS, bytes=moved),
    }
    return Case("fused", f"{name} AdamW", "float32", variants, TORCH)
