"""Other implementations of the polar factor, by the name of their package; whichever can be imported.

A peer takes a stack (batch, m, n) and returns its polar factors, called as its package calls it in an optimizer, with
its own defaults.
"""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Run = Callable[[Tensor], "Tensor | list[Tensor]"]


@dataclass(frozen=True)
class Peer:
    name: str
    version: str
    build: Callable[[], Run] | None  # for stacks of one shape
    reason: str = ""  # why not


def _gram_newton_schulz() -> Run:
    from gram_newton_schulz import GramNewtonSchulz

    run: Run = GramNewtonSchulz()
    return run


def _dion() -> Run:
    from dion.newton_schulz_triton import newton_schulz_triton

    run: Run = newton_schulz_triton
    return run


def _emerging_optimizers() -> Run:
    """fp32 in and out; bf16 inside where torch's precision of fp32 products is "medium"."""
    from emerging_optimizers.orthogonalized_optimizers.muon_utils import newton_schulz

    known = inspect.signature(newton_schulz).parameters
    options = {"use_syrk": True} if "use_syrk" in known else {}

    def run(x: Tensor) -> list[Tensor]:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        try:
            return [newton_schulz(each.float(), steps=5, coefficient_type="quintic", **options) for each in x]
        finally:
            torch.set_float32_matmul_precision(before)

    return run


BUILDS = {
    "gram-newton-schulz": _gram_newton_schulz,
    "dion": _dion,
    "emerging-optimizers": _emerging_optimizers,
}


def found() -> list[Peer]:
    """Every peer, with its version, or with the reason why it cannot be had."""
    peers = []
    for name, build in BUILDS.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "unknown"
        try:
            build()
            peers.append(Peer(name, version, build))
        except Exception as error:  # a peer that does not load is a line in the table, whatever its reason
            peers.append(Peer(name, version, None, f"{type(error).__name__}: {error}"))
    return peers
