"""What a weight delta alone adds to a linear layer's output, and a delta that takes that with a weight of each token or example."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from graftwork.core.delta import WeightDelta
from graftwork.core.passes import Runtime
from graftwork.core.plan import Host
from graftwork.core.site import Site
from graftwork.core.unreadable import CALLED, unreadable
from graftwork.products.dropout import drop


def change(delta: WeightDelta, x: Tensor, y: Tensor, base: Callable[[Tensor], Tensor], host: Host) -> Tensor:
    """(W' - W) x  [..., out], given y = base(x): two thin products where the update is low-rank."""
    factors = delta.factors() if delta.overrides("factors") else None
    if factors is None:
        return delta.linear(x, lambda given: y.clone() if given is x else base(given), host) - y
    seen = drop(x, delta.dropout, delta.training)
    return F.linear(F.linear(seen, factors[0]), factors[1])


class Weigher(Protocol):
    """Who knows w in this pass."""

    def added(self, runtime: Runtime, x: Tensor, y: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """y + w change(x, y)."""


class Weighed(WeightDelta):
    """y + w (W' - W) x.  delta: the one inside;  gate: who knows w, one for `each` token or example."""

    def __init__(self, delta: WeightDelta, gate: Weigher, site: Site, each: str) -> None:
        super().__init__()
        self.delta, self.gate, self.each = delta, gate, each
        self.place(site.key, site.weight)

    def inner(self) -> list[WeightDelta]:
        return [self.delta]

    @property
    def additive(self) -> bool:  # type: ignore[override]
        return self.delta.additive

    def names(self) -> tuple[str, ...]:
        return self.delta.names()

    def adapted(self, name: str, stored: Tensor | None) -> Tensor | None:
        return unreadable(name, stored, self.key, self.each, CALLED)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take stored tensors; the delta inside takes its own, in whatever form they are."""
        self.delta.restore({name[6:]: t for name, t in tensors.items() if name.startswith("delta.")})
        taken = {f"delta.{name}": t for name, t in self.delta.state_dict().items()}
        super().restore({name: t for name, t in tensors.items() if not name.startswith("delta.")} | taken)

    def linear(self, x: Tensor, base: Callable[[Tensor], Tensor], host: Host) -> Tensor:
        return self.gate.added(self.runtime, x, base(x), lambda x, y: change(self.delta, x, y, base, host))

    def auxiliary_loss(self) -> Tensor | None:
        return self.delta.auxiliary_loss()

    def overrides(self, function: str) -> bool:
        return function == "linear"
