"""Optimizers over a named model: ours, torch's and the peers', each with the error of its first step.

All share parameters and gradients, so that they differ in their state and their work alone; a peer has gradients of
its own, filled anew before each step, because some write into them. The error of a Muon is that of the first step of
a fresh optimizer from zero weights, on one Gaussian gradient of each shape, against the fp64 polar factor; a peer's,
whose scale is its own, after it is brought to the norm of a semi-orthogonal matrix. The error of another method of ours
is how far three fused steps on a tiny model end from the same steps in torch ops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from steepest import zoo
from steepest.graph import graphed
from steepest.optimizer import MatrixOptimizer

from ..shapes import Model, elements, matrices, parse
from . import peers
from .case import Errors, Settings, Variant
from .peers import LR, Build, beside
from .truth import Error, Truth

BETAS = (0.9, 0.999)  # of MuAdam; at the first step its direction is that of sign(g) sqrt|g|
GRADIENT = 1e-3  # the size that a language model has
PARTS_STEPS = 3
# A direction on Gaussian gradients: every polynomial leaves .02 to .25, rounding .006 to .03.
MUON_BOUNDS = {"relative_error": 0.4, "off_diagonal": 0.05}
PARTS_BOUNDS = {"off_the_parts": 1e-3}
MOST_TO_COMPILE = 64  # matrices; torch.compile unrolls all of them


@dataclass(frozen=True)
class Method:
    """metric: what the direction's error is taken in, "muon" or "muadam"; "normed" as muon, scale aside; None: none."""

    build: Build
    metric: str | None
    ours: bool = True
    version: str = ""
    essential: bool = False  # kept where memory is short
    wrap: Callable[[Optimizer], Any] | None = None
    skip: str = ""  # why it is not run


def ours(kind: type[MatrixOptimizer], **options: Any) -> Build:
    def build(matrices: Sequence[nn.Parameter], others: Sequence[nn.Parameter]) -> list[Optimizer]:
        rest: list[dict[str, Any]] = [{"params": list(others), "use_muon": False}] if others else []
        return [kind([{"params": list(matrices)}, *rest], lr=LR, **options)]  # type: ignore[call-arg, arg-type]

    return build


def torch_muon(matrices: Sequence[nn.Parameter], others: Sequence[nn.Parameter]) -> list[Optimizer]:
    return beside(torch.optim.Muon(matrices, lr=LR), others)


BASE, SOAP = "torch.optim.Muon", "SOAP"
TORCH = Method(torch_muon, "muon", ours=False, version=torch.__version__, essential=True)
MUONS: dict[str, Method] = {
    "Muon": Method(ours(zoo.Muon), "muon"),
    "Muon exact": Method(ours(zoo.Muon, polar="exact"), "muon"),
    "Muon auto": Method(ours(zoo.Muon, polar="auto"), "muon", essential=True),
    "Muon auto, fused update": Method(ours(zoo.Muon, polar="auto", fuse_update=True), "muon"),
    "Muon turbo": Method(ours(zoo.Muon, polar="turbo"), "muon"),
    "MuAdam auto": Method(ours(zoo.MuAdam, betas=BETAS), "muadam", essential=True),
    "MuAdam turbo": Method(ours(zoo.MuAdam, betas=BETAS, polar="turbo"), "muadam"),
}
SOAPS: dict[str, Method] = {
    SOAP: Method(ours(zoo.SOAP, precondition_frequency=1), None, essential=True),
}
CAPTURED = ("Muon auto", "MuAdam auto")


def muons(settings: Settings, model: Model) -> dict[str, Method]:
    """torch's, ours, and on a GPU ours as one CUDA graph; then the peers'."""
    methods = {BASE: TORCH}
    few = sum(count for count, _, _ in matrices(model)) <= MOST_TO_COMPILE
    if settings.compiled and few:
        methods[f"{BASE} compiled"] = replace(TORCH, essential=False, wrap=_compiled)
    methods |= MUONS
    if settings.cuda:
        methods |= {f"{name}, captured": replace(MUONS[name], metric=None, wrap=graphed) for name in CAPTURED}  # type: ignore[arg-type]
    return methods | theirs("muon", "normed", settings)


def soaps(settings: Settings) -> dict[str, Method]:
    """Refreshed at every step."""
    return SOAPS | theirs("soap", None, settings)


def theirs(role: str, metric: str | None, settings: Settings) -> dict[str, Method]:
    if not settings.peers:
        return {}
    return {
        peer.name: Method(peer.make(), metric, ours=False, version=peer.version, essential=True)
        for peer in peers.installed(role)
    }


def _compiled(optimizer: Optimizer) -> Any:
    torch.compiler.reset()

    class Compiled:
        step = staticmethod(torch.compile(lambda: optimizer.step(), fullgraph=False))

    return Compiled


class Problem:
    """Gaussian parameters of a model with Gaussian gradients, both in ``dtype``; whole: with what is no matrix."""

    def __init__(self, model: Model, device: str, dtype: torch.dtype = torch.float32, whole: bool = False) -> None:
        self.matrices = parameters(model, "matrix", device, dtype)
        self.others = parameters(model, "other", device, dtype) if whole else []
        self.grads = [p.grad for p in self.params if p.grad is not None]

    @property
    def params(self) -> list[nn.Parameter]:
        return [*self.matrices, *self.others]

    def give(self, grads: Sequence[Tensor]) -> None:
        """Puts these gradients into the parameters."""
        for p, grad in zip(self.params, grads, strict=True):
            p.grad = grad

    def build(self, method: Method) -> list[Any]:
        """The optimizers of a method, or what they are wrapped in."""
        optimizers = method.build(self.matrices, self.others)
        return optimizers if method.wrap is None else [method.wrap(each) for each in optimizers]

    def variant(self, method: Method, errors: Errors) -> Variant:
        """A step with all gradients in place."""
        if method.skip:
            return Variant(lambda: None, method.ours, method.version, skip=method.skip)
        optimizers: list[Any] = []
        copies: list[Tensor] = [] if method.ours or method.build is torch_muon else [g.clone() for g in self.grads]

        def before() -> None:
            if not optimizers:
                self.give(copies or self.grads)
                optimizers.extend(self.build(method))
            if copies:
                torch._foreach_copy_(copies, self.grads)
            self.give(copies or self.grads)

        def step() -> None:
            for optimizer in optimizers:
                optimizer.step()

        bounds = {name: most for name, most in (MUON_BOUNDS | PARTS_BOUNDS).items() if name in errors}
        return Variant(step, method.ours, method.version, errors=lambda _: errors, bounds=bounds, before=before)


def parameters(model: Model, kind: str, device: str, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """The parameters of one kind, each with its gradient."""
    generator = torch.Generator(device).manual_seed(0)
    ps = []
    for each in model:
        for _ in range(each.count if each.kind == kind else 0):
            p = nn.Parameter(0.02 * torch.randn(each.shape, generator=generator, device=device).to(dtype))
            p.grad = (GRADIENT * torch.randn(each.shape, generator=generator, device=device)).to(dtype)
            ps.append(p)
    return ps


def direction_errors(
    methods: Mapping[str, Method], shapes: Sequence[tuple[int, int]], device: str
) -> dict[str, Errors]:
    """The errors of every method with a metric, worst over shapes; {} for one that fails, whose row says so later."""
    worst = {name: Error(0.0, 0.0) for name, method in methods.items() if method.metric and not method.skip}
    failed: set[str] = set()
    for m, n in dict.fromkeys(shapes):
        g = GRADIENT * torch.randn(m, n, generator=torch.Generator().manual_seed(m + n)).to(device)
        # D of the first step; a Gaussian sample may be 0.
        metrics = {"muon": torch.ones_like(g), "muadam": g.abs().sqrt()}
        truths = {name: Truth(torch.where(into > 0, g / into, 0)) for name, into in metrics.items()}
        for name in worst:
            method = methods[name]
            metric = "muadam" if method.metric == "muadam" else "muon"
            try:
                w = _first_step(method.build, g)
            except Exception:  # it fails again, with its reason, when it is measured
                failed.add(name)
                continue
            d = w * metrics[metric]
            scale = d.norm() / min(m, n) ** 0.5 if method.metric == "normed" else LR * math.sqrt(max(1, m / n))
            worst[name] = worst[name].worse(truths[metric].error(d / -scale))
    return {name: {} if name in failed else worst[name].row() for name in worst}


def _first_step(build: Build, g: Tensor) -> Tensor:
    w = nn.Parameter(torch.zeros_like(g))
    w.grad = g.clone()
    for optimizer in build([w], []):
        optimizer.step()
    return w.detach()


def parts_error(kind: type[MatrixOptimizer], device: str, **options: Any) -> dict[str, float]:
    """Largest difference of a weight after three fused steps on a tiny model from the same in torch ops, over the
    largest weight of its parameter."""
    model, made = parse("tiny"), []
    for backend in ("auto", "torch"):
        problem = Problem(model, device, whole=True)
        for optimizer in ours(kind, backend=backend, **options)(problem.matrices, problem.others):
            for _ in range(PARTS_STEPS):
                optimizer.step()
        made.append([p.detach() for p in problem.params])
    worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*made, strict=True))
    return {"off_the_parts": worst}


def fitting(methods: dict[str, Method], model: Model, settings: Settings) -> dict[str, Method]:
    """What would not fit into a GPU's memory is not run: first the methods that are not essential, then the last."""
    if not settings.cuda:
        return methods
    free = torch.cuda.mem_get_info()[0]
    size = 4 * elements(model)

    def needed(chosen: Mapping[str, Method]) -> int:
        states = sum(2 if m.ours or m.build is torch_muon else 3 for m in chosen.values())
        return size * (2 + states)

    kept = dict(methods)
    for essential in (False, True):
        for name in [name for name, method in reversed(methods.items()) if method.essential == essential]:
            if needed(kept) > 0.9 * free and len(kept) > 2:
                del kept[name]
    why = "no memory beside the others"
    return {name: method if name in kept else replace(method, skip=why) for name, method in methods.items()}
