"""A whole optimizer step on a named model: ours, torch's and the peers', and SOAP with a refresh at every step.

Timed as it is called, launch gaps and all. With --whole, embeddings, norms and biases are there too: by AdamW inside
ours, by torch.optim.AdamW(fused=True) beside torch.optim.Muon. On a CPU a row has state and peak memory as well. See
`optimizers` for what is shared and how errors are taken.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch

from steepest import zoo

from ...shapes import Model, matrices, parse
from ..case import Case, Errors, Job, Row, Settings
from ..ceilings import Ceilings
from ..optimizers import BASE, SOAP, Method, Problem, direction_errors, fitting, muons, parts_error, soaps
from .common import name_of, sizes, timed
from .memory import memory_of

SHAPES = ("gpt2-124m", "per-head", "lora-16", "llama-1b", "moe-64", "kimi-k2", "llama-7b-layers")
CPU = ("tiny", "small", "vit-tiny", "resnet-18", "lora-gpt2", "heads-gpt2", "experts-small")
#: Of SOAP, whose refreshes take others long; not with --quick on a GPU, nor for models with longer sides.
SOAP_SHAPES, SOAP_CPU = ("gpt2-124m",), ("tiny",)
SOAP_SIDE = 4096

Methods = tuple[dict[str, Method], Mapping[str, Errors]]  # and their errors, as far as they have any


def step(settings: Settings) -> Iterator[Job]:
    for name in sizes(settings, SHAPES, SHAPES[:1], CPU):
        yield from _job(name, BASE, _muons, settings)
    for name in () if settings.cuda and settings.quick else sizes(settings, SOAP_SHAPES, (), SOAP_CPU):
        if max(max(m, n) for _, m, n in matrices(parse(name))) <= SOAP_SIDE:
            yield from _job(name, SOAP, _soaps, settings)


def _job(name: str, base: str, of: Callable[[Model, Settings], Methods], settings: Settings) -> Iterator[Job]:
    dtype = torch.float32 if settings.dtypes is None else settings.dtypes[0]
    whole = bool(settings.options.get("whole"))
    title = name + (" whole" if whole else "") + (" SOAP" if base == SOAP else "")

    model, methods = parse(name), dict[str, Method]()

    def build() -> Case:
        made, errors = of(model, settings)
        methods.update(made)
        problem = Problem(model, settings.device, dtype, whole)
        variants = {each: problem.variant(method, errors.get(each, {})) for each, method in methods.items()}
        return Case("step", title, name_of(dtype), variants, base, hide=False)

    def with_memory(measured: Callable[[Ceilings], list[Row]], ceilings: Ceilings) -> list[Row]:
        rows, fresh = measured(ceilings), Problem(model, settings.device, dtype, whole)
        return [
            row | memory_of(fresh, methods[row["variant"]], settings.device) if "ms" in row else row for row in rows
        ]

    for job in timed("step", title, dtype, settings, build):
        yield job if settings.cuda else replace(job, run=functools.partial(with_memory, job.run))


def _muons(model: Model, settings: Settings) -> Methods:
    methods = fitting(muons(settings, model), model, settings)
    shapes = [(m, n) for _, m, n in matrices(model)]
    return methods, direction_errors(methods, shapes, settings.device)


def _soaps(model: Model, settings: Settings) -> Methods:
    error = parts_error(zoo.SOAP, settings.device, precondition_frequency=1)
    return fitting(soaps(settings), model, settings), {SOAP: error}
