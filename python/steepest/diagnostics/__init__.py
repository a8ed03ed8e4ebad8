"""What a step of any torch optimizer does: how it lies to the gradient, which metric explains it, what it notices.

alignment      angle to the gradient, dual norms, how steep a step is in a norm
metric         the best-conditioned metric in which the step is natural gradient descent
recorder       both, for every layer of a real step
watcher        `watch`: the same while training, as plain numbers for any logger
invariance     whether training notices that the weights are written in other variables
splitting      whether a neuron would be better as two
pictures       curves of what was watched
"""

from .alignment import NORMS, cosine, dual_norms, measure, norms_of, steepness
from .invariance import Gap, check_affine_invariance, check_scale_invariance
from .metric import Metric, best_metric, metric_condition
from .pictures import draw
from .recorder import record
from .splitting import Splitting, splitting, splitting_matrices
from .watcher import Watch, watch

__all__ = [
    "NORMS",
    "Gap",
    "Metric",
    "Splitting",
    "Watch",
    "best_metric",
    "check_affine_invariance",
    "check_scale_invariance",
    "cosine",
    "draw",
    "dual_norms",
    "measure",
    "metric_condition",
    "norms_of",
    "record",
    "splitting",
    "splitting_matrices",
    "steepness",
    "watch",
]
