"""Parallel residual adapters: a 1 x 1 convolution of the domain's own beside every convolution.

Rebuffi, Bilen and Vedaldi 2018, "Efficient Parametrization of Multi-domain Deep Neural Networks".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from graftwork.core.adapter import Part
from graftwork.core.delta import WeightDelta
from graftwork.core.errors import GraftError
from graftwork.core.fields import choice, flag, fraction, positive, where
from graftwork.core.initial import kaiming_uniform, normal, parameter, tensor, zeros
from graftwork.core.method import Method, method, preset
from graftwork.core.site import Site

from ..activation.forms.window import window_of
from .batch_norm import BatchNorm


@method("parallel_conv")
@dataclass(frozen=True)
class ParallelConv(Method):
    """y = w * x + A drop(x),  A [C_out, C_in] a 1 x 1 convolution with the convolution's stride, at its centres.

    That is w'[:, :, centre] = w[:, :, centre] + A: merges exactly.  Of a grouped convolution A has the groups.
    r: None trains A whole; a rank trains A = U V, U [C_out, r], V [r, C_in].
    fixed: U is not trained: `gw.share_basis` finds one for several domains.
    dropout: whole channels of x, in training (0.5 for small data sets in the paper).
    init: "normal" A (or U) ~ N(0, 2 / C_out), as the official code; "zero", the identity.
    1 x 1 convolutions are left alone.
    Parameters per convolution: C_in C_out, or r (C_in + C_out), or r C_in with a fixed U.
    Source: Rebuffi et al. 2018, section 3.1; srebuffi/residual_adapters (parallel_adapters).
    When: off-the-shelf convolutional backbones, and an adapter that costs nothing once it is merged.
    """

    r: int | None = positive(None)
    fixed: bool = flag(False)
    dropout: float = fraction(0.0)
    init: str = choice("normal", "normal", "zero")
    at: str = where("conv")

    mergeable = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fixed and self.r is None:
            raise GraftError(f"{self}", "no rank: A has no U", "give r, or leave fixed out")

    @property
    def identity(self) -> bool:  # type: ignore[override]
        """Only with A = 0."""
        return self.init == "zero"

    def build(self, site: Site, part: Part) -> Parallel | None:
        return Parallel(self, site) if window_of(site.module, f"{self} at {site.key}").spatial else None

    def count(self, site: Site) -> int:
        if not window_of(site.module, f"{self} at {site.key}").spatial:
            return 0
        outputs, inputs = site.weight.stored[:2]
        return outputs * inputs if self.r is None else self.r * (inputs + (0 if self.fixed else outputs))


class Parallel(WeightDelta):
    """down = A [C_out, C_in / groups], up None; or A = up down, up = U [C_out, r], down = V [r, C_in / groups]."""

    lasting = True

    def __init__(self, method: ParallelConv, site: Site) -> None:
        super().__init__()
        like, asked, r = site.like, f"{method} at {site.key}", method.r
        self.window = window_of(site.module, asked).odd(asked).resized(1, asked)
        self.taps = math.prod(site.weight.kernel)
        outputs, inputs = site.weight.stored[:2]
        self.groups = self.window.d_in // inputs
        start = zeros if method.init == "zero" else normal((2 / outputs) ** 0.5)
        self.down = parameter((r or outputs, inputs), kaiming_uniform() if r else start, like)
        if method.fixed:
            self.register_buffer("up", tensor((outputs, r or 0), normal(outputs**-0.5), like))
        else:
            self.up = parameter((outputs, r), start, like) if r else None
        self.dropout = method.dropout

    def matrix(self) -> Tensor:
        """A [C_out, C_in / groups]."""
        return self.down if self.up is None else self.up @ self.down

    def update(self) -> Tensor:
        centre = self.taps // 2
        return F.pad(self.matrix()[..., None], (centre, self.taps - 1 - centre)).flatten(1)

    def adapted(self, name: str, stored: Tensor | None) -> Tensor | None:
        return stored if self.training and self.dropout else super().adapted(name, stored)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if not self.training:
            return y
        kept = torch.rand(x.shape[0], *[1] * (x.dim() - 2), x.shape[-1], device=x.device) >= self.dropout
        x = (x * kept.to(x.dtype) / (1 - self.dropout)).movedim(-1, 1)
        a = self.matrix()[(..., *[None] * (x.dim() - 2))]
        return y + self.window.convolve(x, a, None, self.groups).movedim(1, -1)

    def overrides(self, function: str) -> bool:
        return self.dropout > 0 if function == "forward" else super().overrides(function)


@preset("parallel_residual_adapters")
def ParallelResidualAdapters(
    dropout: float = 0.0, init: str = "normal", r: int | None = None, statistics: str = "batch"
) -> Sequence[Method]:
    """A 1 x 1 convolution beside every 3 x 3 one, and batch norms of the domain's own; with a head of its own.

    Parameters: C_in C_out + 2 C_out per convolution.  It suits backbones that were trained without adapters.
    Source: Rebuffi et al. 2018.
    When: many visual domains on one off-the-shelf convolutional backbone.
    """
    return [ParallelConv(dropout=dropout, init=init, r=r), BatchNorm(statistics=statistics)]
