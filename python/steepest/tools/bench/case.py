"""A case: ways of doing the same work, each correct before it is timed, all in one interleaved run.

    case = Case("polar", "24x1024x4096", "float16", {"torch": Variant(...), "ours": Variant(..., ours=True)})
    rows = measure(case, settings, ceilings)

A row is a flat dict; what does not apply to it is not there.

    suite, case, dtype, variant, ours, version     what was run
    status          "ok"; "WRONG", beyond its bounds; "failed: ..."; "skipped: ..."; "absent: ..."
    ms, spread_ms, fastest_ms, rounds              of a call, see `timing`; host_ms: until it has returned
    base, ratio     the variant that ratios refer to, and its time over this one's
    gflop, mbyte    of the work, at least; with them tflop_per_s, gb_per_s and the shares of_products and of_copy of the
                    ceilings measured in the same run
    and the errors, by name
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .ceilings import Ceilings
from .timing import Call, Captured, Timing, interleaved, seconds

Row = dict[str, Any]
Errors = Mapping[str, float]

OK, WRONG = "ok", "WRONG"
LEAST_ROUNDS = 3


@dataclass(frozen=True)
class Settings:
    """What a person may ask for; the suites choose what is None."""

    device: str = "cpu"
    quick: bool = False
    shapes: Sequence[str] | None = None
    dtypes: Sequence[torch.dtype] | None = None
    presets: Sequence[str] = ("auto", "exact", "turbo", "jordan")
    rounds: int = 15  # at most, and at least LEAST_ROUNDS
    seconds: float = 3.0  # of the rounds of one case, all variants together
    guard: float = 1.0  # seconds that one call may take
    compiled: bool | None = None  # torch.compile among the baselines
    peers: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)  # of one suite

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")


@dataclass(frozen=True)
class Job:
    """A part of a suite that fails or succeeds by itself; ``run`` gives its rows, with shares of the ceilings."""

    suite: str
    case: str
    dtype: str
    run: Callable[[Ceilings], list[Row]]

    @property
    def label(self) -> str:
        return " ".join(filter(None, (self.suite, self.case, self.dtype)))


@dataclass(frozen=True)
class Variant:
    """``run`` does the work, again and again, and ``errors`` says how far what it gave is from the truth.

    bounds: the most each error may be, without which it is not timed. before: see `timing.Call`. flop, bytes: of the
    work, at least; rate: the dtype of its products, None for the case's. one: the same for one part in ``parts``, where
    the whole may take too long. captured: measured as a CUDA graph as well, where there is a GPU. skip: why it is not
    run.
    """

    run: Callable[[], Any]
    ours: bool = False
    version: str = ""
    errors: Callable[[Any], Errors] | None = None
    bounds: Errors = field(default_factory=dict)
    before: Callable[[], Any] | None = None
    flop: float | None = None
    bytes: float | None = None
    rate: str | None = None
    one: Callable[[], Any] | None = None
    parts: int = 1
    timed: bool = True
    captured: bool = False
    skip: str = ""

    @property
    def call(self) -> Call:
        return Call(self.run, self.before)


@dataclass(frozen=True)
class Case:
    """base: the variant that ratios refer to. hide: whether launch gaps are left out; else a call is timed as made."""

    suite: str
    name: str
    dtype: str
    variants: Mapping[str, Variant]
    base: str
    hide: bool = True


def measure(case: Case, settings: Settings, ceilings: Ceilings) -> list[Row]:
    """A row for every variant; times of those that are right. ceilings: what shares refer to."""
    if settings.cuda:
        graphs = {
            f"{name}, captured": replace(v, run=Captured(v.run), one=None)
            for name, v in case.variants.items()
            if v.captured
        }
        case = replace(case, variants={**case.variants, **graphs})
    answers = {name: _gate(variant, settings) for name, variant in case.variants.items()}
    timings, rounds = _time(case, answers, settings)
    rows = []
    for name, variant in case.variants.items():
        status, errors = answers[name]
        row: Row = {"suite": case.suite, "case": case.name, "dtype": case.dtype, "variant": name}
        row |= {"ours": variant.ours, "version": variant.version, "status": status}
        if name in timings:
            base = timings.get(case.base)
            row |= _times(timings[name], rounds)
            row |= {} if base is None else {"base": case.base, "ratio": round(base.median / timings[name].median, 3)}
            row |= rates(variant, timings[name].median, variant.rate or case.dtype, ceilings)
        rows.append(row | {key: float(f"{value:.3g}") for key, value in errors.items() if math.isfinite(value)})
    return rows


def failure(error: Exception) -> str:
    """The status of a variant that failed; it leaves the others their rows."""
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def bad(rows: Iterable[Row]) -> list[str]:
    """What of ours is wrong or failed, a line each."""
    return [
        f"{row['suite']} {row.get('case', '')} {row.get('dtype', '')} {row.get('variant', '')}: {row['status']}"
        for row in rows
        if row.get("ours") and row["status"].startswith(("WRONG", "failed"))
    ]


def rates(variant: Variant, median: float, dtype: str, ceilings: Ceilings) -> Row:
    """FLOP and bytes a second, and their shares of what this machine can do."""
    row: Row = {}
    if variant.flop:
        row |= {"gflop": _short(variant.flop / 1e9), "tflop_per_s": _short(variant.flop / median / 1e12)}
        if best := ceilings.products.get(dtype):
            row["of_products"] = _short(variant.flop / median / best)
    if variant.bytes:
        row |= {"mbyte": _short(variant.bytes / 1e6), "gb_per_s": _short(variant.bytes / median / 1e9)}
        if ceilings.copy:
            row["of_copy"] = _short(variant.bytes / median / ceilings.copy)
    return row


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _gate(variant: Variant, settings: Settings) -> tuple[str, Errors]:
    if variant.skip:
        return f"skipped: {variant.skip}", {}
    try:
        if variant.one is not None:
            variant.one()
            whole = variant.parts * seconds(Call(variant.one), settings.device)
            if whole > settings.guard:
                return f"skipped: about {whole:.1f} s, more than --guard {settings.guard:g}", {}
        variant.call.prepare()
        result = variant.run()
        errors = variant.errors(result) if variant.errors is not None else {}
    except Exception as error:
        return failure(error), {}
    wrong = any(not errors[name] <= most for name, most in variant.bounds.items())
    return (WRONG if wrong else OK), errors


def _time(case: Case, answers: dict[str, tuple[str, Errors]], settings: Settings) -> tuple[dict[str, Timing], int]:
    """Timings and rounds; where memory runs out, without the peers, whose rows say so in ``answers``."""
    calls = {name: v.call for name, v in case.variants.items() if v.timed and answers[name][0] == OK}
    try:
        return _interleave(calls, answers, case.hide, settings)
    except torch.OutOfMemoryError:
        # A peer may keep what it allocated, a CUDA graph's memory for one.
        theirs = [name for name in calls if not case.variants[name].ours and name != case.base]
        for name in theirs:
            del calls[name]
            answers[name] = ("failed: no memory beside the others", answers[name][1])
        torch.compiler.reset()
        torch.cuda.empty_cache()
    return _interleave(calls, answers, case.hide, settings)


def _interleave(
    calls: dict[str, Call], answers: dict[str, tuple[str, Errors]], hide: bool, settings: Settings
) -> tuple[dict[str, Timing], int]:
    once = 0.0
    for name in list(calls):
        try:
            once += min(seconds(calls[name], settings.device) for _ in range(2))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of what went well the first time
            answers[name] = (failure(error), answers[name][1])
            del calls[name]
    if not calls:
        return {}, 0
    rounds = max(LEAST_ROUNDS, min(settings.rounds, int(settings.seconds / max(once, 1e-9))))
    return interleaved(calls, rounds=rounds, warmup=1, device=settings.device, hide=hide), rounds


def _times(timing: Timing, rounds: int) -> Row:
    row: Row = {key: round(value * 1e3, 5) for key, value in (("ms", timing.median), ("spread_ms", timing.spread))}
    row["fastest_ms"] = round(timing.fastest * 1e3, 5)
    if timing.host is not None:
        row["host_ms"] = round(timing.host * 1e3, 5)
    return row | {"rounds": rounds}
