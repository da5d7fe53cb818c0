"""Residual adapters in series: a 1 x 1 convolution of the domain's own behind every convolution.

Rebuffi, Bilen and Vedaldi 2017, "Learning multiple visual domains with residual adapters".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from graftwork.core.adapter import Part
from graftwork.core.delta import WeightDelta
from graftwork.core.fields import choice, number, where
from graftwork.core.initial import normal, parameter, zeros
from graftwork.core.method import Method, method, preset
from graftwork.core.site import Site

from ..activation.forms.window import window_of
from .batch_norm import BatchNorm, Normaliser


@method("series_conv")
@dataclass(frozen=True)
class SeriesConv(Method):
    """v = A u + y,  u = BN(y),  y = w * x + b the convolution's output,  A [C, C].

    In evaluation BN is g (y - m) / s + c with running statistics, and all is one convolution (exact, as A is 1 x 1):
        w' = (I + A diag(g / s)) w,  b' = b + A ((b - m) g / s + c).  Merges so, in evaluation only.
    skip: "y" as above, as the official code; "u" v = A u + u, as the paper's figure.
    init: "normal" A ~ N(0, 2 / C), as the official code; "zero", the identity (with skip="y").
    statistics, momentum: of BN, as for `batch_norm`.  1 x 1 convolutions are left alone.
    Parameters per convolution: C^2 + 2 C (and 2 C statistics).
    Source: Rebuffi et al. 2017, section 3, figure 2; srebuffi/residual_adapters (series_adapters).
    When: the backbone was trained with such adapters in place; for one that was not, parallel_conv.
    """

    skip: str = choice("y", "y", "u")
    init: str = choice("normal", "normal", "zero")
    statistics: str = choice("batch", "batch", "running")
    momentum: float = number(0.1, low=0.0, high=1.0)
    at: str = where("conv")

    mergeable = True

    @property
    def identity(self) -> bool:  # type: ignore[override]
        """Only with A = 0 and a skip that is not normalised."""
        return self.init == "zero" and self.skip == "y"

    def build(self, site: Site, part: Part) -> Series | None:
        return Series(self, site) if window_of(site.module, f"{self} at {site.key}").spatial else None

    def count(self, site: Site) -> int:
        spatial = window_of(site.module, f"{self} at {site.key}").spatial
        return site.d**2 + 2 * site.d if spatial else 0


class Series(WeightDelta):
    """mix = A,  norm: g, c, m and v."""

    lasting = True

    def __init__(self, method: SeriesConv, site: Site) -> None:
        super().__init__()
        c, like = site.d, site.like
        self.mix = parameter((c, c), zeros if method.init == "zero" else normal((2 / c) ** 0.5), like)
        self.norm = Normaliser(c, like, method.momentum)
        self.by_batch, self.plain = method.statistics == "batch", method.skip == "y"

    def gain(self) -> Tensor:
        """g / s [C]."""
        return self.norm.weight / self.norm.deviation()

    def weight(self, w: Tensor) -> Tensor:
        u = self.gain()[:, None] * w
        return (w if self.plain else u) + self.mix @ u

    def bias(self, b: Tensor | None) -> Tensor | None:
        b = torch.zeros_like(self.norm.mean) if b is None else b
        u = (b - self.norm.mean) * self.gain() + self.norm.bias
        return (b if self.plain else u) + self.mix @ u

    def adapted(self, name: str, stored: Tensor | None) -> Tensor | None:
        # by statistics of the batch, `forward` edits what the backbone's convolution gives
        return stored if self.training and self.by_batch else super().adapted(name, stored)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if not self.training:
            return y
        u = self.norm.by_batch(y.movedim(-1, 1), self.runtime).movedim(1, -1)
        return (y if self.plain else u) + F.linear(u, self.mix)

    def overrides(self, function: str) -> bool:
        return self.by_batch if function == "forward" else super().overrides(function)


@preset("residual_adapters")
def ResidualAdapters(init: str = "normal", skip: str = "y", statistics: str = "batch") -> Sequence[Method]:
    """A 1 x 1 convolution behind every 3 x 3 one, and batch norms of the domain's own; with a head of its own.

    Parameters: C^2 + 4 C per convolution.  The adapters of a domain want a weight decay of their own: the fewer its
    images, the higher (1e-4 to 1e-2).  Source: Rebuffi et al. 2017.
    When: many visual domains on one backbone that was trained with such adapters in place.
    """
    return [SeriesConv(init=init, skip=skip, statistics=statistics), BatchNorm(statistics=statistics)]
