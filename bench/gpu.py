"""Builds for a GPU, tests what needs one, and measures. No network, no virtual environment, the standard library alone.

    bench/gpu.sh RESULTS [STEP ...] [--site DIR] [--for 9.0a] [--pack DIR] [--limit SECONDS] [--quick] [--dry-run]

Steps, one after the other whatever the others said (default: all of them):

    build       the package, into --site; with --for 9.0a on a machine without a GPU, with the Python and torch of the
                one that has it
    doctor      nvidia-smi, steepest doctor, steepest plan
    sanitizer   compute-sanitizer, where there is one, on the doctor and on tiny shapes
    tests       a process for each file with tests that need a GPU, several at a time; test_gpu.py begins
    bench       a process for each suite, without torch.compile, and a training run
    compiled    the baselines under torch.compile, at few shapes

Whatever runs has its own time, after which it is interrupted (SIGINT), and killed ten seconds later. Tests that a
crash, a hang or a GPU in error kept from running are run in a new process. Exit status 1 if something failed.

In RESULTS: SUITE.json, .csv and pictures, machine.json, summary.txt, and in RESULTS/logs what each process said, with
the tests' XML. --pack DIR: all of it again in DIR as summary.txt and results.tar.gz, in parts of 15 MB if it is larger,
after every step and at the end.

PYTHON (this one) has torch, setuptools>=77, cmake, ninja, pybind11 and pytest; nvcc is in CUDA_HOME/bin or on PATH; the
products for Hopper are built where nvidia-cutlass can be imported, peers are measured where they can, and pictures
drawn where matplotlib can: all of them may lie on PYTHONPATH. MODELS: of `step` (gpt2-124m llama-1b). STEEPEST_COMMIT:
for the figures, where there is no git.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: Shares of the time that is left, of the steps that are given a share.
STEPS: Mapping[str, int] = {"build": 0, "doctor": 0, "sanitizer": 2, "tests": 5, "bench": 8, "compiled": 2}
#: The same of suites, in the order in which they run.
SUITES: Mapping[str, int] = {
    "polar": 5,
    "step": 5,
    "symm_gemm": 2,
    "small": 2,
    "refresh": 2,
    "fused": 2,
    "launch": 1,
    "memory": 1,
    "train": 5,
}
#: What torch.compile is asked of: each shape takes it tens of seconds.
COMPILED: Mapping[str, Sequence[str]] = {
    "polar": ("12x3072x768", "24x1024x4096", "4096x4096"),
    "step": ("12x3072x768",),
    "small": ("42x136x136",),
}
FIRST = ("tests/kernels/test_gpu.py", "tests/kernels/test_grouped_gemm.py", "tests/kernels/test_gpu_ops.py")
LAST = ("tests/tools/bench/", "tests/tools/test_tune.py")  # they compile and measure: long, and others say more
GRACE = 10  # seconds between the interrupt and the kill
ATTEMPTS = 4  # processes for the tests of a file
FILE_SECONDS = 180
NO_TESTS = 5  # an exit status of pytest
NOT_RUN = 1000  # beside exit statuses
PART_BYTES = 15 << 20
LOG_BYTES = 1 << 20

FACTS = """
import json, torch
gpu = torch.cuda.is_available()
facts = {"gpu": torch.cuda.get_device_name() if gpu else None, "torch": torch.__version__, "cuda": torch.version.cuda}
import steepest
from steepest.ops import backend, polar_chain
info = backend.extension.build_info() if backend.extension else {}
facts |= {"steepest": steepest.__file__, "built_from": info.get("commit"), "architectures": info.get("architectures")}
facts |= {"compiled": backend.cuda_reason() if gpu else backend.extension_reason, "triton": backend.triton_reason()}
facts["hopper"] = polar_chain.hopper_reason(torch.empty(1, device="cuda")) if gpu else not info.get("hopper")
print(json.dumps(facts))
"""


@dataclass
class Outcome:
    """What is said of a process: a status in words, and lines that go under it."""

    step: str
    name: str
    status: str
    seconds: float = 0.0
    bad: bool = False
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        first = f"{self.step:<10}{self.name:<36}{self.status}, {self.seconds:.0f} s"
        return "\n".join([first, *(f"{'':10}  {note[:240]}" for note in self.notes)])


class Run:
    """One call: its options, the time that is left, and what came of what."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.began, self.since = options, time.monotonic(), time.time() - 1
        self.results, self.logs = options.results, options.results / "logs"
        self.outcomes: list[Outcome] = []
        self.facts: dict[str, object] = {}
        self._lock, self._running, self._stopped = threading.RLock(), set[subprocess.Popen[bytes]](), False
        path = os.pathsep.join(filter(None, [str(options.site), os.environ.get("PYTHONPATH", "")]))
        self.environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}

    @property
    def left(self) -> float:
        """Seconds until all has to be over."""
        return self.options.limit - (time.monotonic() - self.began)

    # ---- processes --------------------------------------------------------------------------------------------------

    def process(self, name: str, command: Sequence[str], seconds: float, **environment: str) -> tuple[int, float]:
        """Exit status (124 or 137: out of time; NOT_RUN: none left) and seconds; what it says goes to logs/NAME.log."""
        seconds = int(min(seconds, self.left - GRACE))
        words = ["timeout", "--signal=INT", f"--kill-after={GRACE}", str(seconds), *command]
        if self.options.dry_run:
            print(f"{name}: {shlex.join([*words[:4], 'env', *(f'{k}={v}' for k, v in environment.items()), *command])}")
            if not name.startswith(("build", "doctor", "tests")):
                self.began -= seconds  # as if it took all of its time
            return 0, 0.0
        if seconds < 5 or self._stopped:
            return NOT_RUN, 0.0
        began = time.monotonic()
        with self.log(name).open("wb") as log:
            log.write(f"$ {shlex.join(words)}\n".encode())
            log.flush()
            with self._lock:
                process = subprocess.Popen(
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=ROOT,
                    env={**self.environment, **environment},
                    start_new_session=True,
                )
                self._running.add(process)
            status = process.wait()
            with self._lock:
                self._running.discard(process)
        return status, time.monotonic() - began

    def stop(self) -> None:
        """Ends what runs, each with all that it started."""
        self._stopped = True
        with self._lock:
            for process in self._running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

    def log(self, name: str) -> Path:
        return self.logs / f"{name.replace('/', '.').replace(' ', '-')}.log"

    def said(self, name: str) -> str:
        log = self.log(name)
        return log.read_text(errors="replace") if log.exists() else ""

    def last(self, name: str, status: int) -> list[str]:
        """Of what failed the last line with an error, and the last lines."""
        lines = [line.strip() for line in self.said(name).splitlines() if line.strip()]
        errors = [line for line in lines if re.search(r"[A-Z]\w*Error: |: (fatal )?error: ", line)]
        return [] if status in (0, NOT_RUN) else list(dict.fromkeys([*errors[-1:], *lines[-3:]]))

    def add(self, outcome: Outcome) -> None:
        if self.options.dry_run:
            return
        with self._lock:
            self.outcomes.append(outcome)
            print(outcome, flush=True)
            (self.results / "summary.txt").write_text(self.summary())

    def simple(self, step: str, name: str, command: Sequence[str], seconds: float, **environment: str) -> None:
        """A process of which the exit status says all."""
        log = f"{step} {name}"
        status, took = self.process(log, command, seconds, **environment)
        self.add(Outcome(step, name, word(status), took, status != 0, self.last(log, status)))

    # ---- steps ------------------------------------------------------------------------------------------------------

    def build(self) -> None:
        architectures = self.options.target or self.capability() or os.environ.get("TORCH_CUDA_ARCH_LIST")
        if not architectures:
            note = "no GPU here; name its capability, as in --for 9.0a"
            self.add(Outcome("build", str(self.options.site), "failed", 0, True, [note]))
            return
        pip = [self.options.python, "-m", "pip", "--disable-pip-version-check", "install", "--no-index", "--no-deps"]
        pip += ["--no-build-isolation", "--upgrade", "--verbose", "--target", str(self.options.site), "."]
        seconds = self.left if self.options.steps == ["build"] else self.left - 60
        self.simple("build", "package", pip, seconds, STEEPEST_CUDA="1", TORCH_CUDA_ARCH_LIST=architectures)

    def capability(self) -> str:
        if self.options.dry_run:
            return "of-the-device"
        ask = 'import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}.{b}" + "a" * ((a, b) == (9, 0)))'
        return subprocess.run([self.options.python, "-c", ask], capture_output=True, text=True).stdout.strip()

    def doctor(self) -> None:
        steepest = [self.options.python, "-m", "steepest"]
        if shutil.which("nvidia-smi"):
            self.simple("doctor", "nvidia-smi", ["nvidia-smi"], 20)
        self.simple("doctor", "doctor", [*steepest, "doctor"], 120)
        shapes = [word for shape in ("24x1024x4096", "4096x4096", "126x64x256") for word in ("--shape", shape)]
        self.simple("doctor", "plan", [*steepest, "plan", *shapes], 30)

    def sanitizer(self, seconds: float) -> None:
        home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "compute-sanitizer"
        tool = shutil.which("compute-sanitizer") or (str(home) if home.exists() or self.options.dry_run else None)
        if tool is None:
            self.add(Outcome("sanitizer", "compute-sanitizer", f"not run: not on PATH, nor at {home}"))
            return
        files = [name for name in gpu_files() if "def test_tiny" in (ROOT / name).read_text()]
        tiny = [*self.pytest(), "-k", "tiny", *files]
        doctor = [self.options.python, "-m", "steepest", "doctor"]
        checks = [("memcheck", "tiny", tiny), ("synccheck", "tiny", tiny), ("memcheck", "doctor", doctor)]
        end = self.left - seconds
        for i, (kind, name, command) in enumerate(checks):
            check = [tool, "--tool", kind, "--target-processes", "all", "--error-exitcode", "99", *command]
            share = (self.left - end) / (len(checks) - i)
            # Every tensor in memory of its own, so that what lies beyond one is nobody's.
            self.simple("sanitizer", f"{kind} {name}", check, share, PYTORCH_NO_CUDA_MEMORY_CACHING="1")

    def pytest(self) -> list[str]:
        return [self.options.python, "-m", "pytest", "-v", "-m", "gpu", "--tb=short", "-p", "no:cacheprovider"]

    def tests(self, seconds: float) -> None:
        end, cores = self.left - seconds, os.cpu_count() or 1
        jobs = self.options.jobs or max(1, min(8, cores // 2))
        threads = str(max(1, cores // jobs))
        with ThreadPoolExecutor(1 if self.options.dry_run else jobs) as pool:
            list(pool.map(lambda name: self.file(name, end, threads), gpu_files()))
        if self.options.dry_run:
            self.began -= seconds

    def file(self, name: str, end: float, threads: str) -> None:
        """The tests of a file; those that a crash, a hang or a GPU in error left over in another process."""
        found: dict[str, str] = {}  # by test: a word of pytest's, or why it did not end
        notes: list[str] = []
        took, begun = 0.0, self.log(f"tests {name}").with_suffix(".begun")
        begun.unlink(missing_ok=True)
        for attempt in range(1, ATTEMPTS + 1):
            log = f"tests {name}" + (f" {attempt}" if attempt > 1 else "")
            xml = str(self.log(log).with_suffix(".xml"))
            command = [*self.pytest(), "--junitxml", xml, "--begun", str(begun), name]
            seconds = min(self.left - end, FILE_SECONDS)
            status, spent = self.process(log, command, seconds, OMP_NUM_THREADS=threads)
            took, said = took + spent, self.said(log) if status != NOT_RUN else ""
            found |= results(said, name)
            notes += re.findall(r"^(?:FAILED|ERROR) .*", said, re.MULTILINE)
            if status in (0, 1, NOT_RUN) or (status == NO_TESTS and found):
                break
            stops = re.findall(r"^!+ .*?(?:Interrupted|stopping): (.*?) !+$", said, re.MULTILINE)
            reason = " ".join(stops) or word(status)
            stuck = [id_ for id_ in (begun.read_text().splitlines() if begun.exists() else []) if id_ not in found]
            found |= dict.fromkeys(stuck, reason)
            notes += [f"{reason}: {id_}" for id_ in stuck] or [reason]
            if not found:  # of a file that cannot be imported, or without pytest, nothing is left over
                notes += re.findall(r"^E   .*", said, re.MULTILINE)[-1:]
                break
        whole = status in (0, 1) or (status == NO_TESTS and bool(found))
        said = "; ".join(filter(None, [count(found.values()), "" if whole else f"not run to its end: {word(status)}"]))
        bad = attempt > 1 or not whole or any(result not in ("PASSED", "SKIPPED", "XFAIL") for result in found.values())
        self.add(Outcome("tests", name, said, took, bad, notes))

    def bench(self, seconds: float) -> None:
        models = os.environ.get("MODELS", "gpt2-124m llama-1b").split()[: 1 if self.options.quick else None]
        more = {suite: ["--whole", "--shapes", *models] for suite in ("step", "launch", "memory")}
        self.suites("bench", "", {s: [*more.get(s, []), "--no-compiled"] for s in SUITES}, seconds)

    def compiled(self, seconds: float) -> None:
        options = {s: ["--shapes", *shapes, "--compiled", "--no-peers"] for s, shapes in COMPILED.items()}
        self.suites("compiled", "-compiled", options, seconds)

    def suites(self, step: str, suffix: str, options: Mapping[str, list[str]], seconds: float) -> None:
        """No case begins in the last quarter of a suite's time."""
        end, names = self.left - seconds, list(options)
        for i, suite in enumerate(names):
            share = (self.left - end) * SUITES[suite] / sum(SUITES[other] for other in names[i:])
            command = [self.options.python, "-m", "steepest", "bench", suite, *options[suite], "--device", "cuda"]
            command += ["--name", suite + suffix, "--budget", str(int(share * 3 / 4)), "--out", str(self.results)]
            log = f"{step} {suite}"
            status, took = self.process(log, command + ["--quick"] * self.options.quick, share)
            counted, notes = rows(self.results / f"{suite}{suffix}.json", self.since)
            said = "; ".join(filter(None, [word(status), counted]))
            self.add(Outcome(step, suite, said, took, status != 0, notes or self.last(log, status)))

    def all(self) -> None:
        for step in STEPS:
            if step not in self.options.steps:
                continue
            try:
                if step in ("build", "doctor"):
                    getattr(self, step)()
                elif self.facts.get("gpu", "") is None:
                    self.add(Outcome(step, "", "not run: torch sees no GPU here", 0, True))
                else:
                    after = [s for s in self.options.steps if list(STEPS).index(s) >= list(STEPS).index(step)]
                    getattr(self, step)((self.left - GRACE) * STEPS[step] / sum(STEPS[s] for s in after))
            except Exception as error:  # the next step is worth its time all the same
                self.add(Outcome(step, "", f"failed: {type(error).__name__}: {error}", 0, True))
            if step == "build":
                self.learn()
            self.pack()

    # ---- what is said of it -----------------------------------------------------------------------------------------

    def learn(self) -> None:
        """What this machine and this build are, before anything is spent on them."""
        if self.options.dry_run:
            return
        try:
            command = [self.options.python, "-c", FACTS]
            done = subprocess.run(command, capture_output=True, text=True, timeout=90, env=self.environment, cwd=ROOT)
            self.facts = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}
            why = done.stderr.strip().splitlines()[-1:] if done.returncode else []
        except (OSError, ValueError, IndexError, subprocess.TimeoutExpired) as error:
            why = [f"{type(error).__name__}: {error}"]
        if why:
            note = f"nothing is known of this build (is it at {self.options.site}?)"
            self.add(Outcome("machine", "facts", note, 0, True, why))
        elif self.options.site not in Path(str(self.facts["steepest"])).resolve().parents:
            note = f"not the build at {self.options.site}, where there is none: another one is run and measured"
            self.add(Outcome("machine", "steepest", note, 0, True, [str(self.facts["steepest"])]))
        (self.results / "machine.json").write_text(json.dumps(self.facts, indent=1))

    def summary(self) -> str:
        facts = self.facts
        head = [f"{key}: {facts[key]}" for key in ("gpu", "torch", "cuda", "steepest", "built_from") if facts.get(key)]
        missing = [f"not run: {step}, not asked for" for step in STEPS if step not in self.options.steps]
        ran = {outcome.step for outcome in self.outcomes}
        missing += [f"not run: {step}, stopped before it" for step in self.options.steps if step not in ran]
        if facts.get("compiled"):
            missing.append(f"compiled kernels do not run, nothing below is about them: {facts['compiled']}")
        elif facts.get("hopper") and isinstance(facts["hopper"], str):
            missing.append(f"Hopper products do not run, the headline route is not measured: {facts['hopper']}")
        elif facts.get("hopper"):
            missing.append(
                "Hopper products were not built (no sm_90a, or no CUTLASS), the headline route is not measured"
            )
        if facts.get("triton"):
            missing.append(f"Triton kernels do not run: {facts['triton']}")
        here = commit()
        if here and facts.get("built_from") and not here.startswith(str(facts["built_from"]).partition("+")[0]):
            missing.append(f"the build is of commit {facts['built_from']}, tests and benchmarks are of {here[:12]}")
        bad = [outcome for outcome in self.outcomes if outcome.bad]
        names = ", ".join(outcome.name or outcome.step for outcome in bad) or "none"
        last = f"{len(self.outcomes)} done, {len(bad)} of them not well: {names}"
        return "\n".join([*head, "", *missing, "", *map(str, self.outcomes), "", last, ""])

    def packed(self, path: Path) -> bool:
        archive = path.parent == self.options.pack and path.name.startswith("results.tar.gz")
        return path.is_file() and path.stat().st_mtime >= self.since and not archive

    def pack(self) -> None:
        """RESULTS as a few files: what was there stays until the new ones are whole."""
        into = self.options.pack
        if self.options.dry_run or into is None:
            return
        into.mkdir(parents=True, exist_ok=True)
        memory = io.BytesIO()
        with tarfile.open(fileobj=memory, mode="w:gz") as tar:
            for path in sorted(p for p in self.results.rglob("*") if self.packed(p)):
                data = path.read_bytes()
                if path.suffix == ".log" and len(data) > LOG_BYTES:
                    data = b"(its beginning is left out)\n" + data[-LOG_BYTES:]
                entry = tarfile.TarInfo(str(path.relative_to(self.results)))
                entry.size, entry.mtime = len(data), int(path.stat().st_mtime)
                tar.addfile(entry, io.BytesIO(data))
        data = memory.getvalue()
        parts = [data[i : i + PART_BYTES] for i in range(0, len(data), PART_BYTES)]
        names = ["results.tar.gz"] if len(parts) == 1 else [f"results.tar.gz.{i:02}" for i in range(len(parts))]
        for name, part in zip(names, parts):
            (into / f"{name}.new").write_bytes(part)
        for old in into.glob("results.tar.gz*"):
            if not old.name.endswith(".new"):
                old.unlink()
        for name in names:
            (into / f"{name}.new").rename(into / name)
        (into / "summary.txt").write_text(self.summary())


def word(status: int) -> str:
    """An exit status in words."""
    if status in (124, 137, -signal.SIGKILL):  # the last one where `timeout` is killed with what it ran
        return "out of time"
    number = -status if status < 0 else status - 128
    if number in set(signal.Signals):
        return f"crashed: {signal.Signals(number).name}"
    return {0: "ok", NOT_RUN: "not run: no time left"}.get(status, f"failed with {status}")


def results(said: str, file: str) -> dict[str, str]:
    """What `pytest -v` said of each test."""
    line = rf"^({re.escape(file)}::.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b"
    return dict(re.findall(line, said, re.MULTILINE))


def count(words: Iterable[str]) -> str:
    names = {"PASSED": "passed", "FAILED": "failed", "ERROR": "errors", "SKIPPED": "skipped", "XFAIL": "xfailed"}
    each = [names.get(word, "stopped") for word in words]
    return ", ".join(
        f"{each.count(name)} {name}" for name in dict.fromkeys([*names.values(), "stopped"]) if name in each
    )


def rows(path: Path, since: float) -> tuple[str, list[str]]:
    """How many rows of a suite there are by their status, and what is to be read of them; nothing of an older file."""
    try:
        found = json.loads(path.read_text())["rows"] if path.stat().st_mtime >= since else None
    except (OSError, ValueError, KeyError):
        found = None
    if found is None:
        return "", []
    statuses = [(row, str(row.get("status", ""))) for row in found]
    timed = sum(status == "ok" for _, status in statuses)
    late = sum("out of time" in status for _, status in statuses)
    bad = [
        f"{row.get('case', '')} {row.get('dtype', '')} {row.get('variant', '')}: {status}"
        for row, status in statuses
        if row.get("ours") and status.startswith(("WRONG", "failed"))
    ]
    return f"{timed} rows, {late} cases not begun" if late else f"{timed} rows", bad[:20]


def gpu_files() -> list[str]:
    """Files with tests that need a GPU; others are not even imported."""
    names = [
        str(p.relative_to(ROOT)) for p in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in p.read_text()
    ]
    return sorted(names, key=lambda n: (n not in FIRST, FIRST.index(n) if n in FIRST else 0, n.startswith(LAST), n))


def commit() -> str:
    try:
        return subprocess.check_output(
            ["git", "-C", str(ROOT), "rev-parse", "HEAD"], text=True, stderr=subprocess.DEVNULL
        ).strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("STEEPEST_COMMIT", "")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="bench/gpu.sh", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("results", type=Path, metavar="RESULTS")
    p.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(STEPS)}")
    p.add_argument("--site", type=Path, default=ROOT / "build" / "gpu-site", help="where the package is built to")
    p.add_argument("--for", dest="target", metavar="CAPABILITY", help="as in 9.0a: builds for it, GPU or not")
    p.add_argument("--pack", type=Path, metavar="DIR", help="the results in few files, whatever happens")
    p.add_argument("--limit", type=float, help="seconds in all (540; 170 with --quick; no end to a build alone)")
    p.add_argument("--jobs", type=int, help="test files at a time (half the cores, 8 at most)")
    p.add_argument("--quick", action="store_true", help="fewer and smaller shapes")
    p.add_argument("--dry-run", action="store_true", help="prints the commands")
    options = p.parse_intermixed_args(arguments)  # steps may stand behind options as well
    if options.limit is not None and not 0 < options.limit < float("inf"):
        p.error(f"--limit is a number of seconds above 0, got {options.limit}")
    if options.jobs is not None and options.jobs < 1:
        p.error(f"--jobs is at least 1, got {options.jobs}")
    for step in options.steps:
        if step not in STEPS:
            p.error(f"step {step!r} is not known; choose from {', '.join(STEPS)}")
    options.steps = [step for step in STEPS if step in options.steps or not options.steps]
    if options.limit is None:
        options.limit = 170 if options.quick else 540
        if options.steps == ["build"]:
            options.limit = 24 * 3600
    options.python = os.environ.get("PYTHON", sys.executable)
    for name in ("results", "site", "pack"):
        path = getattr(options, name)
        setattr(options, name, None if path is None else path.resolve())
    return options


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    run = Run(options)
    if not options.dry_run:
        run.logs.mkdir(parents=True, exist_ok=True)

    def interrupted(*_: object) -> None:
        run.stop()
        raise KeyboardInterrupt

    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, interrupted)
    try:
        if "build" not in options.steps:
            run.learn()
        run.all()
    finally:
        run.stop()
        if not options.dry_run:
            (run.results / "summary.txt").write_text(run.summary())
            run.pack()
    print(f"\n{run.summary()}" if not options.dry_run else "")
    return int(any(outcome.bad for outcome in run.outcomes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
