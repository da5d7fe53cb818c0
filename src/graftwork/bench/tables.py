"""The results as text: the tables in Markdown, and every run as a line of CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from .chosen import Task
from .runs import OVER, Row
from .summary import Cell, mean_rank, ranks

if TYPE_CHECKING:
    from .work import Plan

Found = dict[tuple[str, str], Cell]  # (task, label) -> what came of it
RUN = ("task", "label", "text", "parameters", "phase", "lr", "seed")
RESULT = ("score", "seconds", "cpu", "memory", "bytes", "trained", "device", "reason")


def score(cell: Cell | None) -> str:
    """A mean with half of its interval and the seeds that are missing, or why there is none."""
    if cell is None:
        return "left out"
    if not cell.scores:
        return "failed" if cell.failures else "to do"
    of = f" of {len(cell.scores)} of {len(cell.scores) + cell.lost} seeds" if cell.lost else ""
    return f"{cell.mean:.4f}" + ("" if cell.half is None else f" ± {cell.half:.4f}") + of


def number(value: float, unit: float = 1.0, digits: int = 0) -> str:
    """A number of units for people."""
    return "–" if math.isnan(value) else f"{value / unit:,.{digits}f}"


def ranked(plan: Plan, found: Found) -> list[tuple[str, dict[str, float]]]:
    """(method, its rank by task), the best first."""
    return sorted(ranks(plan.tasks, found).items(), key=lambda pair: mean_rank(pair[1]))


def ordered(task: Task, of: Iterable[Cell]) -> list[Cell]:
    """The best first; those that failed last."""
    sign = -1 if task.larger else 1
    return sorted(of, key=lambda c: (not c.scores, c.lost > 0, sign * c.mean if c.scores else 0))


def placed(found: Found, label: str, of: dict[str, float], task: Task) -> tuple[str, str]:
    """(score, rank) of a method on a task; no rank where it took no part."""
    return score(found.get((task.name, label))), f"({of[task.name]:g})" if task.name in of else ""


def markdown(plan: Plan, found: Found) -> str:
    """The rank table, the costs of each task, failures, and what was left out."""
    names = [task.name for task in plan.tasks]
    lines = [f"| method | mean rank | {' | '.join(names)} |", f"| --- |{' ---: |' * (len(names) + 1)}"]
    for label, of in ranked(plan, found):
        scores = " | ".join(" ".join(placed(found, label, of, task)).strip() for task in plan.tasks)
        lines.append(f"| `{label}` | {mean_rank(of):.1f} | {scores} |")
    for task in plan.tasks:
        heads = ("method", "as it is run", task.metric, "trained", "lr", "s", "CPU s", "MB", "kB")
        lines += ["", f"## {task.name}", "", f"| {' | '.join(heads)} |", "| --- | --- |" + " ---: |" * (len(heads) - 2)]
        for c in ordered(task, [cell for (name, _), cell in found.items() if name == task.name]):
            cost = (number(c.seconds, digits=1), number(c.cpu, digits=1), number(c.memory, 2**20), number(c.bytes, 1e3))
            said = (f"`{c.entry.label}`", f"`{c.entry.text}`", score(c), f"{c.entry.parameters:,}")
            lines.append(f"| {' | '.join((*said, plan.settings.rate(c.lr), *cost))} |")
    failed = [(name, label, reason) for (name, label), cell in found.items() for reason in cell.failures]
    left = [(entry.task, entry.label, entry.reason) for entry in plan.entries if entry.reason]
    for title, rows in (("Failures", failed), ("Left out", left)):
        if rows:
            lines += ["", f"## {title}", "", "| task | method | why |", "| --- | --- | --- |"]
            lines += [f"| {name} | `{label}` | {reason.replace('|', '/')} |" for name, label, reason in rows]
    return "\n".join(lines) + "\n"


def lines(rows: Sequence[Row]) -> str:
    """Each run that is over as a line of CSV, the tuning included. seconds, cpu: of the training; memory, bytes: in bytes."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow((*RUN, "state", *RESULT))
    for row in rows:
        if row.state in OVER:
            said = (row.result.get(name, "") for name in RESULT)
            short = (f"{value:.6g}" if isinstance(value, float) else value for value in said)
            writer.writerow((*(getattr(row.run, name) for name in RUN), row.state, *short))
    return out.getvalue()
