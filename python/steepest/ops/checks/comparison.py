"""What kernels wrote beside what they should have: memory between guards, bounds, and one flag for all of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

GUARD = 256  # bytes before and behind a tensor: all ones, which is NaN in every floating dtype
MOST = 3  # differences that a verdict names


@dataclass(frozen=True)
class _Expected:
    what: str
    error: Tensor
    bound: Tensor | float


@dataclass
class Comparison:
    """Tensors for the kernels of one check, and all that is expected of them. Nothing is read before the verdict."""

    device: torch.device
    seed: int = 0
    _guards: list[Tensor] = field(default_factory=list)
    _expected: list[_Expected] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.generator = torch.Generator(self.device).manual_seed(self.seed)

    def empty(self, *shape: int, dtype: torch.dtype, shift: int = 0) -> Tensor:
        """Contiguous memory of NaN between guards, ``shift`` elements behind a multiple of 16 bytes."""
        first, size = GUARD + shift * dtype.itemsize, math.prod(shape) * dtype.itemsize
        room = torch.full((first + size + GUARD,), 255, dtype=torch.uint8, device=self.device)
        self._guards += [room[:first], room[first + size :]]
        return room[first : first + size].view(dtype).view(shape)

    def place(self, t: Tensor, shift: int = 0) -> Tensor:
        """A contiguous copy of t between guards: what lies beside it, read by mistake, gives NaN."""
        return self.empty(*t.shape, dtype=t.dtype, shift=shift).copy_(t)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, shift: int = 0) -> Tensor:
        """Normal numbers of a seed, between guards."""
        numbers = torch.randn(shape, generator=self.generator, dtype=torch.float32, device=self.device)
        return self.empty(*shape, dtype=dtype, shift=shift).copy_(numbers.mul_(scale))

    def numbers(self, values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def expect(self, what: str, result: Tensor, wanted: Tensor | float, bound: Tensor | float = 0.0) -> None:
        """|found - wanted| <= bound for every number; NaN is never right."""
        exact = torch.float64 in (result.dtype, wanted.dtype if isinstance(wanted, Tensor) else None)
        wide = torch.float64 if exact or not result.is_floating_point() else torch.float32
        error = result.to(wide).sub(wanted).abs_()
        self._expected.append(_Expected(what, error, bound))

    def verdict(self) -> str | None:
        """None where everything is as expected, else what is not, with its numbers."""
        right = [(each.error <= each.bound).all() for each in self._expected]
        right.append((torch.cat(self._guards) == 255).all())
        if bool(torch.stack(right).all()):  # the only time that the host waits
            return None
        wrong = [each for each, fine in zip(self._expected, torch.stack(right).tolist()) if not fine]
        said = [_difference(each) for each in wrong[:MOST]]
        if len(wrong) > MOST:
            said.append(f"{len(wrong) - MOST} more")
        beside = int((torch.cat(self._guards) != 255).sum())
        if beside:
            said.append(f"{beside} bytes beside the tensors were written")
        return "; ".join(said)


def _difference(each: _Expected) -> str:
    error = each.error.double()
    bound = torch.as_tensor(each.bound, dtype=torch.float64, device=error.device).expand_as(error)
    wrong = ~(error <= bound)
    excess = torch.where(wrong, (error / bound).nan_to_num(nan=math.inf), -1).flatten()
    worst = int(excess.argmax())
    count = f"{int(wrong.sum())} of {wrong.numel()} numbers are wrong"
    return f"{each.what}: {count}, by {error.flatten()[worst]:.2g} where {bound.flatten()[worst]:.2g} is allowed"


def rounded(wanted: Tensor, dtype: torch.dtype, terms: Tensor, unit: float = 2.0**-18) -> Tensor:
    """A bound on what is stored in a dtype: a unit in its last place, and ``unit`` of the terms, which are magnitudes.

    A right kernel errs by half of the one and by a few 2^-24 of the other; a wrong one by far more than both.
    """
    info = torch.finfo(dtype)
    bound = (terms * unit).add_(max(info.smallest_normal * info.eps, 1e-37))
    return bound.add_(wanted.abs(), alpha=info.eps) if dtype.itemsize == 2 else bound
