"""The change of variables of a preconditioned norm ||X|| = N(P X):  into(x) = P^-T x,  back(d) = P^-1 d."""

from .base import Precondition, State
from .diagonal import Diagonal
from .kronecker import FACTORS, LEARNED, PENDING, Gathered, Kronecker, Phase, refresh_bytes
from .none import Identity
from .roots import Roots
from .rotated import BASES, STATUS, Rotated
from .sides import Sides

__all__ = [
    "BASES",
    "FACTORS",
    "LEARNED",
    "PENDING",
    "STATUS",
    "Diagonal",
    "Gathered",
    "Identity",
    "Kronecker",
    "Phase",
    "Precondition",
    "Roots",
    "Rotated",
    "Sides",
    "State",
    "refresh_bytes",
]
