"""What a task is: which head, how rows become inputs, how batches are made, and what is measured.

A task is a frozen dataclass made from the training rows by its module's `plan`; all it needs later goes into the
adapter's metadata (`to_json`), so that prediction and evaluation need no other file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor

from ...core.errors import GraftError, nearest
from ..columns import Columns
from ..metrics import IGNORED

Collator = Callable[[list[dict[str, Any]]], dict[str, Tensor]]


@dataclasses.dataclass(frozen=True)
class Task:
    """Base of all tasks.

    columns: which column is what;  labels: the names of the classes or tags, in the order of the logits (empty: none);
    max_length: tokens a text is cut at (0: what the backbone allows).
    name: on the command line and on disk;  auto: the transformers class that loads the backbone with the right head;
    best: the score that decides which state is the best;  larger: whether a larger one is better;  padded: rows are of several
    lengths, and a batch is as long as its longest.
    """

    columns: Columns
    labels: tuple[str, ...] = ()
    max_length: int = 0
    seed: int = 0

    name: ClassVar[str]
    auto: ClassVar[str]
    best: ClassVar[str]
    larger: ClassVar[bool] = True
    padded: ClassVar[bool] = True

    def config(self) -> dict[str, Any]:
        """What the backbone's config must say."""
        if not self.labels:
            return {}
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: i for i, label in enumerate(self.labels)},
        }

    def encode(self, rows: Dataset, processor: Any, *, labelled: bool = True, training: bool = False) -> Dataset:
        """Rows of the source as model inputs, with "labels" if they are labelled."""
        raise NotImplementedError

    def collator(self, processor: Any, model: Any) -> Collator:
        """Makes a batch from encoded rows."""
        raise NotImplementedError

    def items(self, labels: Tensor) -> Tensor:
        """How many labels of a batch the model's loss is a mean over."""
        return labels.ne(IGNORED).sum()

    def shrink(self, logits: Any, labels: Tensor) -> Any:
        """What of the model's output an evaluation keeps (the logits of a whole language-model evaluation would
        not fit)."""
        return first(logits)

    def metrics(self, kept: Any, labels: Any) -> dict[str, float]:
        """The scores, from what `shrink` kept and the labels, as arrays."""
        raise NotImplementedError

    def decode(self, logits: Any, rows: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
        """One prediction per row for people and files, from the logits of unlabelled rows."""
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """What `graftwork.train.tasks.from_json` makes the task from again."""
        return {"task": self.name, **dataclasses.asdict(self), "labels": list(self.labels)}


def first(logits: Any) -> Any:
    """The logits themselves, where a model returns hidden states or caches beside them."""
    return logits[0] if isinstance(logits, tuple | list) else logits


def length(task: Task, processor: Any) -> int:
    """The number of tokens a text is cut at."""
    allowed = getattr(processor, "model_max_length", 512)
    return task.max_length or min(allowed if allowed and allowed < 10**6 else 512, 512)


def need(rows: Dataset, column: str) -> None:
    """GraftError where the rows have no such column."""
    if column not in rows.column_names:
        names = rows.column_names
        raise GraftError(
            f"the column {column!r}",
            f"the columns {', '.join(names)}{nearest(column, names)}",
            "name the columns: --text --pair --label",
        )


def texts(rows: Dataset, column: str) -> list[str]:
    """A column as texts: numbers are written out. GraftError at a gap or a list."""
    need(rows, column)
    out = []
    for number, value in enumerate(rows[column], 1):
        if value is None or isinstance(value, list | dict):
            raise GraftError(
                f"the texts in the column {column!r}",
                f"row {number} holds {str(value)[:60]!r}",
                "give every row a text",
            )
        out.append(str(value))
    return out


def with_columns(columns: dict[str, list[Any]]) -> Dataset:
    """Encoded columns as rows."""
    return Dataset.from_dict(columns)


def padded(sequences: Sequence[Sequence[int]], value: int, to: int, left: bool = False) -> Tensor:
    """Integer sequences as one tensor [rows, to]."""
    filled = [[value] * (to - len(s)) + list(s) if left else [*s, *[value] * (to - len(s))] for s in sequences]
    return torch.tensor(filled, dtype=torch.long)


def pad(processor: Any, rows: list[dict[str, Any]], labels: str = "none") -> dict[str, Tensor]:
    """A batch of encoded texts, padded by the tokenizer; labels: "none", "one" per row, or one per "token" (padded
    with -100)."""
    inputs = [{k: v for k, v in row.items() if k != "labels"} for row in rows]
    batch = dict(processor.pad(inputs, padding=True, return_tensors="pt"))
    if labels == "one" and "labels" in rows[0]:
        batch["labels"] = torch.tensor([row["labels"] for row in rows])
    if labels == "token" and "labels" in rows[0]:
        left = getattr(processor, "padding_side", "right") == "left"
        batch["labels"] = padded([row["labels"] for row in rows], IGNORED, batch["input_ids"].shape[1], left)
    return batch
