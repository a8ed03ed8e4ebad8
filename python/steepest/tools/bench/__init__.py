"""Benchmarks: whether "faster" is true on the machine at hand, as a table, as data and as pictures.

steepest bench --quick
steepest bench polar step --shapes gpt2-124m --out results
steepest bench polar --compare results/polar.json

suites, optimizers, training            what is measured, a file a suite
case, truth, peers                      correct first; who else is measured, and what it is called with
timing, ceilings, counting              how: interleaved, cold, beside what the machine can do
records, regression                     JSON and CSV; what got worse since
table, pictures, command                what is shown, and the whole of it

What a figure names is in `steepest.tools.machine`, named models are in `steepest.tools.shapes`.
"""

from .command import add_options, run

__all__ = ["add_options", "run"]
