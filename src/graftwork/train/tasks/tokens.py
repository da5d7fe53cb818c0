"""A tag for each word: named entities, parts of speech."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from ...core.errors import GraftError, nearest
from .. import metrics
from ..columns import ordered, tag_texts
from ..metrics import IGNORED
from .base import Collator, Task, length, need, pad, with_columns


@dataclass(frozen=True)
class Tokens(Task):
    """One tag per word, learnt at the word's first token. Scores: accuracy over words, F1 (of entities for B-/I-
    tags)."""

    name = "tokens"
    auto = "AutoModelForTokenClassification"
    best = "f1"

    def encode(self, rows: Dataset, processor: Any, *, labelled: bool = True, training: bool = False) -> Dataset:
        if not getattr(processor, "is_fast", False):
            raise GraftError(
                "tags for words",
                "a tokenizer that does not know where words begin",
                "use a backbone with a fast tokenizer",
            )
        words = word_lists(rows, self.columns.text)
        encoded = processor(words, is_split_into_words=True, truncation=True, max_length=length(self, processor))
        columns = dict(encoded)
        starts = [_starts(encoded.word_ids(i)) for i in range(len(words))]
        if labelled:
            tags = self._tag_ids(rows, words)
            columns["labels"] = [
                [IGNORED if w is None else row[w] for w in start] for start, row in zip(starts, tags, strict=True)
            ]
        return with_columns(columns)

    def _tag_ids(self, rows: Dataset, words: list[list[str]]) -> list[list[int]]:
        index = {tag: i for i, tag in enumerate(self.labels)}
        need(rows, str(self.columns.label))
        tags = tag_texts(rows, str(self.columns.label))
        for number, (row, row_words) in enumerate(zip(tags, words, strict=True), 1):
            if len(row) != len(row_words):
                raise GraftError(
                    "a tag for every word", f"row {number}: {len(row_words)} words, {len(row)} tags", "repair the row"
                )
            if unseen := [tag for tag in row if tag not in index]:
                raise GraftError(
                    f"tags among {', '.join(self.labels)}",
                    f"{unseen[0]!r} in row {number}{nearest(unseen[0], self.labels)}, unseen in training",
                    "give rows with the tags of the training data",
                )
        return [[index[tag] for tag in row] for row in tags]

    def collator(self, processor: Any, model: Any) -> Collator:
        return lambda rows: pad(processor, rows, labels="token")

    def shrink(self, logits: Any, labels: Any) -> Any:
        return super().shrink(logits, labels).argmax(-1)

    def metrics(self, kept: Any, labels: Any) -> dict[str, float]:
        kept, counted = np.asarray(kept), np.asarray(labels) != IGNORED
        predicted = [[self.labels[i] for i in row[mask]] for row, mask in zip(kept, counted, strict=True)]
        true = [[self.labels[i] for i in row[mask]] for row, mask in zip(labels, counted, strict=True)]
        return metrics.tagging(predicted, true)

    def decode(self, logits: Any, rows: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
        raise NotImplementedError("tags are decoded with the tokenizer: see `tag_words`")

    def tag_words(self, logits: Any, encoding: Any, words: list[list[str]]) -> list[dict[str, Any]]:
        """The tag of each word of each row; words beyond max_length have none."""
        chosen = torch.as_tensor(logits).argmax(-1)
        out = []
        for i, row in enumerate(words):
            tags: list[str | None] = [None] * len(row)
            for position, word in enumerate(_starts(encoding.word_ids(i))):
                if word is not None:
                    tags[word] = self.labels[int(chosen[i, position])]
            out.append({"words": row, "tags": tags})
        return out


def _starts(word_ids: Sequence[int | None]) -> list[int | None]:
    """At the first token of each word its index, None elsewhere."""
    return [w if w is not None and (i == 0 or word_ids[i - 1] != w) else None for i, w in enumerate(word_ids)]


def word_lists(rows: Dataset, column: str) -> list[list[str]]:
    """The words of each row; a text is split at spaces."""
    need(rows, column)
    return [row.split() if isinstance(row, str) else [str(w) for w in row] for row in rows[column]]


def tags_of(rows: Dataset, column: str) -> tuple[str, ...]:
    """The tags of the training rows. GraftError where there is only one."""
    found = ordered([tag for row in tag_texts(rows, column) for tag in row])
    if len(found) < 2:
        raise GraftError(
            f"at least two tags in the column {column!r}",
            f"{', '.join(found) or 'none'}",
            "name another column with --label",
        )
    return tuple(found)
