"""Sums of what adapters change at one place, as deltas: a plan holds them like any other.

Each is the backbone's value z and sum_i c_i (f_i(z) - z), f_i being the deltas of one adapter at this place, one after the other.
They belong to an activation and own no parameter: those of their members stay where they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.attention import Attention, chain
from ..core.delta import Delta, WeightDelta
from ..core.errors import GraftError
from ..core.kept import Keeper
from ..core.plan import Host, reading
from ..core.site import Site
from ..products.lowrank import low_rank


@dataclass(frozen=True)
class Term:
    """c and the deltas of one adapter at one place, with their sites, in order."""

    c: float
    pieces: tuple[tuple[Site, Delta], ...]

    @property
    def deltas(self) -> list[Delta]:
        return [delta for _, delta in self.pieces]


class LowRankSum(WeightDelta):
    """W' = W + [c_1 B_1, ..., c_n B_n] [A_1; ...; A_n]: low-rank updates as one of their ranks together, the factors folded in."""

    def __init__(self, members: Sequence[tuple[float, WeightDelta]]) -> None:
        super().__init__()
        self.factor = [c for c, _ in members]
        self.members = nn.ModuleList(delta for _, delta in members)
        self.lasting = all(delta.lasting for _, delta in members)
        self.dropout = members[0][1].dropout
        self._kept: Keeper[tuple[Tensor, Tensor]] = Keeper(m for source in self.sources() for m in source.modules())

    def factors(self) -> tuple[Tensor, Tensor]:
        if (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or not (self.lasting and self.runtime.keeps_weights)
        ):
            return self._factors()
        return self._kept.get("", self._factors)

    def _factors(self) -> tuple[Tensor, Tensor]:
        pairs = [member.factors() for member in self.members]  # type: ignore[operator]
        downs, ups = [down for down, _ in pairs], [c * up for c, (_, up) in zip(self.factor, pairs, strict=True)]
        return (downs[0], ups[0]) if len(ups) == 1 else (torch.cat(downs, -2), torch.cat(ups, -1))

    def linear(self, x: Tensor, base: Callable[[Tensor], Tensor], host: Host) -> Tensor:
        down, up = self.factors()
        return low_rank(x, base, host, down, up, 1.0, self.dropout if self.members[0].training else 0.0)

    def sources(self) -> Iterator[nn.Module]:
        for member in self.members:
            yield from member.sources()  # type: ignore[operator]


class WeightSum(WeightDelta):
    """P' = P + sum_i c_i (P'_i - P) for each parameter P of the host; P'_i is the backbone's P under the i-th adapter alone.

    A parameter of another shape than the backbone's (a head of its own size) has a sum only where the c add up to 1: then P cancels.
    """

    def __init__(self, terms: Sequence[Term], module: nn.Module) -> None:
        super().__init__()
        chains: list[list[WeightDelta]] = [term.deltas for term in terms]  # type: ignore[misc]
        distinct = list(dict.fromkeys(d for deltas in chains for d in deltas))
        self.members = nn.ModuleList(distinct)
        self.additive, self.lasting = all(d.additive for d in distinct), all(d.lasting for d in distinct)
        view = distinct[0].view
        alike = all((d.view.name, d.view.rows) == (view.name, view.rows) for d in distinct)
        self.thin = [
            (term.c, deltas[0])
            for term, deltas in zip(terms, chains, strict=True)
            if alike and view.linear and len(deltas) == 1 and deltas[0].overrides("linear")
        ]
        thick = [term for term in terms if not any(term.deltas == [delta] for _, delta in self.thin)]
        self.rest = WeightSum(thick, module) if thick and self.thin else None  # what is added up as weights
        self.host = Host(module, view, first=False)  # the members get the backbone's product: they make none
        self.by_name: dict[str, list[tuple[float, list[WeightDelta]]]] = {}
        for term, deltas in zip(terms, chains, strict=True):
            for name in dict.fromkeys(name for d in deltas for name in d.names()):
                self.by_name.setdefault(name, []).append((term.c, [d for d in deltas if name in d.names()]))

    def names(self) -> tuple[str, ...]:
        return tuple(self.by_name)

    @torch.no_grad()
    def check(self) -> None:
        """GraftError where values of different shapes have no sum."""
        if self.rest is not None:
            self.rest.check()
        for name, chains in () if self.thin else self.by_name.items():
            if any(type(d).adapted is not WeightDelta.adapted for _, chain in chains for d in chain):
                self.adapted(name, self.host.module._parameters[name])

    def adapted(self, name: str, stored: Tensor | None) -> Tensor | None:
        if name == self.view.name and stored is not None:
            stored = self.view.decoded(stored)
        total, rest, other = stored, 1.0, None
        for c, deltas in self.by_name[name]:
            value = stored
            for delta in deltas:
                value = delta.adapted(name, value)
            if value is None:
                continue
            rest -= c
            if stored is not None and value.shape != stored.shape:
                other = c * value if other is None else self._together(name, other, value, c)
            elif total is None:  # the host has no such bias: it counts as zero
                total = c * value
            else:
                total = total + c * (value if stored is None else value - stored)
        if other is None:
            return total
        if total is not stored or abs(rest) > 1e-6:
            assert stored is not None
            raise self._misshapen(name, list(stored.shape), list(other.shape))
        return other

    def _together(self, name: str, total: Tensor, value: Tensor, c: float) -> Tensor:
        if total.shape != value.shape:
            raise self._misshapen(name, list(total.shape), list(value.shape))
        return total + c * value

    def _misshapen(self, name: str, one: list[int], other: list[int]) -> GraftError:
        do = "add up heads of one size, with factors that add up to 1 where it is not the backbone's; or run them with rows(...)"
        return GraftError(f"a sum at {self.key}", f"{name!r} of shapes {one} and {other}", do)

    def linear(self, x: Tensor, base: Callable[[Tensor], Tensor], host: Host) -> Tensor:
        y = base(x)
        total = y
        for c, delta in self.thin:
            mine = delta.linear(x, lambda given: y.clone() if given is x else base(given), self.host)
            total = torch.add(total, mine - y, alpha=c)
        return total if self.rest is None else total + self.rest.changed(x)

    def changed(self, x: Tensor) -> Tensor:
        """What the sum changes of y = x W^T + b."""
        w, b = (
            None if name is None or name not in self.by_name else self._change(name)
            for name in (self.view.name, self.view.bias)
        )
        if w is None:
            return x.new_zeros(self.view.d_out) if b is None else self.view.bias_of(b)  # type: ignore[return-value]
        return F.linear(x, self.view.dense(w), self.view.bias_of(b))

    def _change(self, name: str) -> Tensor | None:
        stored: Tensor | None = self.host.module._parameters[name]
        if name == self.view.name and stored is not None:
            stored = self.view.decoded(stored)
        value = self.adapted(name, stored)
        return value if value is None or stored is None else value - stored

    def inner(self) -> Sequence[WeightSum]:
        return () if self.rest is None else (self.rest,)

    def work(self) -> int:
        dense = 0 if self.rest is None else math.prod(self.view.shape)
        return dense + sum(d.work() for d in self.members)  # type: ignore[operator]

    def sources(self) -> Iterator[nn.Module]:
        for member in self.members:
            yield from member.sources()  # type: ignore[operator]

    def overrides(self, function: str) -> bool:
        return bool(self.thin) if function == "linear" else function in ("weight", "bias")


class OutputSum(Delta):
    """y' = y + sum_i c_i (f_i(x_i, y) - y), x_i being what each member reads.

    source: that of the members, where they have one in common;  readers: otherwise, those that read what passed earlier.
    """

    def __init__(self, terms: Sequence[Term], place: Callable[[Site, Delta], object]) -> None:
        super().__init__()
        self.terms = [(term.c, term.deltas) for term in terms]
        pieces = {delta: site for term in terms for site, delta in term.pieces}
        self.members = nn.ModuleList(pieces)
        alike = len({(d.source, None if d.source == "input" else place(site, d)) for d, site in pieces.items()}) == 1
        self.source = next(iter(pieces)).source if alike else "input"
        self.readers = [] if alike else [(site, d) for d, site in pieces.items() if d.source != "input"]
        self.reading = next(iter(pieces)).reading if alike and len({d.reading for d in pieces}) == 1 else "y"
        self.itself = any(d.itself for d in pieces)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        seen = {delta: reading(delta, x, self.runtime) for _, delta in self.readers}
        total = y
        for c, deltas in self.terms:
            mine = y
            for delta in deltas:
                mine = delta.forward(seen.get(delta, x), mine)
            total = torch.add(total, mine - y, alpha=c)
        return total


class EnterSum(Delta):
    """x' = x + sum_i c_i (f_i(x) - x) for the input of a norm."""

    def __init__(self, terms: Sequence[Term]) -> None:
        super().__init__()
        self.terms = [(term.c, term.deltas) for term in terms]
        self.members = nn.ModuleList(dict.fromkeys(d for term in terms for d in term.deltas))

    def enter(self, x: Tensor) -> Tensor:
        total = x
        for c, deltas in self.terms:
            mine = x
            for delta in deltas:
                mine = delta.enter(mine)
            total = torch.add(total, mine - x, alpha=c)
        return total


class EditSum(Delta):
    """x' = x + sum_i c_i (f_i(x, base) - x) for the input of a module, base(x) being what it gives."""

    def __init__(self, terms: Sequence[Term]) -> None:
        super().__init__()
        self.terms = [(term.c, term.deltas) for term in terms]
        self.members = nn.ModuleList(dict.fromkeys(d for term in terms for d in term.deltas))

    def amend(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        total, y = x, base(x)  # the module runs once for all of them
        for c, deltas in self.terms:
            total = torch.add(total, amended(deltas, x, y, base) - x, alpha=c)
        return total


def amended(deltas: Sequence[Delta], x: Tensor, y: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
    """x edited by each in turn, y = base(x)."""
    edited = x
    for delta in deltas:
        edited = delta.amend(edited, lambda given: y if given is x else base(given))
    return edited


class AttendSum(Delta):
    """o' = o + sum_i c_i (f_i(q, k, v) - o), o = attention(q, k, v)."""

    def __init__(self, terms: Sequence[Term]) -> None:
        super().__init__()
        self.terms = [(term.c, term.deltas) for term in terms]
        self.members = nn.ModuleList(dict.fromkeys(d for term in terms for d in term.deltas))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, attention: Attention) -> Tensor:
        outs = [(c, chain(deltas, q, k, v, mask, attention)) for c, deltas in self.terms]
        own = total = attention(q, k, v, mask)  # last: what the module says of its attention is the backbone's
        for c, out in outs:
            total = torch.add(total, out - own, alpha=c)
        return total
