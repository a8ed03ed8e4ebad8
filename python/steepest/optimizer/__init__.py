"""The `torch.optim` shell around a step.

groups          who is a matrix, what a group may say
group_options   the values of a group, and what a step reads from them
base            recipes, numbers, state and the plan: `MatrixOptimizer`
weights         what a hook after the step is given
reports         metrics, describe, skipped updates
checkpoints     state_dict and load_state_dict
"""

from .base import MatrixOptimizer
from .groups import Params

__all__ = ["MatrixOptimizer", "Params"]
