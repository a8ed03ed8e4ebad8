"""examples/fsdp2.py: another number of ranks goes on from its checkpoint as if nothing had happened."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE
from types import ModuleType

import pytest

from support.processes import GLOO, Processes

EXAMPLES = Path(__file__).parents[2] / "examples"
SETTINGS = ("--batch", "4", "--optimizer")
#: Seconds until a run that does not end is stopped.
LIMIT = 150
#: What torch says that aborts a rank once Python is ending, all work done: a thread of gloo lets go of a tensor then
#: (pytorch/pytorch#190489). A rank has also been seen not to end at all after the last line of its program.
ABORTED_AT_EXIT = "terminate called without an active exception"


def example() -> ModuleType:
    sys.path.insert(0, str(EXAMPLES))
    import fsdp2

    return fsdp2


def losses_of(arguments: list[str]) -> list[float]:
    fsdp2 = example()
    losses: list[float] = fsdp2.train(fsdp2.parser().parse_args(arguments), "cpu")
    return losses


def test_it_resumes_on_another_number_of_ranks(processes: Processes, tmp_path: Path) -> None:
    stopped, whole = (["--checkpoint", str(tmp_path / name), *SETTINGS, "SOAP"] for name in ("stopped", "whole"))
    first, same = processes.run(losses_of, [*stopped, "--steps", "3"], ranks=2)
    assert first == same  # they are of all ranks
    [second] = processes.run(losses_of, [*stopped, "--steps", "5"], ranks=1)
    reference, _ = processes.run(losses_of, [*whole, "--steps", "5"], ranks=2)
    assert first == reference[:3]
    assert second == pytest.approx(reference[3:], rel=1e-3)


def test_batches_are_shared_out_evenly(processes: Processes, tmp_path: Path) -> None:
    [error, _] = processes.outcomes(losses_of, ["--batch", "3", "--checkpoint", str(tmp_path)], ranks=2)
    assert "--batch 3 is no multiple of 2 ranks" in error.text + error.log


@pytest.mark.slow
def test_torchrun_runs_it(tmp_path: Path) -> None:
    def lines(ranks: int, steps: int) -> str:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        options = [f"--steps={steps}", "--batch=4", f"--checkpoint={tmp_path}"]
        environment = {**os.environ, **GLOO, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        program = [*command, str(EXAMPLES / "fsdp2.py"), *options]
        with subprocess.Popen(program, env=environment, stdout=PIPE, stderr=PIPE, text=True) as process:
            try:
                said, errors = process.communicate(timeout=LIMIT)
                hung = False
            except subprocess.TimeoutExpired:
                process.terminate()  # on which torchrun ends its ranks
                said, errors = process.communicate()
                hung = True
        saved = f"saved in {tmp_path}" in said  # the last that is said, before a barrier of all ranks
        assert process.returncode == 0 or (saved and (hung or ABORTED_AT_EXIT in errors)), errors[-4000:]
        return said

    assert "Muon on 2 ranks (cpu), from step 0" in lines(2, 2)
    assert "Muon on 1 ranks (cpu), from step 2\nstep    3  loss" in lines(1, 3)
