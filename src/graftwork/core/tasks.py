"""Which task (language, domain) a batch, or each row of it, belongs to: what `gw.context(model, task=...)` was told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import GraftError, nearest
from .passes import Runtime


def number_of(task: Any, known: Sequence[str], key: str, word: str = "task") -> int:
    """The number of a task, given by its name or its number; None where there is one task only. GraftError for an unknown one.

    word: what the context calls it.
    """
    if task is None and len(known) == 1:
        return 0
    if isinstance(task, str) and task in known:
        return known.index(task)
    if isinstance(task, int) and not isinstance(task, bool) and 0 <= task < len(known):
        return task
    close = nearest(task, known) if isinstance(task, str) else ""
    found = f"it has {', '.join(known)}{close}"
    raise GraftError(f"the {word} {task!r} at {key}", found, f"give one: gw.context(model, {word}=...)")


def one_of(given: Any, known: Sequence[str], key: str, word: str) -> int:
    """The number of the one that a whole batch has, given as such, or as the same for every row. GraftError where rows differ."""
    rows = given.flatten().tolist() if isinstance(given, Tensor) else given
    if not isinstance(rows, list | tuple):
        return number_of(rows, known, key, word)
    numbers = sorted({number_of(row, known, key, word) for row in rows})
    if len(numbers) != 1:
        found = f"rows of {' and '.join(known[n] for n in numbers) or 'nothing'}"
        raise GraftError(f"the {word} of a batch at {key}", found, f"give batches of one {word} each")
    return numbers[0]


def tasks_of(runtime: Runtime, known: Sequence[str], key: str) -> int | Tensor:
    """The number of the batch's one task, or those of its rows [batch]: the context's task is a name, a number, a list of
    these, or a tensor of numbers. GraftError for an unknown one.
    """
    given = runtime.context.get("task")
    if isinstance(given, list | tuple):
        numbers = [number_of(task, known, key) for task in given]
        given = numbers[0] if len(set(numbers)) == 1 else torch.tensor(numbers)
    if isinstance(given, Tensor):
        given = _checked(given, known, key)
    if not isinstance(given, Tensor):
        return number_of(given, known, key)
    if runtime.rows is not None and not runtime.rows.uniform:
        do = "give the batch one task, or activate one adapter at a time"
        raise GraftError(f"the tasks of each row at {key}", "each row has an adapter of its own, too", do)
    return given


def each_row(tasks: Tensor, rows: int, key: str) -> Tensor:
    """The tasks [batch] for `rows` entries along axis 0: a row of the batch may have become several, one after the other (beams)."""
    if not len(tasks) or rows % len(tasks):
        found = f"{len(tasks)} tasks for {rows} rows"
        raise GraftError(
            f"the task of each row at {key}", found, "give one for each row: gw.context(model, task=[...])"
        )
    return tasks.repeat_interleave(rows // len(tasks))


def _checked(tasks: Tensor, known: Sequence[str], key: str) -> Tensor | int:
    if tasks.is_floating_point() or tasks.is_complex() or tasks.dtype == torch.bool or tasks.dim() > 1:
        found = f"a tensor of {tasks.dtype} and shape {list(tasks.shape)}"
        raise GraftError(f"the task at {key}", found, "give whole numbers [batch]: gw.context(model, task=...)")
    if not tasks.dim():
        return int(tasks)
    # on another device, looking at the numbers would wait for it at every site
    if tasks.device.type == "cpu" and not torch.compiler.is_compiling() and len(tasks):
        number_of(int(tasks.min()), known, key)
        number_of(int(tasks.max()), known, key)
    return tasks.long()  # narrower ones would be read as masks
