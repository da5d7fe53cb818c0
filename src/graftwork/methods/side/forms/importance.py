"""How much each number of a backbone matters to a task: its Fisher information."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from graftwork.core.adapter import Adapter

from .pruning import CHOSEN, Importance, prune


def fisher(model: nn.Module, batches: Iterable[Any], loss: Callable[[nn.Module, Any], Tensor]) -> dict[str, Tensor]:
    """Empirical Fisher information: the mean over batches of every squared gradient. Run it before grafting."""
    total: dict[str, Tensor] = {}
    frozen = [p for p in model.parameters() if not p.requires_grad]
    seen = 0
    try:
        for p in frozen:
            p.requires_grad_(True)
        for seen, batch in enumerate(batches, 1):  # noqa: B007
            model.zero_grad(set_to_none=True)
            loss(model, batch).backward()
            for name, p in model.named_parameters():
                if p.grad is not None:
                    total[name] = total.get(name, torch.zeros_like(p)) + p.grad.square()
    finally:
        model.zero_grad(set_to_none=True)
        for p in frozen:
            p.requires_grad_(False)
    return {name: value / seen for name, value in total.items()}


def reprune(adapter: Adapter, importance: Importance) -> None:
    """Start all side blocks of an adapter again from the backbone, by this importance (of `fisher`)."""
    for part in adapter.parts:
        if part.method.name == "ladder":
            CHOSEN.pop(part, None)
            for site in part.sites:
                delta: Any = part.deltas[site.key]
                if getattr(delta, "side", None) is not None:
                    prune(delta.side, site, part, importance)
