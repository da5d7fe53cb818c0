"""A longer sequence: rows put into every row of a batch at a place of its own, and taken out again."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from graftwork.core.delta import Delta
from graftwork.core.errors import GraftError


def first_real(mask: Tensor | None, batch: int, device: torch.device) -> Tensor:
    """Position of the first real token of each row [batch, 1], from the padding mask [batch, seq]."""
    if mask is None:
        return torch.zeros(batch, 1, dtype=torch.long, device=device)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise GraftError(
            "a longer sequence", f"an attention mask of {shape}", "give a padding mask [batch, seq] (no static cache)"
        )
    return (mask != 0).long().argmax(1, keepdim=True)


def filler(module: nn.Module) -> int:
    """An id without a meaning of its own (padding, image tokens), to stand where embeddings are replaced."""
    config = getattr(module, "config", None)
    special = (
        {v for k, v in vars(config).items() if k.endswith(("token_id", "token_index"))} if config is not None else set()
    )
    return next(i for i in range(len(special) + 1) if i not in special)


def insert(t: Tensor, at: Tensor, new: Tensor) -> Tensor:
    """t [batch, n, ...] with new [batch, p, ...] before position at [batch, 1] of its row: [batch, n + p, ...]."""
    p = new.shape[1]
    place = torch.arange(t.shape[1] + p, device=t.device)
    source = torch.where(place < at, place + p, torch.where(place < at + p, place - at, place))
    return torch.take_along_dim(torch.cat([new.to(t.dtype), t], 1), source.view(*source.shape, *[1] * (t.dim() - 2)), 1)


def cut(t: Tensor, at: Tensor, p: int) -> Tensor:
    """`insert` undone: t [batch, n + p, d] without the p positions from `at` on."""
    place = torch.arange(t.shape[1] - p, device=t.device)
    return torch.take_along_dim(t, (place + p * (place >= at))[..., None], 1)


def shifted(positions: Tensor, at: Tensor, p: int) -> Tensor:
    """Position ids [batch, n] for the longer sequence: the new ones count up from their place, later tokens follow."""
    if positions.dim() != 2:
        raise GraftError(
            "a longer sequence", f"position ids of shape {list(positions.shape)}", "give position ids [batch, seq]"
        )
    positions = positions.expand(at.shape[0], -1)
    first = positions.gather(1, at.clamp(max=positions.shape[1] - 1))
    later = positions + p * (torch.arange(positions.shape[1], device=at.device) >= at)
    return insert(later, at, first + torch.arange(p, device=at.device))


def shortened(out: Any, at: Tensor, p: int, pooler: Callable[[Tensor], Tensor] | None) -> Any:
    """A module's output with the p positions taken out of its hidden states; what is pooled is pooled again."""
    total = (out if isinstance(out, Tensor) else out[0]).shape[1]

    def shorter(value: Any) -> Any:
        if isinstance(value, Tensor):
            return cut(value, at, p) if value.dim() == 3 and value.shape[1] == total else value
        if type(value) is tuple and value and all(isinstance(v, Tensor) for v in value):
            return tuple(shorter(v) for v in value)
        return value

    if isinstance(out, Tensor):
        return shorter(out)
    if hasattr(out, "keys"):  # a transformers ModelOutput
        for key in list(out.keys()):
            out[key] = shorter(out[key])
        if pooler is not None and out.get("pooler_output") is not None:
            out["pooler_output"] = pooler(out[0])
        return out
    values = [shorter(value) for value in out]
    if pooler is not None and len(values) > 1 and isinstance(values[1], Tensor) and values[1].dim() == 2:
        values[1] = pooler(values[0])
    return tuple(values)


class CrossMask(Delta):
    """No parameters: a decoder's mask over the encoder's states gets the positions of the prompt in the encoder."""

    def __init__(self, length: int, behind: int, decoder: nn.Module) -> None:
        super().__init__()
        self.length, self.behind = length, behind
        self.names = list(inspect.signature(decoder.forward).parameters)

    def around(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self.names, args, strict=False)) | kwargs
        states, mask = given.get("encoder_hidden_states"), given.get("encoder_attention_mask")
        if states is not None and mask is not None and states.shape[1] >= mask.shape[1] + self.length:
            at = first_real(mask, mask.shape[0], mask.device) + self.behind
            given["encoder_attention_mask"] = insert(mask, at, mask.new_ones(mask.shape[0], self.length))
        return base(**given)
