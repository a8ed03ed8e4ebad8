"""Launches of a step, and how long the host needs for it.

On a GPU the host's time ends when the call returns, with the device idle at first, and launches are the profiler's; on
a CPU it is the time of the step, and what is counted are torch's operators.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator

from ...shapes import Model, parse
from ..case import OK, Job, Row, Settings, failure
from ..ceilings import Ceilings
from ..counting import launches
from ..optimizers import BASE, Method, Problem, muons
from ..timing import Call, host_seconds, seconds
from .common import sizes

SHAPES = ("gpt2-124m", "per-head", "lora-16")
CPU = ("tiny", "small")
WARM_UP = 4  # steps: a graph is captured at the third
CALLS = 11


def launch(settings: Settings) -> Iterator[Job]:
    for name in sizes(settings, SHAPES, SHAPES[:1], CPU):
        yield Job("launch", f"{name} whole", "float32", functools.partial(_rows, name, settings))


def _rows(name: str, settings: Settings, ceilings: Ceilings) -> list[Row]:
    model = parse(name)
    rows: list[Row] = []
    for variant, method in muons(settings, model).items():
        row: Row = {"suite": "launch", "case": f"{name} whole", "dtype": "float32", "variant": variant}
        row |= {"ours": method.ours, "version": method.version}
        try:
            rows.append(row | {"status": OK} | _measure(model, method, settings))
        except Exception as error:
            rows.append(row | {"status": failure(error)})
    base = next((row for row in rows if row["variant"] == BASE and row["status"] == OK), None)
    for row in rows:
        if row["status"] == OK and base is not None:
            row |= {"base": BASE, "ratio": round(base["host_us"] / row["host_us"], 3)}
    return rows


def _measure(model: Model, method: Method, settings: Settings) -> Row:
    problem = Problem(model, settings.device, whole=True)
    optimizers = problem.build(method)

    def step() -> None:
        for optimizer in optimizers:
            optimizer.step()

    call = Call(step, before=lambda: problem.give(problem.grads))
    for _ in range(WARM_UP):
        call.prepare()
        call.run()
    host: Callable[[], float] = (
        functools.partial(host_seconds, call, 1) if settings.cuda else functools.partial(seconds, call, settings.device)
    )
    samples = [1e6 * host() for _ in range(CALLS)]
    quartiles = statistics.quantiles(samples, n=4)
    call.prepare()
    return {
        "host_us": round(statistics.median(samples), 2),
        "spread_us": round((quartiles[2] - quartiles[0]) / 2, 2),
        **launches(step, settings.device),
    }
