"""The steepest direction of a base norm N and its dual norm.

    unit(x) = argmax { <x, d> : N(d) <= 1 }        dual_norm(x) = <x, unit(x)>        scaled(x) = dual_norm(x) unit(x)
    saturated(x, r) = argmin { ||x - r d||_F : N(d) <= 1 },   unit(x) for r = 0,   x / r for N(x) <= r

                N(x)                unit(x), x = U S V^T       dual_norm(x)
    Frobenius   sqrt(sum x_ij^2)    x / ||x||_F                ||x||_F             SGD, Adam, Shampoo, SOAP when scaled
    Sign        max |x_ij|          sign(x)                    sum |x_ij|          SignSGD, SPlus
    OneHot      sum |x_ij|          sign of the largest x_ij   max |x_ij|
    Rows        max_i ||x_i:||_2    x_i: / ||x_i:||_2          sum_i ||x_i:||_2    Scion's embeddings and heads
    Columns     max_j ||x_:j||_2    x_:j / ||x_:j||_2          sum_j ||x_:j||_2
    Spectral    max S               U V^T                      sum S               Muon, MuAdam
    Nuclear     sum S               u_1 v_1^T                  max S
    Schatten    (sum S^p)^(1/p)     U S^(q-1) V^T / its norm   (sum S^q)^(1/q)     Schattor; q = p / (p - 1)

x is (..., m, n), one matrix per batch element; dual norms are (..., 1, 1) in fp32, or fp64 for fp64 inputs. The zero
matrix has the zero direction, a zero row or column a zero one. Factors of the shape, such as those of operator norms
between RMS norms, are in `steepest.parts.step_size`. Source: arXiv:2510.10777, section 2; arXiv:2409.20325.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..linalg import polar, schatten
from ..linalg.chain import product_flop
from ..linalg.work import Work, svd_flop
from ..ops import solvers
from ..ops.matmul import matmul
from ..ops.polar_chain import Update
from ..ops.reductions import total, vector_norm
from .hyper import Number


@dataclass(frozen=True)
class Direction:
    """A base norm. Subclasses give `unit`; the rest follows from it."""

    #: whether many matrices at once are cheaper than one after the other
    batched = False
    #: whether `move` is there
    moves = False
    #: whether `sharded_units` is there
    shards = False
    #: kernels that a GPU is asked for beside those of products (`steepest.ops.selfcheck.FAMILIES`)
    families: ClassVar[tuple[str, ...]] = ()

    def unit(self, x: Tensor) -> Tensor:
        """The direction."""
        raise NotImplementedError

    def units(self, xs: Sequence[Tensor], slacks: Sequence[Tensor]) -> list[Tensor]:
        """`unit` of every x; of several shapes, on one device, and not changed in the meantime.

        slacks: of each (batch,) fp32, filled with what `Spectral` knows of its norm bound and else left.
        """
        return [self.unit(x) for x in xs]

    def move(self, xs: Sequence[Tensor], slacks: Sequence[Tensor], updates: Sequence[Update]) -> None:
        """W <- beta W + eta unit(x) for every matrix, in place; as `units`, but that no direction is kept."""
        raise NotImplementedError(f"{type(self).__name__} has no way straight into weights")

    def sharded_units(
        self, xs: Sequence[Tensor], dims: Sequence[int], slacks: Sequence[Tensor], all_reduce: polar.AllReduce
    ) -> list[Tensor]:
        """This rank's part of `unit` of matrices of which it has the parts xs: some rows (dim -2) or columns (-1).

        Every rank calls with its parts, which may be empty, in the same order; all_reduce sums a tensor over them, in
        place. `dual_norm` of the parts is then this rank's addend of the dual norm. Of `Spectral` alone, but for
        preset="svd" (`shards`): matrices of other norms are made whole first.
        """
        raise NotImplementedError(f"{type(self).__name__} has no direction of a part of a matrix: make it whole first")

    def sharded_bytes(self, short: int, device: torch.device) -> int:
        """Bytes of a matrix with this short side that `sharded_units` has summed over the ranks."""
        raise NotImplementedError(f"{type(self).__name__} has no direction of a part of a matrix")

    def dual_norm(self, x: Tensor, d: Tensor) -> Tensor:
        """<x, d>, which for d = unit(x) is the dual norm of x; the largest number there is where it is beyond that."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return total(x.to(wide) * d.to(wide), keepdim=True).clamp(max=torch.finfo(wide).max)

    def scaled(self, x: Tensor) -> Tensor:
        """The step of regularized steepest descent, argmin <-x, s> + N(s)^2 / 2."""
        d = self.unit(x)
        return d * self.dual_norm(x, d).clamp(max=torch.finfo(d.dtype).max).to(d.dtype)

    def dual_norm_of_scaled(self, x: Tensor, s: Tensor) -> Tensor:
        """The dual norm of x from s = scaled(x): the root of <x, s>, a square that may be no number of its dtype."""
        if not x.shape[-2:].numel():
            return self.dual_norm(x, s)
        wide = torch.promote_types(x.dtype, torch.float32)
        x, s = x.to(wide), s.to(wide)
        of_x, of_s = (t.abs().amax((-2, -1), keepdim=True) for t in (x, s))
        share = total(x / torch.where(of_x > 0, of_x, 1) * (s / torch.where(of_s > 0, of_s, 1)), keepdim=True)
        return (of_x.sqrt() * of_s.sqrt() * share.clamp(min=0).sqrt()).clamp(max=torch.finfo(wide).max)

    def saturated(self, x: Tensor, radius: Number) -> Tensor:
        """The point of the unit ball nearest to x / radius, a float or 0-d and >= 0. Of most norms not known here."""
        raise NotImplementedError(f"{type(self).__name__} has no closed form for the nearest point of its ball")

    def capturable(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether `unit` of a matrix of this dtype never waits for the device, so that a CUDA graph can hold it."""
        return True

    def compute_dtype(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """The dtype in which `unit` works, so that its input can be gathered in it."""
        return dtype

    def work(self, m: int, n: int, dtype: torch.dtype, device: torch.device | str) -> Work:
        """What `unit` of one m x n matrix of ``dtype`` takes."""
        return Work(wide=4 * m * n)

    def workspace_bytes(self, m: int, n: int, dtype: torch.dtype) -> int:
        """About what `unit` allocates for one matrix of compute dtype."""
        return m * n * dtype.itemsize

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(direction, dual norm)."""
        d = self.unit(x)
        return d, self.dual_norm(x, d)


@dataclass(frozen=True)
class Frobenius(Direction):
    """Euclidean length of the matrix as a vector. `scaled` is the identity."""

    def unit(self, x: Tensor) -> Tensor:
        return _of_length_one(x, (-2, -1))

    def scaled(self, x: Tensor) -> Tensor:
        return x

    def saturated(self, x: Tensor, radius: Number) -> Tensor:
        return _shortened(x, length(x), radius)


@dataclass(frozen=True)
class Sign(Direction):
    """Largest magnitude of an entry."""

    def unit(self, x: Tensor) -> Tensor:
        return x.sign()

    def saturated(self, x: Tensor, radius: Number) -> Tensor:
        return _shortened(x, x.abs(), radius)


@dataclass(frozen=True)
class OneHot(Direction):
    """Sum of the magnitudes of the entries. Of several largest entries the first counts, row by row."""

    def unit(self, x: Tensor) -> Tensor:
        if x.numel() == 0:
            return x.clone()
        flat = x.reshape(*x.shape[:-2], -1)
        largest = flat.abs().argmax(dim=-1, keepdim=True)
        return torch.zeros_like(flat).scatter_(-1, largest, flat.gather(-1, largest).sign()).reshape(x.shape)


@dataclass(frozen=True)
class Rows(Direction):
    """Largest Euclidean length of a row: every row of the direction has length 1.

    With the factors "embedding" (a row is a token) and "head_rows" of `shape_ratio` a norm of Scion and the modular
    norm: the largest RMS of a row, and the operator norm from RMS to max.
    """

    def unit(self, x: Tensor) -> Tensor:
        return _of_length_one(x, -1)

    def saturated(self, x: Tensor, radius: Number) -> Tensor:
        return _shortened(x, length(x, -1), radius)


@dataclass(frozen=True)
class Columns(Direction):
    """Largest Euclidean length of a column; with the factor "embedding_columns" that of an embedding (dim, tokens)."""

    def unit(self, x: Tensor) -> Tensor:
        return _of_length_one(x, -2)

    def saturated(self, x: Tensor, radius: Number) -> Tensor:
        return _shortened(x, length(x, -2), radius)


@dataclass(frozen=True)
class Spectral(Direction):
    """Largest singular value, by the Newton-Schulz polar factor; arguments as in `steepest.polar`.

    The direction is only as orthogonal as the preset promises; preset="svd" is exact.
    """

    preset: str = "auto"
    coefficients: tuple[tuple[float, ...], ...] | None = None
    steps: int | None = None
    eps: float = 1e-7
    max_workspace_bytes: int | None = None

    batched = True
    moves = True

    def capturable(self, dtype: torch.dtype, device: torch.device) -> bool:
        return self.preset != "svd" or self.coefficients is not None

    @property
    def shards(self) -> bool:  # type: ignore[override]
        return self.preset != "svd" or self.coefficients is not None

    def unit(self, x: Tensor, *, slack: Tensor | None = None) -> Tensor:
        """The direction; slack: as one of `units`."""
        return self._polars([x], None if slack is None else [slack])[0]

    def units(self, xs: Sequence[Tensor], slacks: Sequence[Tensor]) -> list[Tensor]:
        return self._polars(xs, slacks)

    def move(self, xs: Sequence[Tensor], slacks: Sequence[Tensor], updates: Sequence[Update]) -> None:
        self._polars(xs, slacks, updates)

    def sharded_units(
        self, xs: Sequence[Tensor], dims: Sequence[int], slacks: Sequence[Tensor], all_reduce: polar.AllReduce
    ) -> list[Tensor]:
        return polar.sharded_polars(
            xs,
            dims,
            all_reduce,
            self.preset,
            coefficients=self.coefficients,
            steps=self.steps,
            eps=self.eps,
            slacks=slacks,
        )

    def sharded_bytes(self, short: int, device: torch.device) -> int:
        options: Any = {"coefficients": self.coefficients, "steps": self.steps}
        choice = polar.choose_sharded(short, self.preset, device=device, **options)
        return 4 * (1 + len(choice.restarts)) * polar.gram_elements(short)

    def saturated(self, x: Tensor, radius: Number) -> Tensor:
        """The nearest point of the ball, by the singular value decomposition in fp64 whatever the preset."""
        u, s, vt = solvers.svd(x.double().reshape(-1, *x.shape[-2:]))
        return matmul(_shortened(s, s, radius).unsqueeze(-2) * u, vt).to(x.dtype).reshape(x.shape)

    def _polars(
        self, xs: Sequence[Tensor], slacks: Sequence[Tensor] | None, updates: Sequence[Update] | None = None
    ) -> list[Tensor]:
        return polar.polars(
            xs,
            self.preset,
            coefficients=self.coefficients,
            steps=self.steps,
            eps=self.eps,
            max_workspace_bytes=self.max_workspace_bytes,
            slacks=slacks,
            updates=updates,
        )

    def cpu_chains(self, shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> list[polar.CpuChain] | None:
        """How one call on a CPU takes `units` of matrices of these shapes and dtype; None where it does not."""
        return polar.cpu_chains(
            shapes,
            dtype,
            self.preset,
            coefficients=self.coefficients,
            steps=self.steps,
            eps=self.eps,
            max_workspace_bytes=self.max_workspace_bytes,
        )

    def compute_dtype(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        return polar.compute_dtype(self.preset, dtype, device)

    def work(self, m: int, n: int, dtype: torch.dtype, device: torch.device | str) -> Work:
        if not self.shards:
            return Work(wide=product_flop(m, n, min(m, n), symmetric=False), solver=svd_flop(m, n))
        options: dict[str, Any] = {"coefficients": self.coefficients, "steps": self.steps, "x_dtype": dtype}
        return Work(polar.polar_flop(polar.choose(m, n, self.preset, device=device, **options), m, n))

    def sharded_work(self, m: int, n: int, tall: bool, dtype: torch.dtype, device: torch.device | str) -> Work:
        """What `sharded_units` takes for a part of m x n, rows of a tall matrix or columns of a wide one."""
        options: dict[str, Any] = {"coefficients": self.coefficients, "steps": self.steps, "x_dtype": dtype}
        choice = polar.choose_sharded(n if tall else m, self.preset, device=device, **options)
        return Work(polar.polar_flop(choice, m, n, tall))

    def workspace_bytes(self, m: int, n: int, dtype: torch.dtype) -> int:
        return polar.workspace_bytes(m, n, dtype)


@dataclass(frozen=True)
class SpectralOfSign(Spectral):
    """The polar factor of sign(x), whose entries are all of one size (AdaMuon, arXiv:2507.11005).

    It is steepest for no norm of x: <x, unit(x)> is above 0 for most x only, and no dual norm.
    """

    def sharded_units(
        self, xs: Sequence[Tensor], dims: Sequence[int], slacks: Sequence[Tensor], all_reduce: polar.AllReduce
    ) -> list[Tensor]:
        return super().sharded_units([x.sign() for x in xs], dims, slacks, all_reduce)

    def _polars(
        self, xs: Sequence[Tensor], slacks: Sequence[Tensor] | None, updates: Sequence[Update] | None = None
    ) -> list[Tensor]:
        return super()._polars([x.sign() for x in xs], slacks, updates)


@dataclass(frozen=True)
class Schatten(Direction):
    """The p-norm of the singular values, 1 <= p <= inf; arguments as in `steepest.linalg.schatten.schatten`.

    p = 1 is `Nuclear`, 2 `Frobenius`, inf `Spectral`. The direction is within rounding, or near the value given there,
    of length 1, and the dual norm <x, unit(x)> falls short of the q-norm by the square of the direction's error.
    """

    p: float = 4.0
    method: str = "auto"
    eps: float = 1e-7
    max_workspace_bytes: int | None = None

    batched = True
    families = ("eigenvectors",)

    def __post_init__(self) -> None:
        schatten.check_norm(self.p, self.method)

    def capturable(self, dtype: torch.dtype, device: torch.device) -> bool:
        return schatten.by_products(self.p, self.method)

    def unit(self, x: Tensor) -> Tensor:
        return schatten.schatten(
            x, self.p, method=self.method, eps=self.eps, max_workspace_bytes=self.max_workspace_bytes
        )

    def compute_dtype(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        return schatten.compute_dtype(self.p, dtype, device, method=self.method)

    def work(self, m: int, n: int, dtype: torch.dtype, device: torch.device | str) -> Work:
        return schatten.schatten_work(self.p, m, n, dtype, device, method=self.method)

    def workspace_bytes(self, m: int, n: int, dtype: torch.dtype) -> int:
        return schatten.workspace_bytes(self.p, m, n, dtype, method=self.method)


@dataclass(frozen=True)
class Nuclear(Schatten):
    """Sum of the singular values: a direction of rank one, by products alone."""

    p: float = 1.0


def length(x: Tensor, dim: int | tuple[int, int] = (-2, -1)) -> Tensor:
    """The Euclidean length over dim, which is kept, in x's dtype; the largest number there is where it is beyond that.

    Squares are summed in fp64: those of 1e-25 and of 1e25 leave fp32.
    """
    norm = vector_norm(x, dim, keepdim=True, dtype=torch.float64)
    return norm.clamp(max=torch.finfo(x.dtype).max).to(x.dtype)


def _shortened(x: Tensor, norm: Tensor, radius: Number) -> Tensor:
    """x / max(norm, radius), 0 where both are 0."""
    longer = norm.clamp(min=radius) if isinstance(radius, Tensor) else norm.clamp(min=float(radius))
    return torch.where(longer > 0, x / longer, 0)


def _of_length_one(x: Tensor, dim: int | tuple[int, int]) -> Tensor:
    """x divided by its Euclidean length over dim; 0 stays 0."""
    if x.numel() == 0:
        return x.clone()
    # The largest entry is divided out first: squares of 1e-25 and of 1e25 leave fp32.
    largest = x.abs().amax(dim=dim, keepdim=True).to(torch.promote_types(x.dtype, torch.float32))
    y = torch.where(largest > 0, x / largest, 0)
    norm = vector_norm(y, dim, keepdim=True)  # >= 1, or 0
    return (y / norm.clamp(min=1)).to(x.dtype)
