"""The command line: what this machine can run, what a polar call does on a GPU, which tiles are fastest on this one,
checkpoints of other optimizers, all optimizers side by side, and how fast all of it is.

steepest doctor [--json]                          exit status 1 where kernels fail their self-check
steepest plan --shape 24x1024x4096 [--shape ...] [--preset auto] [--dtype float16] [--json]
steepest plan --world 64 [--mesh 8x8] [--model llama-7b] [--optimizer Muon] [--tflops 500] [--bandwidth 50] [--json]
steepest plan --simulate                          a table of models on 1 to 4096 ranks
steepest tune [--shape 24x1024x4096 ...] [--model gpt2-124m] [--of polar] [--dtype bfloat16] [--json | --show | --clear]
steepest convert --source torch muon.pt adamw.pt --out steepest.pt [--key optimizer] [--names names.txt]
steepest compare [--quick] [--optimizers Muon,MuAdam] [--tasks gpt] [--out FOLDER] [--resume]
steepest bench [SUITE ...] [--quick] [--shapes gpt2-124m] [--out FOLDER] [--compare OLD.json]
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from steepest._version import __version__

#: The module of each command, which has `add_options` and `run`, and what the command does.
COMMANDS = {
    "doctor": ("doctor", "what this machine can run, what to do about the rest, and whether it is right"),
    "plan": ("planner", "products and launches of a polar call on Hopper, or a step on many ranks; needs no GPU"),
    "tune": ("tune", "time Triton's products of some shapes on this GPU and keep the fastest tiles"),
    "convert": ("convert.command", "checkpoints of other optimizers as those of Muon and SOAP"),
    "compare": ("compare", "all optimizers on a small GPT and a classifier, over learning rates"),
    "bench": ("bench", "how fast: suites beside torch and peers, as a table, data and pictures"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status. The modules of the others are not imported."""
    words = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="steepest", description="Steepest descent under preconditioned norms, fast.")
    parser.add_argument("--version", action="version", version=f"steepest {__version__}")
    commands = parser.add_subparsers(required=True)
    for name, (module, text) in COMMANDS.items():
        subparser = commands.add_parser(name, help=text)
        if name in words:
            command = importlib.import_module(f".{module}", __package__)
            command.add_options(subparser)
            subparser.set_defaults(run=command.run, parser=subparser)
    arguments = parser.parse_args(words)
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except ValueError as error:
        arguments.parser.error(str(error))
    except BrokenPipeError:  # `steepest plan ... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status
