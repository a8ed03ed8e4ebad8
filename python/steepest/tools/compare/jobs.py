"""What is to be run, and the runs that are made of it: a record of each goes into the file at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from . import records
from .methods import ADAMW_RATE, Method
from .records import Key
from .tasks import Task
from .training import Record, train


@dataclass(frozen=True)
class Job:
    """A run to be made; adamw_lr is the rate of what the method leaves to AdamW."""

    task: Task
    method: Method
    lr: float
    steps: int
    seed: int
    adamw_lr: float = ADAMW_RATE

    @property
    def key(self) -> Key:
        return self.task.name, self.method.name, self.lr, self.seed


@dataclass
class Runs:
    """The records of a file. Called with a job, it gives the record of it, after a run where there is none."""

    path: Path
    evaluations: int
    known: dict[Key, Record] = field(default_factory=dict)

    def __call__(self, job: Job) -> Record:
        if job.key not in self.known:
            record = train(job.task, job.method, job.lr, job.steps, job.seed, self.evaluations, job.adamw_lr)
            records.append(self.path, record)
            self.known[job.key] = record
        return self.known[job.key]
