"""One more expert in a trained mixture of experts of different kinds (`moa_hetero`).

Cao et al. 2025, "MoA: Heterogeneous Mixture of Adapters for Parameter-Efficient Fine-Tuning of Large Language Models", arXiv 2506.05928.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..combinators.block_router import BlockRouter
from ..combinators.moa import MoA
from ..core.adapter import Adapter
from ..core.delta import Delta
from ..core.errors import GraftError
from ..core.method import Method
from .turned import Turn, turned


def add_expert(model: nn.Module, name: str, of: str, expert: Method, *, seed: int = 0) -> Adapter:
    """A new adapter, active and trainable, of the experts of the `moa_hetero` adapter `of`, and one more: every router gets one more row,
    drawn from `seed`, and all else stays as it is to the bit.

    `of` stays as it is. Other methods of the adapter (a head) come with copies of their values.
    Raises GraftError, with the model as it was, for sites that have an expert, and for a "swiglu" router, whose hidden layer would widen.
    """
    asked = f"add the expert {expert} to {of!r}"

    def more(method: MoA) -> Method:
        if method.router != "linear":
            found = f"router={method.router!r}, whose hidden layer is {method.mult} times as wide as there are experts"
            raise GraftError(asked, found, "give an adapter with a linear router")
        return replace(method, of=(*method.of, expert), at=f"{method.at}, {expert.at}")

    def values(old: Delta, new: Delta) -> dict[str, Tensor]:
        own = dict(old.state_dict())
        if isinstance(old, BlockRouter) and isinstance(new, BlockRouter):
            own |= {n: torch.cat([own[n], getattr(new, n)[-1:]]) for n in ("weight", "bias")}
        return own

    return turned(model, name, of, asked, Turn(MoA, "experts", more, values), seed)
