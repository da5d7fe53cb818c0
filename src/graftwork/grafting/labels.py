"""The class names of the active adapter's own head, shown to a transformers model, whose loss reads their number from its config."""

from __future__ import annotations

from typing import Any

from torch import nn

from . import install


def common(labels: list[tuple[str, ...]], rows: bool) -> tuple[str, ...] | None:
    """The labels to show: those of the first active head, or, where rows have others each, as many without a meaning."""
    if rows and len(set(labels)) > 1:
        return tuple(f"LABEL_{i}" for i in range(len(labels[0])))
    return labels[0] if labels else None


def apply(model: nn.Module, labels: tuple[str, ...] | None) -> None:
    """Give the model's config the labels of the active adapter, or, with None, its own back."""
    config: Any = model.__dict__.get("config")
    if config is None or not hasattr(config, "id2label"):
        return
    root = install.root_of(model)
    if root.own_labels is None:
        if labels is None:
            return
        root.own_labels = (dict(config.id2label), dict(config.label2id), model.__dict__.get("num_labels"))
    id2label, label2id, number = root.own_labels
    if labels is not None:
        id2label, number = dict(enumerate(labels)), None if number is None else len(labels)
        label2id = {label: i for i, label in id2label.items()}
    else:
        root.own_labels = None
    config.id2label, config.label2id = id2label, label2id
    if number is not None:
        model.__dict__["num_labels"] = number
