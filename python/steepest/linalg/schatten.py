"""The steepest direction of a Schatten norm.   X = U S V^T;  ||X||_p = (sum s_i^p)^(1/p);  q = p / (p - 1).

    unit(X) = argmax { <X, D> : ||D||_p <= 1 } = U S^(q-1) V^T / ||S||_q^(q-1)          <X, unit(X)> = ||X||_q

(arXiv:2606.15702; Bhatia, Matrix Analysis, section IV.2.)  p = 2 is X / ||X||_F, p = inf the polar factor, p = 1 the
rank-one u_1 v_1^T.  With R = X X^T:

    q = 2, 4, 6, ...           S^(q-1) = R^((q-2)/2) X, exact                                    p = 2, 4/3, 6/5, ...
    p = 1                      R^4096 by squaring: the power method
    p = inf                    `polar`
    any other                  eigenvectors of R in fp64; of a matrix in fp64, its singular value decomposition
    p = 3/2, 3, 4, 6, 8        on request x^(q-1) by a composition of odd polynomials, which err by more than 16 bits

A step of a composition remembers the x it began with:

    y_1 = a x + b x^3 + c x^5         y_(k+1) = a y + b y^3 + c y^5 + d x
    Y <- (a I + b A + c A^2) Y + d X,  A = Y Y^T

Without d x every step would have to be injective, and an increasing quintic lifts a small x by 9/4 at most; with x at
hand it may lift by 8 and fold, as in the polar iteration, and y = x^(1/3) is the fixed point of y <- y + c (x - y^3).
Four steps at p = 4 err by .06 with that term and by .10 without.  It takes no product, and every intermediate matrix
has singular values of order 1, so that 16 bits bear it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..ops import solvers
from ..ops.chain_numbers import squared_norm_bound
from ..ops.eigh import eigenvectors
from ..ops.matmul import matmul
from ..ops.power import power as power_of
from ..ops.reductions import total, vector_norm
from ..ops.symm_gemm import Workspace, linear, times
from . import polar as _polar
from .chain import product_flop
from .polar.jobs import chunk_size
from .runner import Runner
from .scaling import inverse_power_of_two, prescaled
from .work import Work, eigh_flop, square_flop, svd_flop

METHODS = ("auto", "matmul", "eigh")
#: (a, b, c, d) of every step; d of the first is 0.
Steps = tuple[tuple[float, float, float, float], ...]

# Compositions for s^(q-1), by p.  Minimised: the larger of max |f(x) - x^(q-1)| over [1e-3, 1.01] and half of the same
# where every term of every step but the last is off by 2^-9, bf16's rounding, over all signs of the steps; fitted
# without the second, one in thousands of small matrices came out wrong.  Local minima of a search from many starts; the
# errors stand in `schatten`, and the tests compute them again.
STEPS: dict[float, Steps] = {
    1.5: (
        (17.94584, -25.29578, 8.371484, 0.0),
        (-0.05428952, 0.0003554534, -3.27165e-06, 1.054185),
    ),
    3: (
        (7.26453, -22.31778, 14.55915, 0.0),
        (2.874716, -2.678238, 0.6844327, 0.0270114),
        (1.807984, -1.54318, 0.5435593, -0.2112207),
        (0.4443807, -1.175588, 1.203819, 1.577777),
        (0.8588357, -0.7669149, 0.287993, 0.6323463),
    ),
    4: (
        (9.969616, -21.48601, 13.87236, 0.0),
        (2.650334, -0.7578718, 0.06776767, -0.1472228),
        (2.149273, -0.6273856, 0.05977206, 0.7342023),
        (1.257594, -0.267961, 0.01962884, -1.582601),
        (1.775778, -1.294519, 0.4439334, 0.4933537),
        (0.6006502, -1.241379, 1.012514, 1.185508),
    ),
    6: (
        (8.853352, -22.1122, 15.28712, 0.0),
        (3.508827, -1.684323, 0.2254794, -0.4797122),
        (2.665443, -1.393693, 0.2307349, 0.02793811),
        (1.652399, -0.7983918, 0.1572062, -1.709579),
        (1.845531, -1.444072, 0.5574385, 0.8937812),
        (0.9517495, -1.41414, 0.9450995, 1.030121),
    ),
    8: (
        (7.915865, -22.00348, 15.7602, 0.0),
        (3.792064, -2.344564, 0.4019822, -0.3351542),
        (2.871465, -1.792181, 0.3315224, -0.09625088),
        (1.890968, -1.120473, 0.2540331, -1.482629),
        (1.860942, -1.477734, 0.5938485, 0.9965364),
        (1.215954, -1.512444, 0.8672696, 0.7306811),
    ),
}
# X is divided by this much more than the bound of its norm: rounding may carry it over 1, and f is tame to 1.01 only.
SAFETY = 1.02
# q up to which X is multiplied by R: beyond it (s / bound)^q leaves the range of bf16.
MOST_POWERS = 32
# fp16 bears R^3: X R^k is (bound / norm)^2k times smaller than X, which is 8^k for a Gaussian matrix of 1024 rows.
MOST_FP16_POWER = 3
# R is squared so often for p = 1: the power method with 2^12 products.
SQUARINGS = 12
# and then v <- X^T X v so often in fp32, which takes out what 16-bit products left of other directions.
POLISHINGS = 16
# K steps take 5 K - 5 + 3 a half products in the Gram form, a = long / short side, K (3 a + 1) in the standard form.
GRAM_ASPECT = 1.25


@torch.no_grad()
def schatten(
    x: Tensor,
    p: float,
    *,
    method: str = "auto",
    eps: float = 1e-7,
    dtype: torch.dtype | None = None,
    max_workspace_bytes: int | None = None,
) -> Tensor:
    """The D with ||D||_p <= 1 that goes furthest along every matrix in x.   x: (..., m, n) floating; D in its dtype.

    D is computed in fp64 and rounded once. With u half of the eps of x's dtype (.0039 in bf16, 4.9e-4 in fp16, 6.0e-8
    in fp32) ||D - exact||_F <= u ||exact||_F, if no singular value lies between 1e-7 and 1e-5 of the largest; with
    such, D is nearer than moving the entries of x by u would leave it. In fp64 D is LAPACK's: 3e-14 away at condition
    1e3 and 1e-12 at 1e5 (p = 8). But for:

        p = 4/3, 6/5, ...   exact powers by products; in bf16, as a GPU takes fp32 and 16 bits, .004
        p = 1               by products, has rank one, length 1, and reaches .998 of the largest singular value
        p = inf             `polar` ("auto")

    method="matmul" has products for p = 3/2, 3, 4, 6, 8 too: X is divided by an upper bound of its norm and
    D = U f(S) V^T / ||f(S)||_p, f near s^(q-1). No dtype makes f better:

                       largest error on [1e-3, 1]               falls    16 bits      work, "auto" polar = 1
        p              f          rounded to bf16    gain       short    bf16  fp16   m x m   m x 4m
        3/2            .0019      .0064              .08        .0011    .005  .001   .47     .59
        3              .0154      .028               16         .0008    .028  .004   1.18    1.48
        4              .0262      .047               77         .0022    .10   .013   1.47    1.86
        6              .0390      .064               236        .0041    .21   .031   1.53    1.89
        8              .0541      .090               363        .0083    .31   .046   1.53    1.89
        4/3, 6/5       exact                                    0        .004  -      .18     .27 (4/3)

    *gain*: below 1e-3, f is about gain times s.  *falls short*: the part of ||X||_q by which <X, D> misses it, the
    worst of eleven spectra; .0135 where one to three singular values stand out at p = 8.  *16 bits*: the rounding,
    relative to ||D||_F, of matrices of full rank; where nearly all singular values are 0 it is lifted in their place,
    to .8 (bf16), .1 (fp16) and .05 (fp32, m x 4m) at p = 8 and rank 2.  *work*: operations in products in bf16; on
    m x 4m in fp32 1.2 times polar's at p = 8, and in fp16, in which only polar bears the Gram form, 2.4 times.
    ||D||_p = 1 up to rounding; at p = 3 and 3/2, where ||f(S)||_p is taken to be <X, U f(S) V^T>^(1/p), up to .012 and
    .003.

    Args:
        p: at least 1; inf is the polar factor.
        method: "matmul" for products alone, which never wait for the device; "eigh" for the decomposition in fp64, a
            solver that waits for a GPU; "auto" for products where p = 1, inf, or they are exact, and else "eigh".
        eps: "eigh" drops singular values below max(eps, rounding) times the largest; p = inf as in `polar`.
        dtype: compute dtype of products, which are then taken where p has some; `compute_dtype` chooses by default.
        max_workspace_bytes: bound on what one chunk of the batch allocates; at least one matrix is worked on.

    A zero matrix gives zero; one with a non-finite entry gives NaN and leaves the rest of its batch alone.  The scale
    of x does not matter.  Deterministic, not differentiable.

    Raises:
        ValueError: p below 1, an unknown method, "matmul" for a p without products, fp16 for p below 8/7 but for 1, x
            with fewer than two dimensions, a negative eps.
        TypeError: x is not real floating point, or dtype is not a compute dtype.
    """
    _check(x, p, method, eps, dtype)
    method = "matmul" if dtype is not None and method == "auto" else method
    eigh = not by_products(p, method)
    if p == math.inf and not eigh:
        return _polar.polar(x, "auto", eps=eps, dtype=dtype, max_workspace_bytes=max_workspace_bytes)
    if x.numel() == 0:
        return torch.empty_like(x)
    work = torch.float64 if eigh else dtype or compute_dtype(p, x.dtype, x.device)
    batch = x.reshape(-1, *x.shape[-2:])
    out = torch.empty(batch.shape, dtype=x.dtype, device=x.device)
    _, m, n = batch.shape
    bytes_of_one = workspace_bytes(p, m, n, work, method="eigh" if eigh else "matmul")
    size = chunk_size(batch, bytes_of_one, max_workspace_bytes)
    for chunk, target in zip(batch.split(size), out.split(size), strict=True):
        y = prescaled(chunk, work)
        if eigh:
            y = _decomposed(y, p, eps, _by_svd if x.dtype == torch.float64 else _by_eigenvectors)
        elif p == 1:
            y = _leading(y, prescaled(chunk, torch.promote_types(x.dtype, torch.float32)))
        else:
            y = _by_products(y, p)
        target.copy_(y)
    return out.reshape(x.shape)


def by_products(p: float, method: str = "auto") -> bool:
    """Whether `schatten` takes matrix products alone, and so never waits for the device.

    "auto" takes them where they err by no more than the dtype they run in; compositions (STEPS) do in none, but for
    p = 1 and inf, which mean the power method and `polar`.
    """
    exact = p in (1, math.inf) or _power(p) is not None
    return method != "eigh" and (exact or (method == "matmul" and p in STEPS))


def compute_dtype(p: float, dtype: torch.dtype, device: torch.device | str, *, method: str = "auto") -> torch.dtype:
    """The dtype in which `schatten` works on a matrix of ``dtype``, so that its input can be gathered in it.

    That of `polar` ("auto"), but on a CPU none narrower than the matrix but for p = inf, and for p = 1 and powers of R
    bf16 instead of fp16, for its range; fp32 at least for p = 2 (no products), for p = 1 on a CPU, and for what is
    decomposed, in fp64.
    """
    wide = torch.promote_types(dtype, torch.float32)
    if not by_products(p, method) or p == 2:
        return wide
    of_polar = _polar.compute_dtype("auto", dtype, device)
    if p == math.inf:
        return of_polar
    if torch.device(device).type == "cpu" and (p == 1 or dtype.itemsize > 2):
        return wide
    return torch.bfloat16 if of_polar == torch.float16 and p not in STEPS else of_polar


def workspace_bytes(p: float, m: int, n: int, dtype: torch.dtype, *, method: str = "auto") -> int:
    """About what one m x n matrix occupies while it is worked on in ``dtype``, or in fp64 where it is decomposed.

    Products take what `polar` takes and X in fp32, for norms and where p = 1: an upper bound.
    """
    work = dtype if by_products(p, method) else torch.float64
    beside = 0 if p == math.inf else m * n * torch.promote_types(work, torch.float32).itemsize
    return _polar.workspace_bytes(m, n, work) + beside


def schatten_work(
    p: float, m: int, n: int, dtype: torch.dtype, device: torch.device | str, *, method: str = "auto"
) -> Work:
    """About what `schatten` takes for one m x n matrix of ``dtype``."""
    short, long = min(m, n), max(m, n)
    gram, square = product_flop(short, short, long, symmetric=True), square_flop(short)
    apply = product_flop(short, long, short, symmetric=False)
    if not by_products(p, method):
        if dtype == torch.float64:
            return Work(wide=apply, solver=svd_flop(m, n))
        return Work(wide=gram + 2 * apply, solver=eigh_flop(short))
    if p == math.inf:
        return Work(_polar.polar_flop(_polar.choose(m, n, device=device, x_dtype=dtype), m, n))
    if p == 1:
        return Work(gram + SQUARINGS * square, wide=4 * POLISHINGS * m * n)
    power = _power(p)
    if power is not None:
        squarings = max(0, power.bit_length() - 1 + bin(power).count("1") - 1)
        return Work(gram + squarings * square + apply if power else 0)
    steps = len(STEPS[p])
    norm = (gram if p % 2 == 0 else 0) + (square if p in (6, 8) else 0)
    if compute_dtype(p, dtype, device, method=method).itemsize > 2 and long >= GRAM_ASPECT * short:
        return Work(gram + (5 * steps - 5) * square + apply + norm)
    return Work(steps * (gram + square + apply) + norm)


def _check(x: Tensor, p: float, method: str, eps: float, dtype: torch.dtype | None) -> None:
    if not x.is_floating_point():
        raise TypeError(f"schatten takes a real floating-point tensor, got {x.dtype}; convert it first")
    if x.ndim < 2:
        raise ValueError(f"schatten takes matrices (..., m, n), got shape {tuple(x.shape)}; add a dimension")
    if dtype is not None and dtype not in _polar.COMPUTE_DTYPES:
        known = ", ".join(map(str, _polar.COMPUTE_DTYPES))
        raise TypeError(f"dtype {dtype} cannot be computed in; choose one of {known}")
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    check_norm(p, method)
    if dtype == torch.float16 and method != "eigh" and (_power(p) or 0) > MOST_FP16_POWER:
        raise ValueError(f"dtype torch.float16 does not hold the powers that p = {p:g} takes; choose torch.bfloat16")


def check_norm(p: float, method: str) -> None:
    """The check of p and method: ValueError for p below 1, an unknown method, "matmul" for a p without products."""
    if not p >= 1:
        raise ValueError(f"p must be at least 1, got {p}; math.inf is the spectral norm")
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not known; choose one of {', '.join(METHODS)}")
    if method == "matmul" and not by_products(p, method):
        known = ", ".join(f"{v:g}" for v in sorted({1, 2, *STEPS, math.inf}))
        raise ValueError(f"p = {p:g} has no products: choose one of {known}, or method='auto'")


def _power(p: float) -> int | None:
    """The k with s^(q-1) = s^(2k+1), if it is a whole number: p = (2k + 2) / (2k + 1)."""
    if not 1 < p <= 2:
        return None
    k = round(p / (p - 1) / 2) - 1
    return k if 2 * k + 2 <= MOST_POWERS and abs(p * (2 * k + 1) / (2 * k + 2) - 1) < 1e-12 else None


def _by_products(x: Tensor, p: float) -> Tensor:
    """U f(S) V^T / ||f(S)||_p.   x: (batch, m, n), entries of order 1 at most, overwritten."""
    run, power, y = Runner(x, Workspace()), _power(p), "x"
    if power != 0:
        gram = run.gram("gram", "x")
        factors = inverse_power_of_two(squared_norm_bound(gram)[0])
        scale = factors.first * factors.second  # entries of x are of order 1, and so is this
        times(gram, scale, out=gram)
        if power is None:
            y = _compose(run, scale, STEPS[p])
        else:
            times(x, scale.sqrt(), out=x)
            y = "y"
            run.apply(y, _matrix_power(run, power), "x")
    even = power is None and p % 2 == 0
    norm = _even_norm(run, y, int(p)) if even else power_of(_inner(x, run[y]).clamp_min(0), 1 / p)
    return times(run[y], torch.where(norm == 0, norm, 1 / norm), out=run[y])


def _compose(run: Runner, scale: Tensor, steps: Steps) -> str:
    """The buffer of Y for "x" and "gram" = scale X X^T, whose eigenvalues are at most 1; X is divided by a bound.

    The bound of its norm is taken from R^2, which the first step needs anyway: on a Gaussian matrix of 1024 rows it is
    1.6 times the norm, that from R 2.9 times.
    """
    x, gram, square = run["x"], run["gram"], run.multiply("square", "gram", "gram")
    bound = squared_norm_bound(square)[0]
    tight = torch.where(bound == 0, torch.ones_like(bound), bound).rsqrt() / SAFETY**2
    times(x, (scale * tight).sqrt(), out=x)
    a, b, c, _ = steps[0]
    linear(square, gram, alpha=c * tight * tight, beta=b * tight, gamma=a, out=square)
    if x.dtype.itemsize > 2 and max(x.shape[-2:]) >= GRAM_ASPECT * min(x.shape[-2:]):
        times(gram, tight, out=gram)
        return _gram_form(run, steps[1:])
    run.apply("y", "square", "x")
    y = "y"
    for a, b, c, d in steps[1:]:
        run.gram("gram", y)
        run.multiply("square", "gram", "gram", "gram", alpha=c, beta=b, shift=a)
        following = "w" if y == "y" else "y"
        run.apply(following, "square", y, "x", beta=d)
        y = following
    return y


def _gram_form(run: Runner, steps: Steps) -> str:
    """The steps of `_compose` with Y = Q X, so that X is touched once; not for 16 bits.

    "gram": R = X X^T; "square": Q at first.
    With C = X Y^T = Q R and A = Y Y^T a step is Q <- H Q + d I, C <- H C + d R, A <- H (H A + 2 d C) + d^2 R.  A is not
    taken as Q R Q: Q is as large as the lift of small singular values, and its rounding would be multiplied by that.
    """
    q, c = "square", "c"
    run.multiply(c, q, "gram")
    run.multiply("a", q, c)
    for k, (a1, b3, c5, d) in enumerate(steps):
        run.multiply("h", "a", "a", "a", alpha=c5, beta=b3, shift=a1)
        following = "q" if q == "square" else "square"
        run.multiply(following, "h", q, shift=d)
        q = following
        if k + 1 < len(steps):
            run.multiply("t", "h", "a").add_(run[c], alpha=2 * d)
            run.multiply("a", "h", "t", "gram", beta=d * d)
            following = "e" if c == "c" else "c"
            run.multiply(following, "h", c, "gram", beta=d)
            c = following
    run.apply("y", q, "x")
    return "y"


def _even_norm(run: Runner, y: str, p: int) -> Tensor:
    """||Y||_p = (tr A^(p/2))^(1/p), A = Y Y^T; (batch,)."""
    run.gram("gram", y)
    low = _matrix_power(run, p // 4)
    high = run[low] if p % 4 == 0 else run.multiply("square", low, "gram")
    return power_of(_inner(run[low], high).clamp_min(0), 1 / p)


def _matrix_power(run: Runner, power: int) -> str:
    """The buffer of "gram"^power, power >= 1: "gram" itself or another."""
    if power == 1:
        return "gram"
    half = _matrix_power(run, power // 2)
    square, product = ("q", "p") if half == "p" else ("p", "q")
    run.multiply(square, half, half)
    if power % 2 == 0:
        return square
    run.multiply(product, square, "gram")
    return product


def _leading(y: Tensor, x: Tensor) -> Tensor:
    """u v^T of length 1, <X, u v^T> near the largest singular value.   y: (batch, m, n); x: the same in fp32 or fp64.

    The column of R^4096 with the largest diagonal entry, then products of X with vectors.  Singular values within a
    thousandth of the largest may mix.
    """
    wide = x.mT if x.shape[-2] > x.shape[-1] else x
    run, buffer = Runner(y, Workspace()), "gram"
    gram = run.gram("gram", "x")
    for _ in range(SQUARINGS):
        length = vector_norm(gram.to(x.dtype))
        times(gram, torch.where(length == 0, length, 1 / length), out=gram)
        following = "square" if buffer == "gram" else "gram"
        gram, buffer = run.multiply(following, buffer, buffer), following
    largest = gram.diagonal(dim1=-2, dim2=-1).argmax(-1)[:, None, None]
    u = _unit(gram.gather(-1, largest.expand(-1, gram.shape[-2], 1)).to(x.dtype))
    for _ in range(POLISHINGS):
        u = _unit(matmul(wide, _unit(matmul(wide.mT, u))))
    v = _unit(matmul(wide.mT, u))
    return v * u.mT if wide is not x else u * v.mT


def _unit(v: Tensor) -> Tensor:
    length = vector_norm(v, -2, keepdim=True)
    return torch.where(length == 0, length, v / length)


def _decomposed(
    x: Tensor, p: float, eps: float, decompose: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
) -> Tensor:
    """U S^(q-1) V^T / ||S||_q^(q-1) from U, S and rows along V^T.   x: (batch, m, n) fp64."""
    wide = x.mT if x.shape[-2] > x.shape[-1] else x
    finite = wide.isfinite().all(-1).all(-1)[:, None, None]
    wide = torch.where(finite, wide, 0)  # solvers refuse NaN
    u, s, rows = decompose(wide)
    s = s / s.amax(-2, keepdim=True).clamp_min(torch.finfo(s.dtype).tiny)
    kept = s > max(eps, torch.finfo(s.dtype).eps * max(x.shape[-2:]))
    if p == 1:
        f = (torch.arange(s.shape[-2], device=s.device)[:, None] == s.argmax(-2, keepdim=True)).to(s.dtype) * kept
    else:
        f = torch.where(kept, power_of(s, 1 / (p - 1)), 0)
    length = power_of(total(power_of(f, p), -2, keepdim=True), 1 / p)
    d = matmul(u, _unit(rows.mT).mT * torch.where(length == 0, length, f / length))
    return torch.where(finite, d.mT if wide.shape != x.shape else d, torch.nan)


def _by_eigenvectors(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U of X X^T, the lengths of the rows of U^T X, and these: they keep more of small singular values than eigenvalues
    do, yet not all digits of fp64.
    """
    u = eigenvectors(matmul(x, x.mT))
    rows = matmul(u.mT, x)
    return u, vector_norm(rows, -1, keepdim=True), rows


def _by_svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vt = solvers.svd(x)
    return u, s[..., None], vt


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """<A, B> of every matrix, (batch,), in fp32 at least."""
    wide = torch.promote_types(a.dtype, torch.float32)
    return total(a.to(wide, copy=True).mul_(b))
