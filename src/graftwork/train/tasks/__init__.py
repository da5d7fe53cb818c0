"""The tasks: one file each. Here is only which task a data set and a backbone call for, and how a task is stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from datasets import Dataset

from ...core.errors import GraftError, nearest
from .. import columns
from ..columns import Columns, as_number, label_texts
from ..settings import TrainSettings
from .base import Task, need
from .causal import Causal
from .classification import Classification, classes
from .image import ImageClassification
from .masked import Masked
from .regression import Regression, spread
from .seq2seq import Seq2Seq
from .tokens import Tokens, tags_of

TASKS: dict[str, type[Task]] = {
    t.name: t for t in (Classification, Regression, Tokens, Causal, Seq2Seq, Masked, ImageClassification)
}
MANY = 100  # more distinct whole numbers than this are a quantity, not classes

__all__ = ["TASKS", "Task", "from_json", "plan"]


def plan(settings: TrainSettings, rows: Dataset, config: Any) -> Task:
    """The task for these training rows and this backbone's config. GraftError where the rows do not suit it."""
    own = settings.data.task_column
    if own is not None:
        need(rows, own)
        rows = rows.remove_columns([own])  # it is neither text nor label
    found = columns.find(rows, settings.data, settings.task)
    name = settings.task if settings.task != "auto" else _guess(found, rows, config)
    if name in ("classification", "regression") and found.kind != "texts":
        found = columns.find(rows, settings.data, name)
    found = dataclasses.replace(found, task=own)
    common: dict[str, Any] = {"columns": found, "max_length": settings.data.max_length or 0, "seed": settings.fit.seed}
    if name == "classification":
        return Classification(labels=classes(rows, str(found.label)), **common)
    if name == "image":
        return ImageClassification(labels=classes(rows, str(found.label)), **common)
    if name == "regression":
        mean, deviation = spread(rows, str(found.label))
        return Regression(mean=mean, deviation=deviation, **common)
    if name == "tokens":
        return Tokens(labels=tags_of(rows, str(found.label)), **common)
    return TASKS[name](**common)


def _guess(found: Columns, rows: Dataset, config: Any) -> str:
    """The task that the columns mean; plain texts leave it to the backbone."""
    if found.kind == "texts":
        return (
            "regression" if _is_quantity(label_texts(rows, str(found.label), "the training data")) else "classification"
        )
    if found.kind in ("tokens", "image"):
        return found.kind
    if found.kind == "source" and getattr(config, "is_encoder_decoder", False):
        return "seq2seq"
    if found.kind == "plain" and any(
        name.endswith("ForMaskedLM") for name in getattr(config, "architectures", None) or ()
    ):
        return "masked"
    if found.kind == "plain" and not any("LM" in name for name in getattr(config, "architectures", None) or ()):
        raise GraftError(
            "guess the task",
            f"the text column {found.text!r}, no label, and a backbone that is no language model",
            "name the label with --label, or the task with --task",
        )
    return "causal"


def _is_quantity(labels: list[str]) -> bool:
    """Whether labels are measurements: numbers, of which some are not whole or very many differ."""
    values = [as_number(x) for x in labels]
    known = [v for v in values if v is not None]
    return len(known) == len(values) and (any(not v.is_integer() for v in known) or len(set(known)) > MANY)


def from_json(data: Mapping[str, Any]) -> Task:
    """The task that `Task.to_json` wrote."""
    name = data.get("task")
    if name not in TASKS:
        raise GraftError("the adapter's task", f"{name!r}{nearest(str(name), TASKS)}", f"known are {', '.join(TASKS)}")
    known = {f.name for f in dataclasses.fields(TASKS[name])}
    given = {k: v for k, v in data.items() if k in known}
    given["columns"] = Columns(**given["columns"])
    given["labels"] = tuple(given["labels"])
    return TASKS[name](**given)
