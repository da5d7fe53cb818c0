"""Arrow: every token of every layer goes to the low-rank adapters whose strongest input direction it lies in. No data, no training.

Ostapenko et al. 2024, "Towards Modular LLMs by Building and Reusing a Library of LoRAs", section 4 (arXiv 2405.11157).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graftwork.core.adapter import Part
from graftwork.core.delta import WeightDelta
from graftwork.core.errors import GraftError
from graftwork.core.fields import choice, flag, number, positive, words
from graftwork.core.method import Method, method
from graftwork.core.mixer import Members, Mixer
from graftwork.core.site import Site
from graftwork.products.spectrum import of_factors


@method("arrow")
@dataclass(frozen=True)
class Arrow(Method):
    """l_e = |p_e . x|, w = softmax(l / T) over the k largest, 0 elsewhere;  y = W x + sum_e w_e B_e A_e x.

    p_e: the top right singular vector of B_e A_e, of length one: its sign does not matter, nor how the update is factored.
    top_k: k, at most as many as there are.  temperature: T; 0 and below is sqrt(d_in).
    combine: "after" as above, "before" y = W x + (sum_e w_e B_e) (sum_e w_e A_e) x, which needs equal ranks.
    of, joint: of an adapter of this method; in route(a, b, by="arrow") they say nothing.  Trains nothing.
    Subtracting what general adapters have in common (GenKnowSub): route(a - mean(g, h), b - mean(g, h), by="arrow"), exact.
    When: a library of LoRAs of unknown tasks is at hand and nothing may be trained: the router is read off the adapters.
    """

    mixes = True
    trains = False
    identity = False

    top_k: int = positive(4)
    temperature: float = number(1.0)
    combine: str = choice("after", "after", "before")
    of: tuple[str, ...] = words()
    joint: bool = flag(False)

    def build(self, site: Site, part: Part) -> ArrowMixer:
        return ArrowMixer(self)

    def count(self, site: Site) -> int:
        return 0


class ArrowMixer(Mixer):
    """No parameters: the prototypes are computed from the members' factors, again when these change."""

    def __init__(self, method: Arrow) -> None:
        super().__init__()
        self.method, self.before = method, method.combine == "before"

    def check(self, members: Members) -> None:
        pairs = [_factors(chain, self.key) for chain in members.deltas]
        ranks = {down.shape[-2] for down, _ in pairs}
        if self.before and len(ranks) > 1:
            found = f"ranks {sorted(ranks)} at {self.key}"
            raise GraftError(f"{self.method}", found, "use combine='after', or adapters of one rank")

    def weights(self, x: Tensor, y: Tensor, members: Members) -> Tensor:
        p = members.derived("prototypes", lambda: self._prototypes(members)).to(x)
        length = (x @ p.mT).abs()
        top, at = length.topk(min(self.method.top_k, len(p)), -1)
        t = self.method.temperature if self.method.temperature > 0 else x.shape[-1] ** 0.5
        return torch.zeros_like(length).scatter(-1, at, torch.softmax(top / t, -1))

    @torch.no_grad()
    def _prototypes(self, members: Members) -> Tensor:
        """p [n, d_in]."""
        pairs = [_factors(chain, self.key) for chain in members.deltas]
        return torch.stack([of_factors(down.cpu(), up.cpu()).v[0] for down, up in pairs]).to(pairs[0][0])


def _factors(chain: list[Any], key: str) -> tuple[Tensor, Tensor]:
    """A and B of a member. GraftError where it is no low-rank update of a matrix."""
    pair = chain[0].factors() if len(chain) == 1 and isinstance(chain[0], WeightDelta) else None
    if pair is None or not chain[0].view.linear:
        found = f"an adapter that is not one low-rank update of a linear layer at {key}"
        do = "route LoRAs (gw.combine or graftwork convert makes one of any weight method), or take by='uniform'"
        raise GraftError("arrow", found, do)
    return pair
