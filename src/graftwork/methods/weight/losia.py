"""LoSiA: in every weight a small block of chosen rows and columns is trained, and the choice moves on by a schedule.

Wang et al. 2025, "LoSiA: Efficient High-Rank Fine-Tuning via Subnet Localization and Optimization", algorithm 1 and the
gradient of LoSiA-Pro.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graftwork.core.adapter import Part
from graftwork.core.errors import GraftError
from graftwork.core.fields import choice, flag, fraction, number, positive, where
from graftwork.core.method import Method, method
from graftwork.core.site import Site

from .forms.subnet import Subnet


@method("losia")
@dataclass(frozen=True)
class LoSiA(Method):
    """W' = W + dW,  of dW only the block of rows R and columns C is trained,  |R| = floor(p out), |C| = floor(p in).

    Identity at init (dW = 0; R and C random); mergeable. With D layers and a period of T steps, the layer (t // T) mod D is
    looked at in step t (`together`: all of them while it is 0): from the full gradient g of each of its weights,
    i = |q - q^2 / 2|, q = W' g (taylor "mixed"; "first" |q|, "second" q^2), I <- beta1 I + (1 - beta1) i,
    U <- beta2 U + (1 - beta2) |i - I|. When its turn ends, R and C become the block with the largest sum of I U that three greedy
    rules find; what was trained stays in dW. The optimiser's moments of the block are dropped (give it to `gw.step`), and its
    steps are shortened, from none at all to whole ones, over the next T steps.
    The gradient is that of the block alone, from the columns C of x; all of it only while the layer is looked at.
    Parameters: floor(p out) floor(p in) per weight at any time. The file holds dW, where it is not zero.
    Memory: dW as a whole, in the backbone's precision.  Source: Wang et al. 2025; KlozeWang/LoSiA.
    When: full-rank training without low-rank structure on a budget of memory: a moving block of rows and columns is trained at a
        time.
    """

    p: float = number(0.125, 0.0, 1.0)
    period: int = positive(50)
    beta1: float = fraction(0.85)
    beta2: float = fraction(0.85)
    taylor: str = choice("mixed", "mixed", "first", "second")
    together: bool = flag(False)
    at: str = where("q, k, v, o, gate, up, down | q, k, v, o, up, down | linear | conv")

    mergeable = True
    needs = ("step",)

    def build(self, site: Site, part: Part) -> Subnet:
        site.weight.require_matrix("losia")
        r, c = self.sides(site)
        if not r or not c:
            found = f"{site.weight.d_out} x {site.weight.d_in}, of which nothing is left"
            raise GraftError(f"{self} at {site.key}", found, "give a larger p, or choose larger weights")
        delta = Subnet(site, r, c, self.period)
        delta.looked_at = self.turn(site, part, int(part.shared("schedule", Schedule).steps))
        return delta

    def sides(self, site: Site) -> tuple[int, int]:
        """|R| and |C|."""
        return int(self.p * site.weight.d_out), int(self.p * site.weight.d_in)

    def count(self, site: Site) -> int:
        r, c = self.sides(site)
        return site.weight.copies * r * c

    def turn(self, site: Site, part: Part, t: int) -> bool:
        """Whether the site's layer is looked at in step t."""
        layers = list(dict.fromkeys((s.tower, s.layer) for s in part.sites))
        own = 0 if self.together else layers.index((site.tower, site.layer))
        return t // self.period % len(layers) == own

    @torch.no_grad()
    def step(self, part: Part, progress: float) -> None:
        schedule = part.shared("schedule", Schedule)
        t = int(schedule.steps)
        schedule.steps += 1
        for site in part.sites:
            delta, stored = part.deltas[site.key], site.module._parameters[site.weight.name]
            assert isinstance(delta, Subnet) and stored is not None
            delta.shorten(self.period)
            if self.turn(site, part, t):
                delta.observe(site.weight.dense(stored), self.beta1, self.beta2, self.taylor)
                if (t + 1) % self.period == 0:
                    delta.move()
                    part.renewed.append(delta.block)
            delta.looked_at = self.turn(site, part, t + 1)

    def fold(self, part: Part) -> tuple[Method, dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        """dW alone, where it is not zero."""
        tensors = {key: d.folded() for key, d in part.deltas.items() if isinstance(d, Subnet)}
        return self, tensors, dict(part.shared_modules.state_dict())


class Schedule(nn.Module):
    """steps: how often the schedule was called."""

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long, device="cpu"))  # also under "meta"
