"""LoRA: a low-rank update of a frozen weight.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", eq. 3:  W' = W + (alpha / r) B A
rsLoRA (Kalajdzievski 2023) scales by alpha / sqrt(r) instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from graftwork.core.adapter import Part
from graftwork.core.delta import WeightDelta
from graftwork.core.fields import flag, fraction, number, positive, where
from graftwork.core.initial import kaiming_uniform, normal, zeros
from graftwork.core.lowrank import low_rank
from graftwork.core.method import Method, method
from graftwork.core.plan import Host
from graftwork.core.site import Site


@method("lora")
@dataclass(frozen=True)
class LoRA(Method):
    """W' = W + s B A,  A [r, in],  B [out, r],  s = alpha / r.  Identity at init (B = 0); mergeable.

    r: rank.  alpha: s = alpha / r, or alpha / sqrt(r) with rslora.  dropout: on the input of A, in training only.
    Init: A kaiming-uniform (a = sqrt 5), B zero; on an embedding A zero, B N(0, 1).
    Parameters: r (in + out) per weight.  Source: Hu et al. 2021, arXiv 2106.09685, eq. 3 and loralib.
    """

    r: int = positive(8)
    alpha: float = number(16.0)
    dropout: float = fraction(0.0)
    rslora: bool = flag(False)
    at: str = where("q, v | linear | conv")

    mergeable = True

    @property
    def scale(self) -> float:
        """s, the factor of B A."""
        return self.alpha / (self.r**0.5 if self.rslora else self.r)

    def build(self, site: Site, part: Part) -> LowRank:
        site.weight.require_matrix("lora", self.dropout)
        return LowRank(self, site)

    def count(self, site: Site) -> int:
        return site.weight.copies * self.r * (site.weight.d_in + site.weight.d_out)


class LowRank(WeightDelta):
    """down = A [*batch, r, in], up = B [*batch, out, r]."""

    additive = True
    lasting = True

    def __init__(self, method: LoRA, site: Site) -> None:
        super().__init__()
        w = site.weight
        self.down = w.parameter(method.r, w.d_in, zeros if w.lookup else kaiming_uniform())
        self.up = w.parameter(w.d_out, method.r, normal() if w.lookup else zeros)
        self.scale, self.dropout = method.scale, method.dropout

    def weight(self, w: Tensor) -> Tensor:
        return w + self.scale * (self.up @ self.down)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.down, self.scale * self.up

    def linear(self, x: Tensor, base: Callable[[Tensor], Tensor], host: Host) -> Tensor:
        return low_rank(x, base, host, self.down, self.up, self.scale, self.dropout if self.training else 0.0)
