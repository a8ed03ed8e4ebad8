"""The command line: what this machine can run, what a polar call does on a GPU, which tiles are fastest on this one,
all optimizers side by side, and how fast all of it is.

steepest doctor [--json]                          exit status 1 where kernels fail their self-check
steepest plan --shape 24x1024x4096 [--shape ...] [--preset auto] [--dtype float16] [--json]
steepest tune [--shape 24x1024x4096 ...] [--model gpt2-124m] [--of polar] [--dtype bfloat16] [--json | --show | --clear]
steepest compare [--quick] [--optimizers Muon,MuAdam] [--tasks gpt] [--out FOLDER] [--resume]
steepest bench [SUITE ...] [--quick] [--shapes gpt2-124m] [--out FOLDER] [--compare OLD.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import bench, compare, doctor, planner, tune
from ._version import __version__
from .ops import backend


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    parser = argparse.ArgumentParser(prog="steepest", description="Steepest descent under preconditioned norms, fast.")
    parser.add_argument("--version", action="version", version=f"steepest {__version__}")
    commands = parser.add_subparsers(required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        own = commands.add_parser(name, help=text)
        own.set_defaults(run=run, parser=own)
        return own

    told = command("doctor", _doctor, "what this machine can run, what to do about the rest, and whether it is right")
    told.add_argument("--json", action="store_true", help="the same as JSON")
    plan = command("plan", _plan, "forms, products and launches of a polar call on Hopper; needs no GPU")
    plan.add_argument(
        "--shape", action="append", required=True, metavar="[COUNTx]ROWSxCOLUMNS", help="a stack; all go in one call"
    )
    plan.add_argument("--preset", default="auto", help="of polar (default: auto)")
    plan.add_argument("--dtype", help="compute dtype, float16 or bfloat16 (default: what polar chooses)")
    plan.add_argument("--multiprocessors", type=int, default=planner.MULTIPROCESSORS)
    plan.add_argument("--l2", type=float, default=planner.L2_MB, metavar="MB", help="size of the L2 cache")
    plan.add_argument("--json", action="store_true", help="the same as JSON")
    tune.add_options(
        command("tune", tune.run, "time Triton's products of some shapes on this GPU and keep the fastest tiles")
    )
    compare.add_options(
        command("compare", compare.run, "all optimizers on a small GPT and a classifier, over learning rates")
    )
    bench.add_options(
        command("bench", bench.run, "how fast: suites beside torch and peers, as a table, data and pictures")
    )
    arguments = parser.parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except ValueError as error:
        arguments.parser.error(str(error))
    except BrokenPipeError:  # `steepest plan ... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _doctor(arguments: argparse.Namespace) -> int:
    facts, outcomes = diagnose(), doctor.check_all()
    if arguments.json:
        print(json.dumps({**facts, "checks": [outcome.json() for outcome in outcomes]}, indent=2))
    else:
        print("\n".join([describe(facts), *doctor.describe(outcomes)]))
    return int(any(outcome.state == "wrong" for outcome in outcomes))


def _plan(arguments: argparse.Namespace) -> int:
    found = planner.plan(
        [planner.parse(text) for text in arguments.shape],
        arguments.preset,
        dtype=arguments.dtype,
        multiprocessors=arguments.multiprocessors,
        l2_mb=arguments.l2,
    )
    print(json.dumps(found.json(), indent=2) if arguments.json else planner.describe(found))
    return 0


def diagnose() -> dict[str, Any]:
    """What `doctor` prints before its checks, as plain data: versions, devices, the compiled part and every backend."""
    return {
        "steepest": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "driver_cuda": backend.driver_cuda(),
        "devices": [_device(index) for index in range(torch.cuda.device_count())],
        "triton": _triton_version(),
        "compiled": backend.extension.build_info() if backend.extension is not None else None,
        "compiled_reason": backend.extension_reason,
        "forced": None if backend.forced == "auto" else backend.forced,
        "backends": {name: {"available": ok, "reason": reason} for name, (ok, reason) in backend.backends().items()},
    }


def describe(facts: dict[str, Any]) -> str:
    """`diagnose()` as text for a person."""
    driver = f"CUDA {facts['driver_cuda']}" if facts["driver_cuda"] else "not asked (torch sees no CUDA device)"
    lines = [
        f"steepest  {facts['steepest']}",
        f"python    {facts['python']}",
        f"torch     {facts['torch']} (CUDA {facts['torch_cuda'] or 'none'}; driver: {driver})",
        f"triton    {facts['triton'] or 'not installed'}",
        f"devices   {', '.join(facts['devices']) or 'no CUDA device'}",
        *(f"compiled  {line}" for line in _describe_build(facts)),
        "backends  (in order of preference)",
    ]
    for name, state in facts["backends"].items():
        lines.append(f"  {name:<7} {'yes' if state['available'] else 'no '}  {state['reason']}")
    if facts["forced"]:
        known = facts["forced"] in facts["backends"]
        then = (
            "every op that has kernels uses it, or fails" if known else "no backend has this name, and every op fails"
        )
        lines.append(f"STEEPEST_BACKEND={facts['forced']} is set: {then}")
    return "\n".join(lines)


def _describe_build(facts: dict[str, Any]) -> list[str]:
    info = facts["compiled"]
    if info is None:
        return [f"no: {facts['compiled_reason']}"]
    cuda = f"CUDA {info['cuda']} for {', '.join(info['architectures'])}" if info["cuda"] else "without CUDA"
    commit = f", commit {info['commit']}" if info["commit"] else ""
    hopper = f"{'with' if info['hopper'] else 'without'} products for Hopper"
    lines = [f"{info['version']} {cuda}, {hopper}; torch {info['torch']} headers, {info['compiler']}{commit}"]
    if not info["hopper"] and any("_90" in name for name in info["architectures"]):
        lines.append(f"WARNING: {backend.NO_HOPPER}")
    return lines


def _device(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"{torch.cuda.get_device_name(index)} ({major}.{minor})"


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)
