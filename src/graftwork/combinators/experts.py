"""The deltas of experts of different kinds: what each adds, times its weight for the token (see `moa`)."""

from __future__ import annotations

from torch import Tensor

from graftwork.core.attention import Attention
from graftwork.core.delta import Delta
from graftwork.core.masks import Tokens

from .block_router import Share


class RoutedOutput(Delta):
    """y + w_e (f(x, y) - y).  delta: the expert."""

    def __init__(self, delta: Delta, share: Share) -> None:
        super().__init__()
        self.delta, self.share = delta, share
        self.source, self.reading, self.itself = delta.source, delta.reading, delta.itself

    def inner(self) -> list[Delta]:
        return [self.delta]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.share.added(self.runtime, x, y, lambda x, y: self.delta(x, y) - y)

    def auxiliary_loss(self) -> Tensor | None:
        return self.delta.auxiliary_loss()


class RoutedAttention(Delta):
    """o + w_e (f(q, k, v) - o), o the attention of the block.  delta: the expert."""

    def __init__(self, delta: Delta, share: Share) -> None:
        super().__init__()
        self.delta, self.share = delta, share

    def inner(self) -> list[Delta]:
        return [self.delta]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, attention: Attention) -> Tensor:
        own = attention(q, k, v, mask)

        def known(
            q_: Tensor, k_: Tensor, v_: Tensor, mask_: Tensor | None, extra: int, part: Tensor | Tokens | None = None
        ) -> Tensor:
            if part is None and q_ is q and k_ is k and v_ is v and mask_ is mask:
                return own
            return (attention if part is None else attention.on(part))(q_, k_, v_, mask_)

        seen = attention.through(known)
        w = self.share.of(self.runtime)[:, None].to(own.dtype)  # [batch, 1, queries, 1]
        return own + w * (self.delta.attend(q, k, v, mask, seen) - own)

    def auxiliary_loss(self) -> Tensor | None:
        return self.delta.auxiliary_loss()
