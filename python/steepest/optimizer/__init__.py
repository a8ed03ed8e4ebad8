"""The `torch.optim` shell around a step.

method          what a method says to the shell, all of its names
groups          who is a matrix, what a group may say
option_types    what every option must be, in one table
group_options   what a step reads from the values of a group
base            the constructor, the step, and what a method may ask for: `MatrixOptimizer`
plans           state, the records of parameters, and the plan of a step
agreed_plans    plans of which ranks agree that they are the same
traced_plans    plans that torch.compile traces
plan_key        when the plan serves once more
repeated        the step by addresses, on a CPU, where nothing is another one
step_hooks      torch's hooks around a step
shards          parameters that ranks share: where they lie, who owns their matrices
missing_gradients   what ranks agree on where the host reads nothing
owned_state     state that only the owners of matrices have, in checkpoints
stale           parameters that are no longer the model's
zero            what torch's ZeroRedundancyOptimizer may give
averages        eval and train: averages of the iterates in the place of the weights
constraints     the radii of spheres that weights stay on
weights         what a hook after the step is given
wrappers        what frameworks put around an optimizer
reports         metrics, describe, skipped updates
checkpoints     state_dict and load_state_dict; of these
checkpoint_matching   which parameter of a checkpoint is which
checkpoint_state      what a parameter's state must be
"""

from .base import MatrixOptimizer
from .groups import Params
from .wrappers import unwrap

__all__ = ["MatrixOptimizer", "Params", "unwrap"]
