"""What the rows say: means over seeds with confidence intervals, and ranks over tasks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scipy.stats import rankdata, t

from .chosen import Entry, Task, taken
from .runs import DONE, FAILED, FINAL, TUNE, Row

LEVEL = 0.95


@dataclass(frozen=True)
class Cell:
    """One method on one task.

    scores: one for each seed that ended;  lost: how many seeds failed;  mean, half: of the scores, and half of the confidence
    interval of their mean (None for one seed);  lr: the learning rate that was chosen;  time, seconds, cpu, memory, bytes: medians
    (time: seconds on an accelerator; of the processor without one, where other work on the machine counts for less);  failures:
    reasons, of seeds and of learning rates.
    """

    entry: Entry
    scores: tuple[float, ...]
    lost: int
    lr: float | None
    time: float
    seconds: float
    cpu: float
    memory: float
    bytes: float
    failures: tuple[str, ...]

    @property
    def mean(self) -> float:
        return statistics.mean(self.scores) if self.scores else math.nan

    @property
    def half(self) -> float | None:
        """Half of the two-sided interval of the mean at LEVEL: t s / sqrt(n), s over n seeds, t of n - 1 degrees of freedom."""
        n = len(self.scores)
        if n < 2:
            return None
        return float(t.ppf((1 + LEVEL) / 2, n - 1)) * statistics.stdev(self.scores) / math.sqrt(n)


def cells(every: Sequence[Entry], rows: Iterable[Row]) -> dict[tuple[str, str], Cell]:
    """(task, label) -> what came of it, for each entry that takes part."""
    by: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        by.setdefault((row.run.task, row.run.label, row.run.text), []).append(row)
    out = {}
    for entry in taken(every):
        of = by.get((entry.task, entry.label, entry.text), [])
        ended = [r for r in of if r.run.phase == FINAL and r.state == DONE]
        failed = [r for r in of if r.state == FAILED]
        middle = {
            name: statistics.median(r.result[name] for r in ended) if ended else math.nan
            for name in ("seconds", "cpu", "memory", "bytes")
        }
        out[entry.task, entry.label] = Cell(
            entry,
            tuple(r.result["score"] for r in ended),
            sum(r.run.phase == FINAL for r in failed),
            ended[0].run.lr if ended else None,
            statistics.median(map(_time, ended)) if ended else math.nan,
            failures=tuple(f"{_which(r)}: {r.result.get('reason', '')}" for r in failed),
            **middle,
        )
    return out


def _time(row: Row) -> float:
    on_cpu = row.result.get("device") == "cpu"
    return float(row.result["cpu" if on_cpu else "seconds"])


def _which(row: Row) -> str:
    return f"lr {row.run.lr:g}" + (" (dev)" if row.run.phase == TUNE else f", seed {row.run.seed}")


def ranks(tasks: Sequence[Task], found: dict[tuple[str, str], Cell]) -> dict[str, dict[str, float]]:
    """label -> task -> rank of its mean, 1 the best, equals share a rank, a method without a score is last, and so is one that failed
    with any seed. On a task that a method is left out of it has no rank."""
    out: dict[str, dict[str, float]] = {label: {} for _, label in found}
    for task in tasks:
        of = [cell for (name, _), cell in found.items() if name == task.name]
        means = [math.inf if cell.lost or not cell.scores else -cell.mean if task.larger else cell.mean for cell in of]
        for cell, rank in zip(of, rankdata(means, method="average"), strict=True):
            out[cell.entry.label][task.name] = float(rank)
    return out


def mean_rank(of: dict[str, float]) -> float:
    """The mean over the tasks that a method takes part in."""
    return statistics.mean(of.values())
