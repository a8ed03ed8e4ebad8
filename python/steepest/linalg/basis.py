"""The eigenbasis of a slowly changing symmetric matrix: refreshed from the last one, almost entirely by products.

P is an exponential average and Q the eigenbasis of an earlier one, so B = Q^T P Q is nearly diagonal, d = diag B.  One
*simultaneous Jacobi rotation* moves every column at once, by a skew-symmetric generator X:

    X_ij = B_ij (d_j - d_i) / ((d_j - d_i)^2 + eta^2 (d_i + f)(d_j + f)),    f = 8 eps max d
    Q' = polar(Q + Q X),   Newton-Schulz steps  Y <- Y - Y (Y^T Y - I) / 2,   (I + X)^T (I + X) = I - X^2

The Lorentz factor leaves alone what is not resolved: pairs of nearly equal values.  eta is the smallest of .025 2^k for
which no row of X is longer than 1/2.  Columns keep their slot and sign, so whatever else lives in the basis stays
aligned, without a permutation or a sort.

What matters to a preconditioner is the *whitening error* of a basis, that of diag(B)^-1/2 B diag(B)^-1/2 = I, in which
small eigenvalues count as much as large ones.  A refresh is accepted only where it does not raise it.

Orthogonalising P Q by its polar factor, by Newton-Schulz or otherwise, is not offered and would be wrong: for positive
definite P, polar(P Q) = P Q (Q^T P^2 Q)^-1/2 = Q, no progress at all.  Orthogonal iteration needs a triangular factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ..ops import eigh, solvers
from ..ops.matmul import matmul
from ..ops.products import product
from ..ops.reductions import total, vector_norm
from .chain import product_flop
from .scaling import PowerOfTwo, inverse_power_of_two, largest_entry
from .work import Work, eigh_flop, qr_flop

Method = Literal["auto", "jr", "qr", "eigh", "qr_sorted"]

# Bits of a status.
ACCEPTED = 1  # the basis returned is a new one; otherwise it is the one that came in
FELL_BACK = 2  # "auto": the Jacobi rotation alone was not enough, and a later stage was tried
LARGE_ROTATION = 4  # the Jacobi rotation had to be held back, or left Q less orthonormal than promised
WANTS_EXACT = 8  # no stage got hold of the basis: refresh this matrix with method="eigh" when convenient
NOT_FINITE = 16  # P has an entry that is not finite: the basis stays, its values are 0
NOT_ORTHONORMAL = 32  # Q was not finite, or ||Q^T Q - I||_F > .01 sqrt n: the identity took its place
NOT_SYMMETRIC = 64  # |P - P^T| > 1e-3 max |P| somewhere: the symmetric part was taken

# What ||Q^T Q - I||_F / sqrt n a new basis may have, by dtype, and the Newton-Schulz steps that lead there.
ORTHONORMAL = {torch.float32: 1e-5, torch.float64: 1e-11}
STEPS = {torch.float32: 4, torch.float64: 5}
POWER_STEPS = 6
# Relative error of the product in `_fast`: that of TF32 operands, which fp32 may be rounded to.
FAST_EPS = {torch.float32: 2.0**-10, torch.float64: 2.0**-52}
ORTHONORMAL_ON_ENTRY = 1e-2
SYMMETRIC = 1e-3

SMALLEST_ETA, ETAS = 0.025, 11
LONGEST_ROW = 0.5
# Beyond this eta a rotation is held back so much that orthogonal iteration or an exact solver goes further.
LARGEST_ETA = 0.4
# A stage has done its work where it left a whitening error of at most TRACKED and lowered it by the factor PROGRESS, or
# found one so small that there was nothing to do.
TRACKED = 0.1
PROGRESS = 0.95
SETTLED = 1e-2
# Beyond this whitening error a basis is not tracked but made anew: what else lives in it would be far from the new one.
NEAR = 0.5
#: when `tracked` takes a step of orthogonal iteration; see `steepest.ops.rotated.track`
LIMITS = (NEAR, PROGRESS, SETTLED)
# Steps of it at most. Where P moves as far in one refresh as a step follows, one lowers the error by less than a
# twentieth now and then; the second does, at a tenth of the exact solver's cost.
TRIES = 3
SHIFTED_PASSES, PASSES = 3, 5


# Products of n x n matrices that a refresh takes, counted in full; the tests count them again.
PRODUCTS = {"jr": 14, "qr": 6, "qr_sorted": 6, "eigh": 6}


class Refreshed(NamedTuple):
    """A basis (..., n, n), its values (..., n), the status (...) and the order (..., n) of `eigh_refresh`."""

    basis: Tensor
    values: Tensor
    status: Tensor
    order: Tensor


def refresh_work(n: int, method: Method) -> Work:
    """What `eigh_refresh` of one n x n matrix takes; "auto" as if the first stage were enough."""
    method = "jr" if method == "auto" else method
    solver = {"jr": 0, "qr": qr_flop(n), "qr_sorted": qr_flop(n), "eigh": eigh_flop(n)}[method]
    return Work(wide=PRODUCTS[method] * product_flop(n, n, n, symmetric=False), solver=solver)


@torch.no_grad()
def eigh_refresh(
    P: Tensor,
    Q: Tensor,
    *,
    method: Method = "auto",
    sweeps: int = 1,
    exact: bool | None = None,
    check: bool = False,
) -> Refreshed:
    """A better eigenbasis Q' of P than Q, and its values d' = diag(Q'^T P Q').

    P: (..., n, n) symmetric positive semidefinite, fp32 or fp64.  Q: of P's shape and dtype, orthonormal.  Neither is
    changed.  Deterministic; a matrix has the bits that it has alone, on a GPU but for the rounding of batched products.

        method     basis                                               columns                       reads the device
        jr         ``sweeps`` simultaneous Jacobi rotations            keep slot and sign            never
        qr         orthogonal iteration, QR of P Q sorted, R_ii >= 0   sorted by diag(Q^T P Q)       never
        qr_sorted  orthogonal iteration, QR of P Q as it is            sorted by diag(Q'^T P Q')     never
        eigh       exact (in fp64 on a CPU)                            values descend                yes
        auto       jr, else qr and jr, else eigh, for each apart       keep slot (and sign)          with ``exact``

    "qr" is the refresh of SOAP's reference (N. Vyas et al., arXiv:2409.11321) up to the sign of columns, "qr_sorted"
    that of Emerging-Optimizers (utils/eig.py at commit fd77292).  "jr" at every step has a third to two thirds of the
    whitening error of "qr".  It needs a basis that is near: after ten steps without a refresh it may be too far and
    then does not catch up alone; "auto" does, and stays below "qr".  "eigh" in fp32, as on a GPU, errs by eps max d in
    the smallest values; where that would raise the whitening error the old basis stays.

    "auto" takes for each matrix the first stage that was not held back and left a whitening error of at most .1, less
    than before.  ``exact`` says what happens to the rest.  True reads the flags, waiting for the device, and runs each
    later stage, eigh the last, on the matrices that need it, placing the k-th largest value where the k-th largest was
    and choosing signs by the old columns.  False reads nothing: the second stage runs for all matrices, the best
    accepted basis is kept, and WANTS_EXACT asks for a later refresh by "eigh".  None is True on a CPU, where there is
    no device to wait for.

    Guaranteed for every matrix, whatever came in: without ACCEPTED, Q' is Q bit for bit, or the identity if Q was not
    orthonormal; with it, ||Q'^T Q' - I||_F <= 1e-5 sqrt n (fp64: 1e-11), and the whitening error is no greater than
    that of Q beyond rounding, except by "qr" and "qr_sorted", which are others' steps whether they help or not.  The
    values are diag(Q'^T P Q'), at least 0.  The scale of P does not matter; of P = 0 every basis is as good: Q stays.

    Returns:
        basis and values, in P's dtype; status, (...) int32, a sum of the bits above; order, (..., n) int64: column i
        of the new basis comes from column order[i] of the old one.  Second moments in the old basis are permuted by
        it; it is the identity except for "qr", "qr_sorted" and "eigh", whose columns are sorted.

    Raises:
        TypeError: P is not fp32 or fp64, or Q is of another dtype or device.
        ValueError: shapes that do not fit, an unknown method, sweeps < 1.  With ``check``, which reads the device: P
            that is not finite or not symmetric, Q that is not orthonormal.
    """
    _check_arguments(P, Q, method, sweeps)
    n = P.shape[-1]
    if P.numel() == 0:
        empty = torch.zeros(P.shape[:-2], dtype=torch.int32, device=P.device)
        order = torch.arange(n, device=P.device).expand(P.shape[:-1])
        return Refreshed(Q.clone(), P.new_zeros(P.shape[:-1]), empty, order.clone())
    if eigh.supports(P, method):
        basis, values, status, order = eigh.refresh(P.reshape(-1, n, n), Q.reshape(-1, n, n), method, sweeps)
        if check:
            _check_values(status)
        return _shaped(P, basis, values, status, order)
    if method == "qr" and eigh.iterates(P):
        refreshed = _iterated(P.reshape(-1, n, n), Q.reshape(-1, n, n))
        if check:
            _check_values(refreshed.status)
        return _shaped(P, *refreshed)
    return _refresh(P, Q, method, sweeps, exact, check)


def _refresh(P: Tensor, Q: Tensor, method: Method, sweeps: int, exact: bool | None, check: bool) -> Refreshed:
    """`eigh_refresh` in torch ops."""
    n = P.shape[-1]
    problem = _problem(P.reshape(-1, n, n), Q.reshape(-1, n, n))
    if check:
        _check_values(problem.status)
    old, slots = problem.old, torch.arange(n, device=P.device).expand(len(problem.P), n)
    order = slots
    if method == "auto":
        read = P.device.type == "cpu" if exact is None else exact
        new, accepted, bits = _cascade(problem.P, old, sweeps, read)
    elif method == "jr":
        candidate, small = _rotate(problem.P, old, sweeps)
        new = _better(candidate, old)
        accepted = new.error < old.error
        bits = _bits((~small, LARGE_ROTATION), (~(small & _progress(new, old)), WANTS_EXACT))
    else:
        candidate, order = _SOLVERS[method](problem.P, old)
        accepted = _orthonormal(candidate)
        if method == "eigh":
            # A basis as good as rounding lets it be is taken as well, so that its columns are sorted.
            accepted = accepted & ((candidate.error <= old.error) | (candidate.error <= _rounding(old.B)))
        new = _where(accepted, candidate, old)
        bits = _bits((~_orthonormal(candidate), WANTS_EXACT))
    # P that is zero or not finite has come to this as zero, of which every basis is an eigenbasis: nothing was won.
    nothing = problem.nothing
    accepted = accepted & ~nothing
    basis = torch.where(nothing[:, None, None], old.Q, new.Q)
    order = torch.where(accepted[:, None], order, slots)
    values = torch.where(nothing[:, None], 0, problem.prescale.divide(_diagonal(new.B)[:, None])[:, 0])
    status = torch.where(nothing, 0, bits | _bits((accepted, ACCEPTED))) | problem.status
    return _shaped(P, basis, values, status, order)


@torch.no_grad()
def tracked(P: Tensor, Q: Tensor, *, values: bool = True) -> Refreshed:
    """The refresh of bases on a CPU: `eigh_refresh` by "qr" where that gets hold of a matrix, by "eigh" elsewhere.

    P, Q: as for `eigh_refresh`. Of fp32 matrices whose products are compiled (`steepest.ops.eigh.iterates`) a step of
    orthogonal iteration is taken where the whitening error was at most .5 and falls by a twentieth, to .01 or to what
    rounding makes, and a second and a third where it takes these; every other matrix is solved exactly, which FELL_BACK
    says. Columns are sorted. values: without them they are NaN, and a product is saved.
    """
    if not eigh.iterates(P) or P.numel() == 0:
        return _fell_back(eigh_refresh(P, Q, method="eigh"))
    n = P.shape[-1]
    stack, bases = P.reshape(-1, n, n), Q.reshape(-1, n, n)
    basis, order, left = _iterated_until_lower(stack, bases)
    status = order.new_full((len(stack),), ACCEPTED, dtype=torch.int32)
    new = Refreshed(basis, _values_of(stack, basis, values), status, order)
    return _shaped(P, *_replaced(new, left, lambda at: _fell_back(_exact_of(stack[at], bases[at], values))))


def _iterated_until_lower(P: Tensor, Q: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """Bases after as many steps of orthogonal iteration as `LIMITS` asks for, where their columns were, and the places
    of matrices without one.
    """
    made = eigh.iterate(P, Q)
    basis, order, before, done = made.basis, made.order, made.before.tolist(), made.done
    left, at = [], list(range(len(P)))
    for last in range(TRIES - 1, -1, -1):
        measured = zip(at, done.tolist(), made.after.tolist(), made.rounding.tolist(), strict=True)
        again: list[int] = []
        for i, is_done, after, rounding in measured:
            fell = after <= PROGRESS * before[i] or after <= SETTLED or after <= 2 * rounding
            if not (is_done and before[i] <= NEAR):
                left.append(i)
            elif not fell:
                (again if last else left).append(i)
        if not again:
            break
        at, index = again, order.new_tensor(again)
        made = eigh.iterate(P[index], basis[index])
        done = made.done
        basis = basis.index_copy(0, index, made.basis)
        order = order.index_copy(0, index, order[index].gather(-1, made.order))
    return basis, order, sorted(left)


def _exact_of(P: Tensor, Q: Tensor, values: bool) -> Refreshed:
    solved = eigh_refresh(P, Q, method="eigh")
    return solved if values else solved._replace(values=torch.full_like(solved.values, math.nan))


def _fell_back(refreshed: Refreshed) -> Refreshed:
    return refreshed._replace(status=refreshed.status | FELL_BACK)


def _replaced(new: Refreshed, places: list[int], other: Callable[[Tensor], Refreshed]) -> Refreshed:
    """The refresh with what another one gives of the matrices in these places."""
    if not places:
        return new
    at = new.order.new_tensor(places)
    return Refreshed(*(whole.index_copy(0, at, some) for whole, some in zip(new, other(at), strict=True)))


def _values_of(P: Tensor, Q: Tensor, wanted: bool) -> Tensor:
    """diag(Q^T P Q), at least 0."""
    if not wanted:
        return P.new_full(P.shape[:-1], math.nan)
    return total(_exact(P, Q) * Q, -2).clamp_min(0)


def _iterated(P: Tensor, Q: Tensor) -> Refreshed:
    """ "qr" of a stack by the compiled step, and in torch ops of matrices that it leaves."""
    made = eigh.iterate(P, Q)
    status = made.order.new_full((len(P),), ACCEPTED, dtype=torch.int32)
    new = Refreshed(made.basis, _values_of(P, made.basis, True), status, made.order)
    left = (~made.done).nonzero()[:, 0].tolist()
    return _replaced(new, left, lambda at: _refresh(P[at], Q[at], "qr", 1, None, False))


def _shaped(P: Tensor, basis: Tensor, values: Tensor, status: Tensor, order: Tensor) -> Refreshed:
    """Stacks in the shape that P came in."""
    one = P.shape[:-1]
    return Refreshed(basis.reshape(P.shape), values.reshape(one), status.reshape(one[:-1]), order.reshape(one))


def symmetrize(P: Tensor) -> Tensor:
    """(P + P^T) / 2."""
    return (P + P.mT) * 0.5


@torch.no_grad()
def orthonormality(Q: Tensor) -> Tensor:
    """||Q^T Q - I||_F / sqrt n of every matrix.   Q: (..., n, n) -> (...)."""
    return _frobenius(_minus_identity(_gram(Q)))


@torch.no_grad()
def shifted_cholesky_qr(Y: Tensor) -> Tensor:
    """The orthonormal factor of Y = Q R with R_ii > 0, without Householder reflections.   Y: (..., m, n), m >= n.

    Five passes G = Y^T Y, R^T R = G + s I, Y <- Y R^-1 on normalised columns, s = 4 n eps in the first three and 0 in
    the last two (shifted Cholesky QR, T. Fukaya et al., arXiv:1809.11085), and a Newton-Schulz step.  Equals
    torch.linalg.qr up to signs for columns of any length as long as the normalised ones are not dependent to working
    precision; of those that are it returns some orthonormal completion, as torch.linalg.qr does, or, where rounding
    defeats it, something that is not finite or not orthonormal.  A zero column stays zero.  No host synchronisation.
    """
    shift = 4 * Y.shape[-1] * torch.finfo(Y.dtype).eps
    length = vector_norm(Y, -2, keepdim=True)
    Y = Y / torch.where(length == 0, 1, length)
    for k in range(PASSES):
        gram = _gram(Y)
        if k < SHIFTED_PASSES:
            gram.diagonal(dim1=-2, dim2=-1).add_(shift)
        R = torch.linalg.cholesky_ex(gram, upper=True).L
        Y = torch.linalg.solve_triangular(R, Y, upper=True, left=False)
    return _fast(Y, _minus_identity(_gram(Y)).mT, -0.5)


def _exact(A: Tensor, B: Tensor) -> Tensor:
    """A product whose rounding decides the result: fp32, or TF32 in three terms."""
    return product(A, B, precision="tf32x3")


def _gram(Y: Tensor) -> Tensor:
    """Y^T Y, the same and symmetric to the bit."""
    return product(Y.mT, Y, precision="tf32x3", symmetric=True)


def _fast(Y: Tensor, X: Tensor, times: float) -> Tensor:
    """Y + times Y X, a basis corrected by a little.  The next exact product sees its rounding: TF32 will do.

    Tensor cores of sm_90 take TF32 in columns of X: of symmetric and skew X callers hand over the transpose.
    """
    return product(Y, X, Y, precision="tf32", alpha=times)


class _Basis(NamedTuple):
    """A basis and what was measured on it, batch by batch."""

    Q: Tensor
    image: Tensor  # P Q
    B: Tensor  # Q^T P Q
    residual: Tensor  # ||Q^T Q - I||_F / sqrt n
    error: Tensor  # the whitening error


class _Problem(NamedTuple):
    P: Tensor  # symmetric, finite, scaled by a power of two to entries of order 1
    prescale: PowerOfTwo  # that power of two
    nothing: Tensor  # whether P is zero, or not finite and counts as zero
    old: _Basis
    status: Tensor


def _problem(P: Tensor, Q: Tensor) -> _Problem:
    largest = largest_entry(P)
    finite, nothing = (flag[:, 0, 0] for flag in (largest.isfinite(), ~largest.isfinite() | (largest == 0)))
    prescale = inverse_power_of_two(torch.where(largest.isfinite(), largest, 0))
    P = prescale.times(torch.where(finite[:, None, None], P, 0))
    skew = (P - P.mT).abs().amax((-2, -1)) > SYMMETRIC * P.abs().amax((-2, -1))
    P = symmetrize(P)
    residual = orthonormality(Q)
    orthonormal = residual <= ORTHONORMAL_ON_ENTRY
    Q = torch.where(orthonormal[:, None, None], Q, torch.eye(P.shape[-1], dtype=P.dtype, device=P.device))
    status = _bits((~finite, NOT_FINITE), (~orthonormal, NOT_ORTHONORMAL), (skew, NOT_SYMMETRIC))
    return _Problem(P, prescale, nothing, _measured(P, Q, torch.where(orthonormal, residual, 0)), status)


def _measured(P: Tensor, Q: Tensor, residual: Tensor) -> _Basis:
    image = _exact(P, Q)
    B = product(Q.mT, image, precision="tf32x3", symmetric=True)
    return _Basis(Q, image, B, residual, _whitening(B))


def _rotate(P: Tensor, basis: _Basis, sweeps: int) -> tuple[_Basis, Tensor]:
    """``sweeps`` simultaneous Jacobi rotations, and whether the last was small enough to be trusted."""
    small = torch.ones_like(basis.error, dtype=torch.bool)
    for _ in range(sweeps):
        X, small = _generator(basis.B)
        Q, residual = _orthonormalized(_fast(basis.Q, X.mT, -1.0))
        basis = _measured(P, Q, residual)
    return basis, small & _orthonormal(basis)


def _generator(B: Tensor) -> tuple[Tensor, Tensor]:
    """The X of the module's docstring, and whether its eta is at most LARGEST_ETA."""
    d = _diagonal(B)
    gap = d[:, None, :] - d[:, :, None]
    shifted = d + 8 * torch.finfo(B.dtype).eps * d.amax(-1, keepdim=True)
    width = shifted[:, :, None] * shifted[:, None, :]
    turn, gap = B * gap, gap * gap
    etas = [SMALLEST_ETA * 2.0**k for k in range(ETAS)]
    rows = [vector_norm(_filtered(turn, gap, width, eta), -1).amax(-1) for eta in etas]
    longest = torch.stack(rows, dim=-1)
    # The last eta is taken where none will do; then X is shortened.
    fits = longest <= LONGEST_ROW
    fits[:, -1] = True
    chosen = fits.int().argmax(-1, keepdim=True)
    # In the dtype of what it is made of: until torch 2.11 the exponent brought the default one.
    eta = torch.ldexp(torch.full_like(longest[:, :1], SMALLEST_ETA), chosen).to(longest.dtype)
    X = _filtered(turn, gap, width, eta[:, :, None])
    length = longest.gather(-1, chosen)
    X = X * (LONGEST_ROW / torch.where(length > LONGEST_ROW, length, LONGEST_ROW))[:, :, None]
    return X, eta[:, 0] <= LARGEST_ETA


def _filtered(turn: Tensor, square: Tensor, width: Tensor, eta: float | Tensor) -> Tensor:
    denominator = square + eta * eta * width
    return turn / torch.where(denominator == 0, 1, denominator)


def _orthonormalized(Y: Tensor) -> tuple[Tensor, Tensor]:
    """Newton-Schulz steps on Y = Q (I + X), and a bound on the residual ||Y^T Y - I||_F / sqrt n of the result.

    The eigenvalues of Y^T Y lie in [1, 1 + m], so Y is first divided by sqrt(1 + m / 2), which brings E = Y^T Y - I
    from [0, m] to +-m / (2 + m).  A step turns E into (E^3 - 3 E^2) / 4 up to rounding, of Frobenius norm at most
    (3 + ||E||_F) ||E||_F^2 / 4.  So the last E is not formed: its bound comes from the one before.
    """
    n = Y.shape[-1]
    E = _minus_identity(_gram(Y))
    shrink = 1 / (1 + 0.5 * _largest_eigenvalue(E))[:, None, None]
    Y, E = Y * shrink.sqrt(), _minus_identity(E * shrink, 1 - shrink)
    for _ in range(STEPS[Y.dtype] - 1):
        Y = _fast(Y, E.mT, -0.5)
        E = _minus_identity(_gram(Y))
    residual = _frobenius(E)
    norm = math.sqrt(n) * residual
    bound = norm * residual * (3 + norm) / 4 + FAST_EPS[Y.dtype] * residual
    return _fast(Y, E.mT, -0.5), bound + 4 * torch.finfo(Y.dtype).eps


def _largest_eigenvalue(E: Tensor) -> Tensor:
    """||E||_2, a little underestimated, by power iteration from the column with the largest diagonal entry."""
    column = E.diagonal(dim1=-2, dim2=-1).argmax(-1)[:, None, None].expand(-1, E.shape[-1], 1)
    v = E.gather(-1, column)
    for _ in range(POWER_STEPS):
        length = vector_norm(v, -2, keepdim=True)
        v = matmul(E, v / torch.where(length == 0, 1, length))
    return vector_norm(v)


def _iterate(P: Tensor, old: _Basis) -> tuple[_Basis, Tensor]:
    """One step of orthogonal iteration on sorted columns; those that P sends to zero stay, as far as they can."""
    order = _descending(old)
    Q = _powered(_columns(old.Q, order), _columns(old.image, order))
    return _measured(P, Q, orthonormality(Q)), order


def _iterate_and_sort(P: Tensor, old: _Basis) -> tuple[_Basis, Tensor]:
    """`_iterate` of the columns as they are, which are sorted by what has become of them."""
    Q = _powered(old.Q, old.image)
    new = _measured(P, Q, orthonormality(Q))
    order = _descending(new)
    sorted_B = _columns(_columns(new.B, order).mT, order)
    return new._replace(Q=_columns(Q, order), image=_columns(new.image, order), B=sorted_B), order


def _powered(Q: Tensor, image: Tensor) -> Tensor:
    """The Q of P Q = Q R; a column that P sends to zero stays."""
    return _orthonormal_factor(torch.where((image == 0).all(-2, keepdim=True), Q, image))


def _solve(P: Tensor, old: _Basis) -> tuple[_Basis, Tensor]:
    """The exact eigenbasis, values descending, signs nearest to the columns that had the same rank."""
    order = _descending(old)
    # fp64 takes LAPACK twice as long and leaves no error of eps max d in the small eigenvalues.
    wide = P.double() if P.device.type == "cpu" else P
    Q = eigh.eigenvectors(wide).flip(-1).to(P.dtype)
    along = total(Q * _columns(old.Q, order), -2, keepdim=True)
    Q = torch.where(along < 0, -Q, Q)
    return _measured(P, Q, orthonormality(Q)), order


#: What takes one step from the old basis, by method: the new one, and where its columns were.
_SOLVERS = {"qr": _iterate, "qr_sorted": _iterate_and_sort, "eigh": _solve}


def _orthonormal_factor(Y: Tensor) -> Tensor:
    """Q of Y = Q R with R_ii >= 0, by LAPACK's reflections on a CPU, where they are four times as fast."""
    if Y.device.type != "cpu":
        return shifted_cholesky_qr(Y)
    Q, R = solvers.qr(Y)
    return torch.where(R.diagonal(dim1=-2, dim2=-1)[:, None, :] < 0, -Q, Q)


def _cascade(P: Tensor, old: _Basis, sweeps: int, read: bool) -> tuple[_Basis, Tensor, Tensor]:
    """The method "auto": the new bases, which are new, and the other bits of their status but those of the input."""
    rotated, small = _rotate(P, old, sweeps)
    new = _better(rotated, old)
    done = first = small & _progress(new, old)
    if not read:
        second, done_again = _iterate_and_rotate(P, old, new, sweeps)
        new, done = _where(done, new, second), done | done_again
    else:
        for stage in (_iterate_and_rotate, _solve_in_place):
            left = (~done).nonzero()[:, 0]
            if len(left) == 0:
                break
            part, ended = stage(P[left], _rows(old, left), _rows(new, left), sweeps)
            new = _Basis(*(whole.index_copy(0, left, some) for whole, some in zip(new, part)))
            done = done.index_copy(0, left, ended)
    bits = _bits((~first, FELL_BACK), (~small, LARGE_ROTATION), (~done, WANTS_EXACT))
    return new, new.error < old.error, bits


def _iterate_and_rotate(P: Tensor, old: _Basis, best: _Basis, sweeps: int) -> tuple[_Basis, Tensor]:
    """Second stage: one orthogonal iteration, its columns back in their slots, then Jacobi."""
    iterated, order = _iterate(P, old)
    rotated, small = _rotate(P, _measured(P, _in_slots(iterated.Q, order), iterated.residual), sweeps)
    new = _better(rotated, best)
    return new, small & (rotated.error < best.error) & _progress(new, old)


def _solve_in_place(P: Tensor, old: _Basis, best: _Basis, sweeps: int) -> tuple[_Basis, Tensor]:
    """Last stage: the exact solver, its columns where the values of the same rank were."""
    solved, order = _solve(P, old)
    sorted_back = _measured(P, _in_slots(solved.Q, order), solved.residual)
    return _better(sorted_back, best), _orthonormal(sorted_back)


def _orthonormal(basis: _Basis) -> Tensor:
    """Whether a basis is orthonormal as far as promised; False for what is not finite."""
    return basis.error.isfinite() & (basis.residual <= ORTHONORMAL[basis.Q.dtype])


def _better(new: _Basis, old: _Basis) -> _Basis:
    return _where(_orthonormal(new) & (new.error < old.error), new, old)


def _progress(new: _Basis, old: _Basis) -> Tensor:
    lowered = (new.error <= TRACKED) & (new.error <= PROGRESS * old.error)
    return lowered | (old.error <= SETTLED) | (old.error <= _rounding(old.B))


def _rounding(B: Tensor) -> Tensor:
    """A whitening error that rounding alone can make: of entries eps max d / 32, three times what was seen."""
    d = _floored(_diagonal(B))
    top = d.amax(-1, keepdim=True)
    return torch.finfo(B.dtype).eps / 32 * total(top / torch.where(d == 0, 1, d), -1) / math.sqrt(d.shape[-1])


def _where(condition: Tensor, new: _Basis, old: _Basis) -> _Basis:
    pairs = zip(new, old, strict=True)
    return _Basis(*(torch.where(condition.view(-1, *[1] * (a.ndim - 1)), a, b) for a, b in pairs))


def _rows(basis: _Basis, index: Tensor) -> _Basis:
    return _Basis(*(x[index] for x in basis))


def _columns(Q: Tensor, order: Tensor) -> Tensor:
    return Q.gather(-1, order[:, None, :].expand_as(Q))


def _in_slots(Q: Tensor, order: Tensor) -> Tensor:
    return torch.empty_like(Q).scatter_(-1, order[:, None, :].expand_as(Q), Q)


def _diagonal(B: Tensor) -> Tensor:
    return B.diagonal(dim1=-2, dim2=-1).clamp_min(0)


def _floored(d: Tensor) -> Tensor:
    """The values d, (..., n), none taken below f = 8 eps max d."""
    return torch.maximum(d, 8 * torch.finfo(d.dtype).eps * d.amax(-1, keepdim=True))


def _descending(basis: _Basis) -> Tensor:
    return _diagonal(basis.B).argsort(dim=-1, descending=True, stable=True)


def _without_diagonal(B: Tensor) -> Tensor:
    eye = torch.eye(B.shape[-1], dtype=torch.bool, device=B.device)
    return torch.where(eye, 0, B)


def _minus_identity(gram: Tensor, times: Tensor | float = 1) -> Tensor:
    return gram - times * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)


def _frobenius(E: Tensor) -> Tensor:
    return vector_norm(E) / math.sqrt(E.shape[-1])


def _whitening(B: Tensor) -> Tensor:
    """The whitening error, ||D^-1/2 B D^-1/2 - I||_F / sqrt n off the diagonal, D = diag B.   (..., n, n) -> (...)."""
    d = _floored(_diagonal(B))
    scale = torch.where(d == 0, 0, d.rsqrt())
    return _frobenius(_without_diagonal(B) * scale[..., :, None] * scale[..., None, :])


def _bits(*flags: tuple[Tensor, int]) -> Tensor:
    return torch.stack([torch.where(flag, bit, 0) for flag, bit in flags]).sum(0, dtype=torch.int32)


def _check_arguments(P: Tensor, Q: Tensor, method: str, sweeps: int) -> None:
    if P.dtype not in ORTHONORMAL:
        raise TypeError(f"eigh_refresh takes float32 or float64, got P of {P.dtype}; convert it first")
    if Q.dtype != P.dtype or Q.device != P.device:
        raise TypeError(f"Q must be of P's dtype and device, {P.dtype} on {P.device}, got {Q.dtype} on {Q.device}")
    if P.ndim < 2 or P.shape[-1] != P.shape[-2]:
        raise ValueError(f"eigh_refresh takes square matrices (..., n, n), got P of shape {tuple(P.shape)}")
    if Q.shape != P.shape:
        raise ValueError(f"Q must have P's shape {tuple(P.shape)}, got {tuple(Q.shape)}")
    if method not in get_args(Method):
        raise ValueError(f"method {method!r} is not known; choose one of {', '.join(get_args(Method))}")
    if sweeps < 1:
        raise ValueError(f"sweeps must be at least 1, got {sweeps}")


def _check_values(status: Tensor) -> None:
    wrong = {
        NOT_FINITE: "P has an entry that is not finite; leave that gradient out of the average",
        NOT_SYMMETRIC: "P is not symmetric; pass symmetrize(P)",
        NOT_ORTHONORMAL: "Q is not orthonormal; begin with the identity or orthonormalise it",
    }
    for bit, message in wrong.items():
        where = (status & bit).nonzero()[:, 0].tolist()
        if where:
            raise ValueError(f"{message} (matrix {', '.join(map(str, where[:5]))} of {len(status)})")
