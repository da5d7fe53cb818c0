"""A number for a text or a pair of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from ...core.errors import GraftError
from .. import metrics
from ..columns import as_number, label_texts
from .base import Collator, Task, need, pad, with_columns
from .classification import encode_texts


@dataclass(frozen=True)
class Regression(Task):
    """A number, learnt in units of the training data's spread: (y - mean) / deviation. Scores: errors, R^2,
    correlations."""

    mean: float = 0.0
    deviation: float = 1.0

    name = "regression"
    auto = "AutoModelForSequenceClassification"
    best = "mean_squared_error"
    larger = False

    def config(self) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": "regression"}

    def encode(self, rows: Dataset, processor: Any, *, labelled: bool = True, training: bool = False) -> Dataset:
        columns = encode_texts(self, rows, processor)
        if labelled:
            targets = numbers(rows, str(self.columns.label))
            columns["labels"] = [(y - self.mean) / self.deviation for y in targets]
        return with_columns(columns)

    def collator(self, processor: Any, model: Any) -> Collator:
        return lambda rows: pad(processor, rows, labels="one")

    def items(self, labels: Tensor) -> Tensor:
        return torch.tensor(labels.numel(), device=labels.device)

    def metrics(self, kept: Any, labels: Any) -> dict[str, float]:
        return metrics.regression(self._unscaled(kept), self._unscaled(labels))

    def decode(self, logits: Any, rows: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
        return [{"value": float(y)} for y in self._unscaled(torch.as_tensor(logits).float().numpy())]

    def _unscaled(self, values: Any) -> Any:
        return np.asarray(values, dtype=np.float64).reshape(-1) * self.deviation + self.mean


def numbers(rows: Dataset, column: str) -> list[float]:
    """A column of numbers. GraftError at the first that is none."""
    need(rows, column)
    out = []
    for number, text in enumerate(label_texts(rows, column, "the rows"), 1):
        value = as_number(text)
        if value is None:
            raise GraftError(
                f"numbers in the column {column!r}",
                f"row {number} holds {text!r}",
                "name a column of numbers with --label",
            )
        out.append(value)
    return out


def spread(rows: Dataset, column: str) -> tuple[float, float]:
    """Mean and standard deviation of the training targets. GraftError where all are equal."""
    values = np.asarray(numbers(rows, column))
    if np.ptp(values) == 0:
        raise GraftError(
            f"numbers that differ in the column {column!r}",
            f"{values[0]} in all {len(values)} rows",
            "name another column",
        )
    return float(values.mean()), float(values.std())
