"""The step of all parameters at once: `Plan.step` is its order, `steepest.recipe.step_one` its reference.

plan               who takes which parameter, and the order of a step
parameter          a parameter of a step and the matrices it is read as
executor           what a plan asks of those who carry its steps out
fused, eager       the executors: by the fused ops, by torch operations
by_address         those whose step is one call of the library, on a CPU; of these
whole              what is elementwise
along_polar        along polar factors
in_bases           Adam in eigenbases of short matrices
program            a recipe as the fused ops take it
corrections        gradients that a recipe corrects before anything takes them
buckets            what shares a direction call and the launches around it
factors            what Kronecker factors learn, and their refresh
coupling           steps whose layers wait for one another
retraction         weights that stay on spheres
state_storage      state tensors of equal shape in one piece of memory
working_state      state in codes, decoded while a step is at it
checks             what a step would stumble over, said before anything is written
modes              what torch is set to while a step computes
warm_up            directions are tried out before the first step
routes, costs      how the direction of a sharded matrix is taken, and what it costs
shared_matrices    matrices whose parts lie on several ranks, at their owners
shared_submatrix   those of which chosen rows or columns travel
shared_batches     which of them travel together
shared_bucket      their bucket in a fused step
"""

from .parameter import Parameter, StepOptions
from .plan import Plan

__all__ = ["Parameter", "Plan", "StepOptions"]
