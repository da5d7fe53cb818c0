"""MSPLoRA: a pyramid of LoRAs, one shared by all layers, one by each group of layers, one of each layer's own.

Zhao et al. 2025, "MSPLoRA: A Multi-Scale Pyramid Low-Rank Adaptation for Efficient Model Fine-Tuning".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from graftwork.core.adapter import Part
from graftwork.core.delta import WeightDelta
from graftwork.core.errors import GraftError
from graftwork.core.fields import fraction, number, positive, rank, where
from graftwork.core.initial import kaiming_uniform, zeros
from graftwork.core.method import Method, method
from graftwork.core.plan import Host
from graftwork.core.site import Site
from graftwork.products.lowrank import low_rank


def _ranks(v: object) -> str:
    whole = isinstance(v, tuple) and all(isinstance(r, int) and not isinstance(r, bool) and r >= 0 for r in v)
    return "" if whole and (not v or any(v)) else "ranks >= 0, one for each level, not all zero"  # type: ignore[arg-type,misc]


@method("msplora")
@dataclass(frozen=True)
class MSPLoRA(Method):
    """W' = W + sum_i s_i B_i A_i,  A_i [r_i, in], B_i [out, r_i],  s_i = alpha / r_i.  Identity at init (B = 0); mergeable.

    Level 0 is shared by all layers, those between by the layers of one of `groups` equal groups, group(l) = groups l / L
    rounded down, and the last of several is each layer's own. Shared is what has the same role, tower and shape.
    r, levels: ranks r, r/2, r/4, ... rounded down.  ranks: these instead, of so many levels; 0 leaves a level out.
    dropout: on the inputs of the A_i, each level its own draw, in training only.
    (The published code applies a shared pair in the first of its layers only; here it acts in all of them.)
    Init: A_i kaiming-uniform (a = sqrt 5), B_i zero.
    Parameters per role: (in + out) (r_0 + groups (r_1 + ...) + layers r_last).  Source: Zhao et al. 2025, arXiv 2503.21838.
    When: layers share what is global, groups what is regional: LoRA's quality with fewer parameters.
    """

    r: int = rank(8)
    alpha: float = number(16.0)
    levels: int = positive(3)
    groups: int = positive(3)
    ranks: tuple[int, ...] = field(default=(), metadata={"check": _ranks})
    dropout: float = fraction(0.05)
    at: str = where("q, v | linear")

    mergeable = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ranks and self.r < 2 ** (self.levels - 1):
            found = f"the last of {self.levels} levels would have rank {self.r} / {2 ** (self.levels - 1)}"
            raise GraftError(f"{self}", found, "choose a larger r, or fewer levels")

    def shared_by(self, site: Site) -> dict[str, int]:
        """The shared pairs of a site, by their names, and their ranks."""
        ranks, alike = self._levels(), "_".join(map(str, (site.tower, site.role, *site.weight.shape)))
        group = 0 if site.layer is None else self.groups * site.layer // max(site.depth, 1)
        names = [f"{alike}_{i}" + (f"_{group}" if i else "") for i in range(len(ranks))]
        levels = list(zip(names, ranks, strict=True))
        return {name: r for name, r in (levels if len(ranks) == 1 else levels[:-1]) if r}

    def own(self) -> int:
        """The rank of each layer's own pair, 0 for none."""
        return self._levels()[-1] if len(self._levels()) > 1 else 0

    def _levels(self) -> tuple[int, ...]:
        return self.ranks or tuple(self.r // 2**i for i in range(self.levels))

    def build(self, site: Site, part: Part) -> Pyramid:
        site.weight.require_matrix("msplora", self.dropout)
        shared = [part.shared(name, partial(Pair, r, site)) for name, r in self.shared_by(site).items()]
        return Pyramid(self, site, shared)

    def count(self, site: Site) -> int:
        return site.weight.copies * self.own() * (site.weight.d_in + site.weight.d_out)

    def count_shared(self, sites: Sequence[Site]) -> int:
        sizes = {
            name: s.weight.copies * r * (s.weight.d_in + s.weight.d_out)
            for s in sites
            for name, r in self.shared_by(s).items()
        }
        return sum(sizes.values())


class Pair(nn.Module):
    """down = A [*batch, r, in], up = B [*batch, out, r]."""

    def __init__(self, r: int, site: Site) -> None:
        super().__init__()
        w = site.weight
        self.down, self.up = w.parameter(r, w.d_in, kaiming_uniform()), w.parameter(w.d_out, r, zeros)


class Pyramid(WeightDelta):
    """own: the pair of this site; the shared ones hang at the model's root, once."""

    lasting = True

    def __init__(self, method: MSPLoRA, site: Site, shared: Sequence[Pair]) -> None:
        super().__init__()
        self.own = Pair(method.own(), site) if method.own() else None
        self._shared, self.alpha, self.dropout = tuple(shared), method.alpha, method.dropout

    def pairs(self) -> list[tuple[float, Pair]]:
        """(s_i, the pair) of each level, the widest shared first."""
        every = [*self._shared, *([] if self.own is None else [self.own])]
        return [(self.alpha / pair.down.shape[-2], pair) for pair in every]

    def sources(self) -> Iterator[nn.Module]:
        yield from (self, *self._shared)

    def factors(self) -> tuple[Tensor, Tensor]:
        pairs = self.pairs()
        up = torch.cat([s * pair.up for s, pair in pairs], dim=-1)
        return torch.cat([pair.down for _, pair in pairs], dim=-2), up

    def linear(self, x: Tensor, base: Callable[[Tensor], Tensor], host: Host) -> Tensor:
        dropout, ranks = self.dropout if self.training else 0.0, tuple(pair.down.shape[-2] for _, pair in self.pairs())
        return low_rank(x, base, host, *self.factors(), 1.0, dropout, draws=ranks)
