"""The step of all parameters at once: `Plan.step` is its order, `steepest.recipe.step_one` its reference.

parameter       a parameter of a step and the matrices it is read as
factors         what Kronecker factors learn, and their refresh
program         a recipe as the fused ops take it
buckets         what shares a direction call and the launches around it
fused, eager    the executors: by the fused ops, by torch operations
coupling        steps whose layers wait for one another
seams           where a distributed step or a hook comes in
state_storage   state tensors of equal shape in one piece of memory
working_state   state in codes, decoded while a step is at it
warm_up         directions are tried out before the first step
plan            who takes which parameter, and the order of a step
"""

from .parameter import Parameter, StepOptions
from .plan import Plan

__all__ = ["Parameter", "Plan", "StepOptions"]
