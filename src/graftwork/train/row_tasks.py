"""Rows of several tasks in one job: the task of each row travels past the model, into the context of its batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from ..core.errors import GraftError
from ..core.method import Method
from ..core.tasks import number_of
from ..grafting.moments import context
from .columns import label_texts, ordered
from .tasks.base import Collator, Task, need

KEY = "task"  # of the encoded rows and their batches: the number of the row's task


def with_tasks(methods: Sequence[Method], rows: Dataset, task: Task) -> tuple[Method, ...]:
    """The methods, those that learn something for each task with the names that the rows have, unless they have names.

    GraftError where none does, or where one cannot have several tasks in one batch.
    """
    column = task.columns.task
    if column is None:
        return tuple(methods)
    names = tuple(ordered(names_in(rows, column)))
    if not any(m.mixes_tasks for m in methods) or any(hasattr(m, "tasks") and not m.mixes_tasks for m in methods):
        found = f"{' + '.join(map(str, methods))}, which cannot tell rows of several tasks in one batch"
        raise GraftError(f"--task-column {column}", found, "use a method that can, such as poly")
    out = tuple(dataclasses.replace(m, tasks=names) if _open(m) else m for m in methods)  # type: ignore[call-arg]
    known_of(out)
    return out


def _open(method: Method) -> bool:
    """Whether its tasks were left to the data."""
    return any(f.name == "tasks" and getattr(method, f.name) == f.default for f in dataclasses.fields(method))


def known_of(methods: Sequence[Method]) -> tuple[str, ...]:
    """The tasks that the methods know. GraftError where they do not have the same, in one order."""
    found = {m.tasks for m in methods if m.mixes_tasks}  # type: ignore[attr-defined]
    if len(found) != 1:
        raise GraftError("the tasks of the rows", f"methods with {len(found)} lists of tasks", "give all the same")
    return next(iter(found))  # type: ignore[no-any-return]


def names_in(rows: Dataset, column: str) -> list[str]:
    """The task of each row. GraftError at a gap."""
    need(rows, column)
    return label_texts(rows, column, "the tasks")


def marked(encoded: Dataset, rows: Dataset, task: Task, methods: Sequence[Method]) -> Dataset:
    """Encoded rows with the number of each one's task. GraftError where texts became several rows, or for a task that is new."""
    column = task.columns.task
    if column is None:
        return encoded
    if len(encoded) != len(rows):
        do = "cut the texts beforehand, or raise --max-length"
        raise GraftError(f"--task-column {column}", f"{len(rows)} texts that became {len(encoded)} rows", do)
    known = known_of(methods)
    return encoded.add_column(
        KEY, [number_of(name, known, f"the column {column!r}") for name in names_in(rows, column)]
    )


def collating(collator: Collator) -> Collator:
    """The collator, which does not see the tasks."""

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = collator([{k: v for k, v in row.items() if k != KEY} for row in rows])
        return batch | {KEY: torch.tensor([row[KEY] for row in rows])} if KEY in rows[0] else batch

    return collate


def into_context(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """What of a batch is for the model itself. Its tasks stay in the context, which the backward pass may need again."""
    if KEY in batch:
        context(model, task=batch[KEY])
    return {k: v for k, v in batch.items() if k != KEY}
