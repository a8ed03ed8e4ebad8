"""The parts of a step: pure functions of tensors, each the same for one matrix and for a batch of them.

    variance_reduction   a gradient that the one before corrects
    momentum      what is remembered of the gradients
    submatrix     the rows or columns of it that a step is taken in
    precondition  the change of variables P:  into(x) = P^-T x,  back(d) = P^-1 d
    direction     the maximiser of <x, d> over the unit ball of a base norm, and the dual norm <x, d>
    step_size     what the learning rate means for a matrix of a given shape
    decay         decoupled weight decay
    graft, clip, normalize, norm_ratio
                  an update as long as another method's, no larger than a bound, with rows or entries of one running
                  size, or as long as the gradients agree: transforms of an update
    cautious      an update without the entries that the gradient is against: a transform too
    rounding      how the new weight is stored
    blockwise     averages in codes of 8 bits between steps
    sphere        a norm that a weight keeps
    average       of the iterates, to be evaluated
    product_norm  what couples the steps of layers
    hyper         the numbers of one step
    update_transform
                  what transforms of an update have in common

A part is a frozen dataclass: it holds the choices that fix the program (which formula), never the numbers that change
from step to step (those are a `Hyper`) and never state (that is a dictionary of tensors owned by the caller).
"""

from .average import Average, Ema, ScheduleFree
from .blockwise import Blockwise
from .cautious import Cautious
from .clip import ClipRMS
from .decay import Decay
from .direction import Columns, Direction, Frobenius, Nuclear, OneHot, Rows, Schatten, Sign, Spectral, SpectralOfSign
from .graft import Graft
from .hyper import Hyper, Number
from .momentum import Momentum
from .norm_ratio import NormRatio
from .normalize import Normalize
from .precondition import Diagonal, Identity, Kronecker, Precondition, Roots, Rotated, Sides
from .rounding import Rounding
from .sphere import Sphere
from .step_size import ADJUST_LR, shape_ratio
from .submatrix import Submatrix
from .update_transform import UpdateTransform
from .variance_reduction import VarianceReduction

__all__ = [
    "ADJUST_LR",
    "Average",
    "Blockwise",
    "Cautious",
    "ClipRMS",
    "Columns",
    "Decay",
    "Diagonal",
    "Direction",
    "Ema",
    "Frobenius",
    "Graft",
    "Hyper",
    "Identity",
    "Kronecker",
    "Momentum",
    "NormRatio",
    "Normalize",
    "Nuclear",
    "Number",
    "OneHot",
    "Precondition",
    "Roots",
    "Rotated",
    "Rounding",
    "Rows",
    "Schatten",
    "ScheduleFree",
    "Sides",
    "Sign",
    "Spectral",
    "SpectralOfSign",
    "Sphere",
    "Submatrix",
    "UpdateTransform",
    "VarianceReduction",
    "shape_ratio",
]
