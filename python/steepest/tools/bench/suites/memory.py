"""What an optimizer holds: its state, and what a step needs beyond parameters, gradients and state at its peak."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from ...shapes import elements, matrices, parse
from ..case import OK, Job, Row, Settings, failure
from ..ceilings import Ceilings
from ..counting import peak_bytes, storages
from ..optimizers import BASE, Method, Problem, muons, soaps
from ..peers import LR
from .common import sizes

SHAPES = ("gpt2-124m", "llama-1b", "moe-64")
CPU = ("tiny", "small")
SOAP_SIDE = {True: 4096, False: 1024}  # of a model whose bases are refreshed in every step, on a GPU and on a CPU
WARM_UP = 4  # steps: a graph is captured at the third


ADAMW = "torch.optim.AdamW"


def _adamw(matrices: Sequence[nn.Parameter], others: Sequence[nn.Parameter]) -> list[Optimizer]:
    return [torch.optim.AdamW([*matrices, *others], lr=LR, fused=True)]


def memory(settings: Settings) -> Iterator[Job]:
    for name in sizes(settings, SHAPES, SHAPES[:1], CPU):
        yield Job("memory", f"{name} whole", "float32", functools.partial(_rows, name, settings))


def _rows(name: str, settings: Settings, ceilings: Ceilings) -> list[Row]:
    """Rows of one optimizer after the other, so that each has the memory to itself."""
    model = parse(name)
    longest = max(max(m, n) for _, m, n in matrices(model))
    methods = {ADAMW: Method(_adamw, None, ours=False, version=torch.__version__)} | muons(settings, model)
    methods |= soaps(settings) if longest <= SOAP_SIDE[settings.cuda] else {}
    rows: list[Row] = []
    for variant, method in methods.items():
        row: Row = {"suite": "memory", "case": f"{name} whole", "dtype": "float32", "variant": variant}
        row |= {"ours": method.ours, "version": method.version}
        try:
            problem = Problem(model, settings.device, whole=True)
            rows.append(row | {"status": OK} | memory_of(problem, method, settings.device))
        except Exception as error:
            rows.append(row | {"status": failure(error)})
    base = next((row for row in rows if row["variant"] == BASE and row["status"] == OK), None)
    for row in rows:
        if row["status"] == OK:
            row["state_bytes_per_parameter"] = round(row["state_mib"] * 2**20 / elements(model), 3)
            if base is not None and row.get("extra_mib"):
                row |= {"base": BASE, "ratio": round(base["extra_mib"] / row["extra_mib"], 3)}
    return rows


def memory_of(problem: Problem, method: Method, device: str) -> Row:
    """State of a method's optimizers, and the peak of a step beyond parameters, gradients and state, in MiB.

    A step that torch.compile has made allows no counting on a CPU: its peak is not there.
    """
    optimizers = problem.build(method)

    def step() -> None:
        for optimizer in optimizers:
            optimizer.step()

    for _ in range(WARM_UP):
        problem.give(problem.grads)
        step()
    problem.give(problem.grads)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    # State of several parameters may lie in one memory.
    sizes = {s._cdata: s.nbytes() for each in optimizers for s in storages(_state(each))}
    row: Row = {"state_mib": round(sum(sizes.values()) / 2**20, 3)}
    try:
        extra = peak_bytes(step, device)
    except RuntimeError as error:
        if "torch.compile" not in str(error):
            raise
        return row
    return {"extra_mib": round(extra / 2**20, 3)} | row


def _state(optimizer: Any) -> list[Any]:
    state = getattr(optimizer, "state", {})
    return [leaf for entry in list(state.values()) for leaf in tree_leaves(entry)]
