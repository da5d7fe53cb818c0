"""Which class an image belongs to."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from ...core.errors import GraftError
from .. import metrics
from .base import Collator, Task, need
from .classification import best_labels, label_ids


@dataclass(frozen=True)
class ImageClassification(Task):
    """One of the labels for an image. Scores: accuracy, macro F1, Matthews correlation."""

    name = "image"
    auto = "AutoModelForImageClassification"
    best = "accuracy"
    padded = False

    def encode(self, rows: Dataset, processor: Any, *, labelled: bool = True, training: bool = False) -> Dataset:
        """Images stay what they are (paths, bytes, grey values): pixels are made batch by batch."""
        need(rows, self.columns.text)
        features = rows.features
        kept = rows.select_columns([self.columns.text])
        if self.columns.text != "image":
            kept = kept.rename_column(self.columns.text, "image")
        if isinstance(features[self.columns.text], ImageFeature):
            kept = kept.cast(Features({"image": ImageFeature(decode=False)}))
        for row in (0, len(kept) - 1):  # a wrong column or a moved folder is said before training, not in it
            open_image(kept[row]["image"])
        return kept.add_column("labels", label_ids(self, rows)) if labelled else kept

    def collator(self, processor: Any, model: Any) -> Collator:
        def batch(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            images = [open_image(row["image"]) for row in rows]
            out = {"pixel_values": processor(images, return_tensors="pt")["pixel_values"]}
            if "labels" in rows[0]:
                out["labels"] = torch.tensor([row["labels"] for row in rows])
            return out

        return batch

    def metrics(self, kept: Any, labels: Any) -> dict[str, float]:
        return metrics.classification(np.argmax(kept, axis=-1), labels, len(self.labels))

    def decode(self, logits: Any, rows: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
        return best_labels(self, logits)


def open_image(value: Any) -> Image.Image:
    """An RGB image from a path, bytes, or grey or colour values 0 to 255 [height, width(, 3)]. GraftError where it
    is none."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    try:
        if isinstance(value, str):
            with Image.open(value) as image:
                return image.convert("RGB")
        if isinstance(value, bytes):
            return Image.open(io.BytesIO(value)).convert("RGB")
        return Image.fromarray(np.asarray(value, dtype=np.uint8)).convert("RGB")
    except (OSError, TypeError, ValueError) as error:
        raise GraftError(
            "an image", f"{str(value)[:80]!r}: {error}", "give paths of image files, or values 0 to 255"
        ) from error
