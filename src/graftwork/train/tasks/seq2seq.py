"""A target text for a source text: translation, summaries, rewriting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from torch import Tensor

from .. import metrics
from ..metrics import IGNORED
from .base import Collator, Task, first, length, pad, padded, texts, with_columns
from .causal import kept_tokens


@dataclass(frozen=True)
class Seq2Seq(Task):
    """An encoder-decoder. Scores: perplexity, token accuracy, and the share of rows that greedy generation gets
    exactly right."""

    name = "seq2seq"
    auto = "AutoModelForSeq2SeqLM"
    best = "perplexity"
    larger = False

    def encode(self, rows: Dataset, processor: Any, *, labelled: bool = True, training: bool = False) -> Dataset:
        limit = length(self, processor)
        columns = dict(processor(texts(rows, self.columns.text), truncation=True, max_length=limit))
        if labelled:
            written = texts(rows, str(self.columns.label))
            columns["labels"] = processor(text_target=written, truncation=True, max_length=limit)["input_ids"]
        return with_columns(columns)

    def collator(self, processor: Any, model: Any) -> Collator:
        def batch(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
            out = pad(processor, rows)
            if "labels" in rows[0]:
                longest = max(len(row["labels"]) for row in rows)
                out["labels"] = padded([row["labels"] for row in rows], IGNORED, longest)
            return out

        return batch

    def shrink(self, logits: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        return kept_tokens(first(logits), labels)

    def metrics(self, kept: Any, labels: Any) -> dict[str, float]:
        predicted, nll = kept
        return metrics.language(predicted, nll, labels)

    def decode(self, logits: Any, rows: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
        raise NotImplementedError("an encoder-decoder answers by `model.generate`")
