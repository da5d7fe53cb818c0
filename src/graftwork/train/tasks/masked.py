"""Hidden tokens from their surroundings: masked language modelling."""

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
from ..metrics import IGNORED
from .base import Task, first, length, pad, texts, with_columns
from .causal import kept_tokens

SHARE, KEPT, RANDOM = (
    0.15,
    0.1,
    0.1,
)  # Devlin et al. 2019, section 3.1: 15% chosen, of these 80% masked, 10% random, 10% kept


@dataclass(frozen=True)
class Masked(Task):
    """15% of the tokens are hidden. Training hides others in every epoch; an evaluation always hides the same ones."""

    name = "masked"
    auto = "AutoModelForMaskedLM"
    best = "perplexity"
    larger = False

    def encode(self, rows: Dataset, processor: Any, *, labelled: bool = True, training: bool = False) -> Dataset:
        if processor.mask_token_id is None:
            raise GraftError(
                "hidden tokens",
                "a tokenizer without a mask token",
                "choose a backbone trained with masks, or --task causal",
            )
        limit = length(self, processor)
        # a text longer than the limit becomes several rows, so that nothing is lost
        encoded = processor(
            texts(rows, self.columns.text),
            truncation=True,
            max_length=limit,
            return_overflowing_tokens=bool(getattr(processor, "is_fast", False)),
            return_special_tokens_mask=True,
        )
        columns = {k: list(v) for k, v in encoded.items() if k != "overflow_to_sample_mapping"}
        columns["row"] = list(range(len(columns["input_ids"])))
        columns["fixed"] = [not training] * len(columns["row"])
        return with_columns(columns)

    def collator(self, processor: Any, model: Any) -> Masking:
        return Masking(processor, self.seed)

    def shrink(self, logits: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        return kept_tokens(first(logits), labels)

    def metrics(self, kept: Any, labels: Any) -> dict[str, float]:
        predicted, nll = kept
        scores = metrics.language(predicted, nll, labels)
        return {"perplexity": scores["perplexity"], "token_accuracy": scores["token_accuracy"]}

    def decode(self, logits: Any, rows: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
        raise NotImplementedError("masks are filled with the tokenizer: see `graftwork.train.trained`")


class Masking:
    """Hides tokens of a batch. What is hidden depends on the seed, the row and the epoch alone, never on the
    global generator, so that a resumed run hides what an uninterrupted one does."""

    def __init__(self, processor: Any, seed: int) -> None:
        self.processor, self.seed, self.epoch = processor, seed, 0

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = pad(
            self.processor,
            [{k: v for k, v in row.items() if k not in ("row", "fixed", "special_tokens_mask")} for row in rows],
        )
        labels = torch.full_like(batch["input_ids"], IGNORED)
        left = getattr(self.processor, "padding_side", "right") == "left"
        for i, row in enumerate(rows):
            ids = torch.tensor(row["input_ids"])
            start = batch["input_ids"].shape[1] - len(ids) if left else 0
            here = slice(start, start + len(ids))
            hidden, masked = self._hide(
                ids, torch.tensor(row["special_tokens_mask"], dtype=torch.bool), row["row"], row["fixed"]
            )
            batch["input_ids"][i, here] = masked
            labels[i, here] = torch.where(hidden, ids, IGNORED)
        return {**batch, "labels": labels}

    def _hide(self, ids: Tensor, special: Tensor, row: int, fixed: bool) -> tuple[Tensor, Tensor]:
        """Which tokens [length] are hidden, and the tokens with them hidden. At least one is, where there is an
        ordinary token."""
        draw = np.random.SeedSequence((self.seed, row, 0 if fixed else self.epoch + 1)).generate_state(1, np.uint32)
        generator = torch.Generator().manual_seed(int(draw[0]))
        dice = torch.rand(len(ids), generator=generator).masked_fill(special, 2.0)
        hidden = dice < SHARE
        if not hidden.any() and not special.all():
            hidden[dice.argmin()] = True
        kind = torch.rand(len(ids), generator=generator)
        words = torch.randint(len(self.processor), (len(ids),), generator=generator)
        masked = torch.where(kind < KEPT, ids, torch.where(kind < KEPT + RANDOM, words, self.processor.mask_token_id))
        return hidden, torch.where(hidden, masked, ids)
