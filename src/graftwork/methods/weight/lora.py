"""LoRA: a low-rank update of a frozen weight.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", eq. 3:  W' = W + (alpha / r) B A
rsLoRA (Kalajdzievski 2023) scales by alpha / sqrt(r) instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from graftwork.core.adapter import Part
from graftwork.core.delta import WeightDelta
from graftwork.core.errors import GraftError
from graftwork.core.fields import flag, fraction, number, positive, where
from graftwork.core.initial import kaiming_uniform, normal, zeros
from graftwork.core.method import Method, method
from graftwork.core.plan import Host
from graftwork.core.site import Site
from graftwork.products.lowrank import low_rank


@method("lora")
@dataclass(frozen=True)
class LoRA(Method):
    """W' = W + s B A,  A [r, in],  B [out, r],  s = alpha / r.  Identity at init (B = 0); mergeable.

    r: rank.  alpha: s = alpha / r, or alpha / sqrt(r) with rslora.  dropout: on the input of A, in training only.
    bias: the bias is adapted too, b' = b + s c, c [out] (HF PEFT's lora_bias); where the host has none, b is zero.
    Init: A kaiming-uniform (a = sqrt 5), B and c zero; on an embedding A zero, B N(0, 1).
    Parameters: r (in + out) per weight, and out with bias.  Source: Hu et al. 2021, arXiv 2106.09685, eq. 3 and loralib.
    """

    r: int = positive(8)
    alpha: float = number(16.0)
    dropout: float = fraction(0.0)
    rslora: bool = flag(False)
    bias: bool = flag(False)
    at: str = where("q, v | linear | conv")

    mergeable = True

    @property
    def scale(self) -> float:
        """s, the factor of B A."""
        return self.alpha / (self.r**0.5 if self.rslora else self.r)

    def build(self, site: Site, part: Part) -> LowRank:
        site.weight.require_matrix("lora", self.dropout)
        if self.bias and (site.weight.bias is None or site.weight.batch):
            found = f"{type(site.module).__name__}, which has no place for one"
            raise GraftError(f"{self} at {site.key}: a bias", found, "leave bias out for these sites")
        return LowRank(self, site)

    def count(self, site: Site) -> int:
        w = site.weight
        return w.copies * self.r * (w.d_in + w.d_out) + (w.d_out if self.bias else 0)


class LowRank(WeightDelta):
    """down = A [*batch, r, in], up = B [*batch, out, r], shift = c [out] or None."""

    lasting = True

    def __init__(self, method: LoRA, site: Site) -> None:
        super().__init__()
        w = site.weight
        self.down = w.parameter(method.r, w.d_in, zeros if w.lookup else kaiming_uniform())
        self.up = w.parameter(w.d_out, method.r, normal() if w.lookup else zeros)
        self.shift = w.vector(w.d_out, zeros) if method.bias else None
        self.scale, self.dropout = method.scale, method.dropout

    def bias(self, b: Tensor | None) -> Tensor | None:
        if self.shift is None:
            return b
        shift: Tensor = self.scale * self.shift
        return shift if b is None else b + shift

    def overrides(self, function: str) -> bool:
        return self.shift is not None if function == "bias" else super().overrides(function)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.down, self.scale * self.up

    def linear(self, x: Tensor, base: Callable[[Tensor], Tensor], host: Host) -> Tensor:
        y = low_rank(x, base, host, self.down, self.up, self.scale, self.dropout if self.training else 0.0)
        return y if self.shift is None else torch.add(y, self.shift.to(y.dtype), alpha=self.scale)
