"""What is to be run, as data: which runs are missing follows from the entries and the rows that are there, and from nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .chosen import Entry, Task, taken
from .settings import BenchSettings

TUNE, FINAL = "tune", "final"
WAITING, RUNNING, DONE, FAILED = "waiting", "running", "done", "failed"
OVER = (DONE, FAILED)


@dataclass(frozen=True)
class Run:
    """One training. phase: "tune" is scored on the dev rows, "final" on the test rows."""

    task: str
    label: str
    text: str
    parameters: int
    phase: str
    lr: float
    seed: int

    @property
    def key(self) -> str:
        """What tells runs apart, the same in every process."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_key(cls, key: str) -> Run:
        return cls(**json.loads(key))


@dataclass(frozen=True)
class Row:
    """A run and what came of it. result: score, scores, seconds, cpu, memory, bytes, trained; or reason, for one that failed."""

    run: Run
    state: str
    result: Mapping[str, Any] = field(default_factory=dict)


def missing(tasks: Sequence[Task], every: Sequence[Entry], settings: BenchSettings, there: Iterable[Row]) -> list[Run]:
    """The runs that can be added now: each entry's learning rates on the dev rows, and once these are over, its seeds."""
    rows = {row.run: row for row in there}
    larger = {task.name: task.larger for task in tasks}
    out = []
    for entry in taken(every):
        tuning = tune(entry, settings)
        out += [run for run in tuning if run not in rows]
        if all(run in rows and rows[run].state in OVER for run in tuning):
            lr = best_rate([rows[run] for run in tuning], settings, larger[entry.task])
            finals = [] if lr is None else final(entry, settings, lr)
            out += [run for run in finals if run not in rows]
    return out


def tune(entry: Entry, settings: BenchSettings) -> list[Run]:
    """The tuning of an entry; none where there is but one learning rate."""
    rates = settings.rates() if len(settings.rates()) > 1 else ()
    return [_run(entry, TUNE, lr, 0) for lr in rates]


def final(entry: Entry, settings: BenchSettings, lr: float) -> list[Run]:
    """The runs of an entry that count."""
    return [_run(entry, FINAL, lr, seed) for seed in range(settings.seeds)]


def _run(entry: Entry, phase: str, lr: float, seed: int) -> Run:
    return Run(entry.task, entry.label, entry.text, entry.parameters, phase, lr, seed)


def best_rate(tuned: Sequence[Row], settings: BenchSettings, larger: bool) -> float | None:
    """The learning rate with the best score on the dev rows; None where every one failed."""
    if not tuned:
        return settings.rates()[0]
    done = [row for row in tuned if row.state == DONE]
    sign = 1 if larger else -1
    return max(done, key=lambda row: (sign * row.result["score"], -row.run.lr)).run.lr if done else None


def expected(every: Sequence[Entry], settings: BenchSettings) -> int:
    """How many runs a whole bench has."""
    return sum(len(tune(entry, settings)) + settings.seeds for entry in taken(every))
