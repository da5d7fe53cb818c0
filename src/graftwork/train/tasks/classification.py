"""Which class a text, or a pair of texts, belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from ...core.errors import GraftError, nearest
from .. import metrics
from ..columns import label_texts, ordered
from .base import Collator, Task, length, need, pad, texts, with_columns


@dataclass(frozen=True)
class Classification(Task):
    """One of the labels for a text or a pair. Scores: accuracy, macro F1, Matthews correlation."""

    name = "classification"
    auto = "AutoModelForSequenceClassification"
    best = "accuracy"

    def config(self) -> dict[str, Any]:
        return {**super().config(), "problem_type": "single_label_classification"}

    def encode(self, rows: Dataset, processor: Any, *, labelled: bool = True, training: bool = False) -> Dataset:
        columns = encode_texts(self, rows, processor)
        if labelled:
            columns["labels"] = label_ids(self, rows)
        return with_columns(columns)

    def collator(self, processor: Any, model: Any) -> Collator:
        return lambda rows: pad(processor, rows, labels="one")

    def metrics(self, kept: Any, labels: Any) -> dict[str, float]:
        return metrics.classification(np.argmax(kept, axis=-1), labels, len(self.labels))

    def decode(self, logits: Any, rows: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
        return best_labels(self, logits)


def encode_texts(task: Task, rows: Dataset, processor: Any) -> dict[str, list[Any]]:
    """input_ids and their companions for the text column and, where there is one, the pair."""
    first = texts(rows, task.columns.text)
    second = texts(rows, task.columns.pair) if task.columns.pair else None
    return dict(processor(first, second, truncation=True, max_length=length(task, processor)))


def label_ids(task: Task, rows: Dataset) -> list[int]:
    """The index of each row's label. GraftError for a label that training did not see."""
    index = {label: i for i, label in enumerate(task.labels)}
    column = str(task.columns.label)
    need(rows, column)
    found = label_texts(rows, column, "the rows")
    unseen = [label for label in ordered(found) if label not in index]
    if unseen:
        raise GraftError(
            f"labels among {', '.join(task.labels)}",
            f"{', '.join(map(repr, unseen[:5]))}{nearest(unseen[0], task.labels)}, unseen in training",
            "give rows with the labels of the training data",
        )
    return [index[label] for label in found]


def classes(rows: Dataset, column: str, what: str = "classes") -> tuple[str, ...]:
    """The labels of the training rows. GraftError where there is only one."""
    found = ordered(label_texts(rows, column, "the training data"))
    if len(found) < 2:
        raise GraftError(
            f"at least two {what} in the column {column!r}",
            f"only {found[0]!r} in {len(rows)} rows",
            "name another column with --label",
        )
    return tuple(found)


def best_labels(task: Task, logits: Any) -> list[dict[str, Any]]:
    """The likeliest label of each row, its probability, and all of them."""
    probabilities = torch.as_tensor(logits).float().softmax(-1)
    scores, chosen = probabilities.max(-1)
    return [
        {
            "label": task.labels[int(i)],
            "score": float(score),
            "scores": {label: float(p) for label, p in zip(task.labels, row, strict=True)},
        }
        for i, score, row in zip(chosen, scores, probabilities, strict=True)
    ]
