"""Keys and values in front of those of an attention: what all prefixes do with what they have produced."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graftwork.core.attention import Attention
from graftwork.core.delta import Delta
from graftwork.products.dropout import drop


class Front(Delta):
    """A delta that puts P_K in front of the keys and P_V in front of the values. A subclass says what they are."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.gate: nn.Module | None = None

    def produced(self) -> tuple[Tensor, Tensor]:
        """P_K [length, d_k] and P_V [length, d_v]."""
        raise NotImplementedError

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, attention: Attention) -> Tensor:
        keys, values = (self.in_front(p, t) for p, t in zip(self.produced(), (k, v), strict=True))
        if self.gate is not None:
            g = self.gate(attention.input, self.runtime)[..., None].to(keys.dtype)  # [batch, 1, 1, 1]
            keys, values = g * keys, g * values
        out = attention(q, torch.cat([keys, k], 2), torch.cat([values, v], 2), mask)
        rows = self.context("prefix_rows")
        if rows is None:
            return out
        # hidden rows take the backbone's own attention, so that they are its result to the bit
        return torch.where(rows.to(q.device)[:, None, None, None], out, attention(q, k, v, mask))

    def in_front(self, p: Tensor, t: Tensor) -> Tensor:
        """p [length, heads d_head] as keys or values [batch, heads, length, d_head] beside t."""
        batch, heads, _, d_head = t.shape
        p = p.to(t.dtype).view(1, p.shape[0], -1, d_head).transpose(1, 2)
        if p.shape[1] != heads:  # this module repeats grouped heads before its attention call
            p = p.repeat_interleave(heads // p.shape[1], 1)
        p = p.expand(batch, -1, -1, -1)
        return drop(p, self.dropout, self.training)  # a mask of its own for every row
