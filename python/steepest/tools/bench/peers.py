"""Other people's implementations, whichever can be imported, called as their authors do it and with their defaults.

    role        a builder gives                            called with
    polar       x -> polar factors                         a stack (batch, m, n); a tensor or a list of matrices
    gram        x -> X X^T                                 a stack (batch, m, m)
    muon        (matrices, others) -> optimizers           lists of parameters; others may be empty
    soap        the same, refreshed at every step

Nothing of theirs is here: a package that is not installed is named as absent, and one that fails as failed. Two are
files rather than packages and are found on PYTHONPATH: `triton_kernels.py` of modded-nanogpt and `soap.py` of the SOAP
paper.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Polar = Callable[[Tensor], "Tensor | list[Tensor]"]
Build = Callable[[Sequence[nn.Parameter], Sequence[nn.Parameter]], list[Optimizer]]

LR = 1e-3  # of every optimizer
FOUND = "found"


@dataclass(frozen=True)
class Peer:
    """A package and what it can be built to do; package: the name its version goes by."""

    name: str
    package: str
    roles: Mapping[str, Callable[[], Any]]


@dataclass(frozen=True)
class Found:
    """A peer in one role. make: a fresh one; status: "found", or why it cannot be had."""

    name: str
    version: str
    make: Callable[[], Any]
    status: str = FOUND


def known(role: str) -> list[Found]:
    """Every peer that has this role, with its version, or with the reason why it cannot be had."""
    return [_look(peer, role) for peer in PEERS if role in peer.roles]


def installed(role: str) -> list[Found]:
    """The peers that can be imported."""
    return [peer for peer in known(role) if peer.status == FOUND]


def _look(peer: Peer, role: str) -> Found:
    make = guarded(peer.roles[role])
    try:
        make()
        status = FOUND
    except Exception as error:  # a peer that does not load is a line in the table, whatever its reason
        status = f"absent: {type(error).__name__}: {error}"
    return Found(peer.name, version(peer.package), make, status)


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def guarded(make: Callable[[], Any]) -> Callable[[], Any]:
    """`make` without what an import changes for everybody."""

    def guard() -> Any:
        with _torch_as_it_is():
            return make()

    return guard


@contextmanager
def _torch_as_it_is() -> Iterator[None]:
    precision = torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        if torch.get_float32_matmul_precision() != precision:
            torch.set_float32_matmul_precision(precision)


def _of(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def beside(optimizer: Optimizer, others: Sequence[nn.Parameter]) -> list[Optimizer]:
    """A peer's optimizer, with torch's AdamW for what a method of matrices does not take."""
    return [optimizer, torch.optim.AdamW(others, lr=LR, fused=True)] if others else [optimizer]


# ---- gram-newton-schulz and quack, its kernels ---------------------------------------------------------------------


def _gram_newton_schulz() -> Polar:
    return _of("gram_newton_schulz", "GramNewtonSchulz")()


def _gram_newton_schulz_muon() -> Build:
    Muon = _of("gram_newton_schulz", "Muon")

    def build(matrices: Sequence[nn.Parameter], others: Sequence[nn.Parameter]) -> list[Optimizer]:
        scalar = torch.optim.AdamW(others, lr=LR, fused=True) if others else None
        return [Muon(list(matrices), lr=LR, scalar_optimizer=scalar)]

    return build


def _quack() -> Callable[[Tensor], Tensor]:
    gemm_symmetric = _of("quack.gemm_interface", "gemm_symmetric")
    return lambda x: gemm_symmetric(x, x.mT)


# ---- dion ----------------------------------------------------------------------------------------------------------


def _dion() -> Polar:
    return _of("dion.newton_schulz_triton", "newton_schulz_triton")


def _dion_gram() -> Callable[[Tensor], Tensor]:
    return _of("dion.newton_schulz_triton", "ns_line_1")


def _dion_muon() -> Build:
    Muon = _of("dion", "Muon")

    def build(matrices: Sequence[nn.Parameter], others: Sequence[nn.Parameter]) -> list[Optimizer]:
        rest = [{"params": list(others), "algorithm": "adamw"}] if others else []
        return [Muon([{"params": list(matrices)}, *rest], lr=LR, use_triton=True)]

    return build


# ---- Emerging-Optimizers -------------------------------------------------------------------------------------------


def _emerging_optimizers() -> Polar:
    """fp32 in and out; bf16 inside where torch's precision of fp32 products is "medium", as its optimizers set it."""
    newton_schulz = _of("emerging_optimizers.orthogonalized_optimizers.muon_utils", "newton_schulz")
    known = inspect.signature(newton_schulz).parameters
    options = {"use_syrk": True} if "use_syrk" in known else {}

    def run(x: Tensor) -> list[Tensor]:
        with _torch_as_it_is():
            torch.set_float32_matmul_precision("medium")
            return [newton_schulz(each.float(), steps=5, coefficient_type="quintic", **options) for each in x]

    return run


def _emerging_optimizers_gram() -> Callable[[Tensor], list[Tensor]]:
    tsyrk_ex = _of("emerging_optimizers.triton_kernels", "tsyrk_ex")

    def run(x: Tensor) -> list[Tensor]:
        if x.dtype != torch.bfloat16:
            raise TypeError(f"tsyrk_ex takes bfloat16, not {x.dtype}")
        return [tsyrk_ex(each) for each in x]

    return run


def _emerging_optimizers_muon() -> Build:
    Muon = _of("emerging_optimizers.orthogonalized_optimizers", "Muon")
    return lambda matrices, others: beside(Muon(list(matrices), lr=LR, use_syrk=True), others)


# ---- flash-muon, modded-nanogpt ------------------------------------------------------------------------------------


def _flash_muon() -> Polar:
    fast_newtonschulz = _of("flash_muon", "fast_newtonschulz")
    return lambda x: [fast_newtonschulz(each, 5) for each in x]


def _flash_muon_gram() -> Callable[[Tensor], list[Tensor]]:
    matmul_transpose = _of("flash_muon", "matmul_transpose")
    return lambda x: [matmul_transpose(each) for each in x]


def _modded_nanogpt() -> Callable[[Tensor], Tensor]:
    XXT = _of("triton_kernels", "XXT")
    return lambda x: XXT(x, torch.empty_like(x))


# ---- collections of optimizers, and SOAP ---------------------------------------------------------------------------


def _heavyball_muon() -> Build:
    heavyball = importlib.import_module("heavyball")
    return lambda matrices, others: beside(heavyball.Muon(list(matrices), lr=LR), others)


def _heavyball_soap() -> Build:
    heavyball = importlib.import_module("heavyball")
    options = {"precondition_frequency": 1, "max_precond_dim": 10000, "merge_dims": False}
    return lambda matrices, others: beside(heavyball.SOAP(list(matrices), lr=LR, **options), others)


def _pytorch_optimizer_muon() -> Build:
    Muon = _of("pytorch_optimizer", "Muon")

    def build(matrices: Sequence[nn.Parameter], others: Sequence[nn.Parameter]) -> list[Optimizer]:
        rest = [{"params": list(others), "use_muon": False}] if others else []
        return [Muon([{"params": list(matrices), "use_muon": True}, *rest], lr=LR)]

    return build


def _pytorch_optimizer_soap() -> Build:
    SOAP = _of("pytorch_optimizer", "SOAP")
    return lambda matrices, others: beside(SOAP(list(matrices), lr=LR, precondition_frequency=1), others)


def _soap() -> Build:
    SOAP = _of("soap", "SOAP")
    if not issubclass(SOAP, Optimizer):
        raise ImportError("soap is another package here; put the folder of the reference's soap.py on PYTHONPATH")
    return lambda matrices, others: beside(SOAP(list(matrices), lr=LR, precondition_frequency=1), others)


PEERS: tuple[Peer, ...] = (
    Peer(
        "gram-newton-schulz",
        "gram-newton-schulz",
        {"polar": _gram_newton_schulz, "muon": _gram_newton_schulz_muon},
    ),
    Peer("quack", "quack-kernels", {"gram": _quack}),
    Peer("dion", "dion", {"polar": _dion, "gram": _dion_gram, "muon": _dion_muon}),
    Peer(
        "emerging-optimizers",
        "emerging-optimizers",
        {"polar": _emerging_optimizers, "gram": _emerging_optimizers_gram, "muon": _emerging_optimizers_muon},
    ),
    Peer("flash-muon", "flash-muon", {"polar": _flash_muon, "gram": _flash_muon_gram}),
    Peer("modded-nanogpt", "modded-nanogpt", {"gram": _modded_nanogpt}),
    Peer("heavyball", "heavyball", {"muon": _heavyball_muon, "soap": _heavyball_soap}),
    Peer("pytorch-optimizer", "pytorch-optimizer", {"muon": _pytorch_optimizer_muon, "soap": _pytorch_optimizer_soap}),
    Peer("SOAP reference", "soap", {"soap": _soap}),
)
