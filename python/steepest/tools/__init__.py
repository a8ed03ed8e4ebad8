"""The workshop beside the library: what the command `steepest` runs. No training job imports it.

cli                     the command line; each command is imported when it is called
doctor, facts           what this machine can run, and whether its kernels are right
planner, scale          what a polar call does on a Hopper GPU; what a step of a model does on every rank
convert                 checkpoints of other optimizers
tune                    which tiles of Triton's products are fastest on this GPU
machine, shapes         what a figure must name; named models
files                   files that are written as a whole
bench, compare          how fast all of it is, and all optimizers side by side

Everything here imports the library as its users do; nothing of the library imports this.
"""
