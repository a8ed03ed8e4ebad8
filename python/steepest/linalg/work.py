"""What a piece of linear algebra takes: floating-point operations, 2 for a multiply and add.

Of a symmetric product those at and below the diagonal count, which is what kernels compute of it. Solvers by their
leading terms (Golub and Van Loan, Matrix Computations, 4th edition, sections 8.3 and 8.6).
"""

from __future__ import annotations

from dataclasses import dataclass

from .chain import product_flop

# An H200 does 989 TFLOP/s of 16-bit products; three TF32 terms, as which an fp32 product is taken, a sixth of that. A
# solver's operations are no large products: a hundredth is an order of magnitude.
WIDE_COST = 6
SOLVER_COST = 100


@dataclass(frozen=True)
class Work:
    """Floating-point operations by where they run.

    narrow: products of the direction in its compute dtype, 16 bits on a GPU. wide: fp32 products of factors, bases and
    roots. solver: of a decomposition.
    """

    narrow: int = 0
    wide: int = 0
    solver: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.narrow + other.narrow, self.wide + other.wide, self.solver + other.solver)

    def times(self, number: int) -> Work:
        return Work(self.narrow * number, self.wide * number, self.solver * number)

    def shared_out(self, number: int) -> Work:
        """One part of the work, of `number` equal ones."""
        return Work(self.narrow // number, self.wide // number, self.solver // number)

    @property
    def flop(self) -> int:
        return self.narrow + self.wide + self.solver

    @property
    def cost(self) -> int:
        """The operations as so many of a 16-bit product, by what they take on a GPU."""
        return self.narrow + WIDE_COST * self.wide + SOLVER_COST * self.solver


def square_flop(n: int) -> int:
    """A symmetric product of n x n matrices."""
    return product_flop(n, n, n, symmetric=True)


def eigh_flop(n: int) -> int:
    """Eigenvalues and eigenvectors of a symmetric n x n matrix."""
    return 9 * n**3


def qr_flop(n: int) -> int:
    """Q of an n x n matrix, written out."""
    return 8 * n**3 // 3


def svd_flop(m: int, n: int) -> int:
    """Singular values and vectors of an m x n matrix, as many as its short side."""
    short, long = min(m, n), max(m, n)
    return 6 * long * short**2 + 20 * short**3


def flop_text(flop: float) -> str:
    """A number of operations in the unit that suits it, as in "1.23 TFLOP"."""
    for size, unit in ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP")):
        if flop >= size:
            return f"{flop / size:.3g} {unit}"
    return f"{flop / 1e6:.3g} MFLOP"
