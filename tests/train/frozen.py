"""What a training beside graftwork must leave alone: every parameter but those of the adapter."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn

from graftwork.core.adapter import Adapter


def rows(count: int, length: int = 12) -> list[list[int]]:
    """Token ids that follow one rule, so that a few steps learn it: each is the one before plus three."""
    draw = random.Random(0)
    starts = [draw.randrange(40) for _ in range(count)]
    return [[3 + (start + 3 * i) % 40 for i in range(length)] for start in starts]


def snapshot(model: nn.Module, adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The values of the backbone and of the adapter."""
    own = {id(p) for p in adapter.parameters()}
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if id(p) not in own}
    return frozen, {str(i): p.detach().clone() for i, p in enumerate(adapter.parameters())}


def unchanged(model: nn.Module, adapter: Adapter, before: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
    """The backbone is as it was to the bit, and every parameter of the adapter has moved."""
    frozen, trained = snapshot(model, adapter)
    assert frozen.keys() == before[0].keys()
    assert all(torch.equal(value, before[0][name]) for name, value in frozen.items())
    assert not any(torch.equal(value, before[1][name]) for name, value in trained.items())
