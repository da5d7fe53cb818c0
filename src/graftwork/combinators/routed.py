"""The deltas of a mixture: the experts' effects weighted by the router (see `mixture`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftwork.core.delta import Delta, WeightDelta
from graftwork.core.plan import Host
from graftwork.core.site import Site
from graftwork.core.swap import functional
from graftwork.core.unreadable import CALLED, unreadable
from graftwork.products.dropout import drop

from .router import Router, are_vectors, merged, reads_input

if TYPE_CHECKING:
    from .mixture import Mixture


class MixedWeight(WeightDelta):
    """experts: the weight deltas;  router: W_g."""

    def __init__(self, method: Mixture, site: Site, experts: Sequence[WeightDelta | Delta]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.router = Router(method, site)
        self.by_output = method.router == "head" and site.role in ("q", "k", "v")
        self.vectors = are_vectors(self.experts[0])  # type: ignore[arg-type]
        self.place(site.key, site.weight)

    def inner(self) -> list[WeightDelta]:
        return list(self.experts)  # type: ignore[arg-type]

    @property
    def additive(self) -> bool:  # type: ignore[override]
        return not self.by_output and self.inner()[0].additive

    def names(self) -> tuple[str, ...]:
        return self.inner()[0].names()

    def adapted(self, name: str, stored: Tensor | None) -> Tensor | None:
        return unreadable(name, stored, self.key, "token", CALLED)

    def linear(self, x: Tensor, base: Callable[[Tensor], Tensor], host: Host) -> Tensor:
        first = self.inner()[0]
        y = base(x) if self.by_output else None
        p = self.router(x if y is None else y)
        if self.vectors:
            below = base if y is None else _once(x, y, base)
            return functional(first, merged(self.inner(), self.router, p), "linear", x, below, host)
        factors = [e.factors() if e.overrides("factors") else None for e in self.inner()]
        if factors[0] is not None and self.router.heads == 1:
            return self.thin(x, base(x) if y is None else y, p, [f for f in factors if f is not None])
        y = base(x) if y is None else y
        total = y.clone()
        for i, expert in enumerate(self.inner()):
            effect = expert.linear(x, _once(x, y.clone(), base), host) - y
            total = total + _weighted(p[..., i], effect, self.router.heads)
        return total

    def thin(self, x: Tensor, y: Tensor, p: Tensor, factors: list[tuple[Tensor, Tensor]]) -> Tensor:
        """y + sum_e p_e B_e A_e x: [.., experts r] between two products."""
        dropout = getattr(self.experts[0], "dropout", 0.0)
        x = drop(x, dropout, self.training)
        down, up = torch.cat([a for a, _ in factors]), torch.cat([b for _, b in factors], dim=1)
        gate = p.repeat_interleave(factors[0][0].shape[0], dim=-1)
        return y + F.linear(F.linear(x, down) * gate, up)

    def auxiliary_loss(self) -> Tensor | None:
        return self.router.loss

    def overrides(self, function: str) -> bool:
        return function == "linear"


def _weighted(p: Tensor, effect: Tensor, heads: int) -> Tensor:
    """p times an effect [.., d]; p is [.., heads] where there are several."""
    if heads == 1:
        return p[..., None] * effect
    return (p[..., None] * effect.unflatten(-1, (heads, -1))).flatten(-2)


def _once(x: Tensor, y: Tensor, base: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The base, whose product with x is known."""
    return lambda given: y if given is x else base(given)


class MixedActivation(Delta):
    """experts: the deltas that edit the output;  router: W_g."""

    def __init__(self, method: Mixture, site: Site, experts: Sequence[Delta]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.router = Router(method, site)
        self.reading = experts[0].reading
        self.source = experts[0].source
        self.by_input = method.router == "input" or (reads_input(site) and self.router.heads == 1)
        self.vectors = are_vectors(experts[0])

    def inner(self) -> list[Delta]:
        return list(self.experts)  # type: ignore[arg-type]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        p = self.router(x if self.by_input else y)
        if self.vectors:
            return functional(self.inner()[0], merged(self.inner(), self.router, p), "forward", x, y)
        out = y
        for i, expert in enumerate(self.inner()):
            out = out + _weighted(p[..., i], expert(x, y) - y, self.router.heads)
        return out

    def auxiliary_loss(self) -> Tensor | None:
        return self.router.loss
