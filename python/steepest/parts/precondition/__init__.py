"""The change of variables of a preconditioned norm ||X|| = N(P X):  into(x) = P^-T x,  back(d) = P^-1 d."""

from .base import Precondition, State
from .diagonal import Diagonal
from .none import Identity
from .rotated import Phase, Rotated
from .sides import Sides

__all__ = ["Diagonal", "Identity", "Phase", "Precondition", "Rotated", "Sides", "State"]
