"""The deltas of experts of different kinds: what each adds, times its weight for the token (see `moa`)."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from graftwork.core.attention import Attention
from graftwork.core.delta import Delta, WeightDelta
from graftwork.core.errors import GraftError
from graftwork.core.plan import Host
from graftwork.core.site import Site

from .block_router import Share


class RoutedWeight(WeightDelta):
    """y + w_e (W' - W) x.  delta: the expert."""

    def __init__(self, delta: WeightDelta, share: Share, site: Site) -> None:
        super().__init__()
        self.delta, self.share = delta, share
        self.place(site.key, site.weight)

    def inner(self) -> list[WeightDelta]:
        return [self.delta]

    @property
    def additive(self) -> bool:  # type: ignore[override]
        return self.delta.additive

    def names(self) -> tuple[str, ...]:
        return self.delta.names()

    def adapted(self, name: str, stored: Tensor | None) -> Tensor | None:
        do = "activate it without other adapters that rewrite this weight, on a layer that is called itself"
        raise GraftError(f"the adapted {name!r} at {self.key}", "a routed expert has another one for each token", do)

    def linear(self, x: Tensor, base: Callable[[Tensor], Tensor], host: Host) -> Tensor:
        def change(x: Tensor, y: Tensor) -> Tensor:
            factors = self.delta.factors() if self.delta.overrides("factors") else None
            if factors is None:
                return self.delta.linear(x, lambda given: y.clone() if given is x else base(given), host) - y
            seen = F.dropout(x, self.delta.dropout, self.training) if self.delta.dropout else x
            return F.linear(F.linear(seen, factors[0]), factors[1])

        return self.share.added(self.runtime, x, base(x), change)

    def auxiliary_loss(self) -> Tensor | None:
        return self.delta.auxiliary_loss()

    def overrides(self, function: str) -> bool:
        return function == "linear"


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
            q_: Tensor, k_: Tensor, v_: Tensor, mask_: Tensor | None, extra: int, rows: Tensor | None = None
        ) -> Tensor:
            return own if (q_ is q and k_ is k and v_ is v and mask_ is mask) else attention(q_, k_, v_, mask_)

        seen = Attention(attention.module, known, attention.scaling, attention.groups, attention.keys)
        w = self.share.of(self.runtime)[:, None].to(own.dtype)  # [batch, 1, queries, 1]
        return own + w * (self.delta.attend(q, k, v, mask, seen) - own)

    def auxiliary_loss(self) -> Tensor | None:
        return self.delta.auxiliary_loss()
