"""What the suites share: stacks of Gaussian matrices, dtypes, and names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from steepest.linalg.coefficients import JORDAN_STEP

from ...shapes import matrices, parse
from ..case import Case, Job, Row, Settings, measure
from ..ceilings import Ceilings

BASE = "torch.optim.Muon"


def dtypes(settings: Settings) -> Sequence[torch.dtype]:
    """The dtypes that are asked for; else the 16-bit ones on a GPU and fp32 elsewhere."""
    return settings.dtypes or ((torch.float16, torch.bfloat16) if settings.cuda else (torch.float32,))


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def sizes(settings: Settings, full: Sequence[str], quick: Sequence[str], cpu: Sequence[str]) -> Sequence[str]:
    """The shapes asked for; else the full or quick ones of a GPU, or those of a CPU, the first alone with --quick."""
    if settings.shapes:
        return settings.shapes
    if settings.cuda:
        return quick if settings.quick else full
    return cpu[:1] if settings.quick else cpu


def stacks(name: str, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Gaussian matrices, of every stack of a model or of what "+" joins."""
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(s, generator=generator, device=device, dtype=dtype) for s in matrices(parse(name))]


def timed(suite: str, name: str, dtype: torch.dtype, settings: Settings, build: Callable[[], Case]) -> Iterator[Job]:
    """The job of measuring the case."""

    def run(ceilings: Ceilings) -> list[Row]:
        if settings.cuda and (settings.compiled or settings.peers):
            torch.compiler.reset()  # what is compiled sees each shape as the first
        return measure(build(), settings, ceilings)

    yield Job(suite, name, name_of(dtype), run)


def muon() -> Callable[[Tensor], Tensor]:
    """torch.optim.Muon's function of one matrix."""
    from torch.optim._muon import _zeropower_via_newtonschulz  # private: only who measures it depends on it

    return lambda x: _zeropower_via_newtonschulz(x, JORDAN_STEP, 5, 1e-7)  # type: ignore[arg-type]


def one_by_one(function: Callable[[Tensor], Tensor], xs: Sequence[Tensor]) -> list[list[Tensor]]:
    # torch's function divides a bf16 matrix in place.
    return [[function(each.clone() if x.dtype == torch.bfloat16 else each) for each in x] for x in xs]
