"""What a weight delta alone adds to a linear layer's output, for combinators that take it with a weight of their own."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from graftwork.core.delta import WeightDelta
from graftwork.core.plan import Host


def change(delta: WeightDelta, x: Tensor, y: Tensor, base: Callable[[Tensor], Tensor], host: Host) -> Tensor:
    """(W' - W) x  [..., out], given y = base(x): two thin products where the update is low-rank."""
    factors = delta.factors() if delta.overrides("factors") else None
    if factors is None:
        return delta.linear(x, lambda given: y.clone() if given is x else base(given), host) - y
    seen = F.dropout(x, delta.dropout, delta.training) if delta.dropout else x
    return F.linear(F.linear(seen, factors[0]), factors[1])
