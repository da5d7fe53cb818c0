"""VeRA: one frozen random pair of matrices for all sites, and two trained vectors per site.

Kopiczko et al. 2023, "VeRA: Vector-based Random Matrix Adaptation", eq. 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graftwork.core.adapter import Part
from graftwork.core.delta import WeightDelta
from graftwork.core.fields import count, flag, fraction, number, positive, where
from graftwork.core.initial import constant, drawing_from, kaiming_uniform, tensor, zeros
from graftwork.core.method import Method, method
from graftwork.core.plan import Host
from graftwork.core.site import Site
from graftwork.products.lowrank import low_rank


@method("vera")
@dataclass(frozen=True)
class VeRA(Method):
    """W' = W + diag(b) B diag(d) A,  A [r, in] and B [out, r] random and frozen.  Identity at init (b = 0); mergeable.

    d [r] starts at d_initial, b [out] at zero. A and B are one pair for all sites, drawn from `seed` on the CPU
    (kaiming-uniform, U(-x, x) with x = sqrt(6 / fan_in)) with the largest in and the largest out among them; a site
    uses the leading columns of A and the leading rows of B.  r: rank.  dropout: on the input of A, in training only.
    save_projection: store A and B with the vectors, instead of the seed alone.
    Parameters: out + r per weight.  Source: Kopiczko et al. 2023, arXiv 2310.11454, eq. 2 and section 3.2.
    When: LoRA's files are too large by a factor of ten; its step costs products of a high rank with frozen matrices.
    """

    r: int = positive(256)
    d_initial: float = number(0.1)
    dropout: float = fraction(0.0)
    seed: int = count(0)
    save_projection: bool = flag(False)
    at: str = where("q, v | linear | conv")

    mergeable = True
    lr = 3e-2

    def build(self, site: Site, part: Part) -> Scaled:
        site.weight.require_matrix("vera", self.dropout)
        return Scaled(self, site, part.shared("projection", lambda: Projection(self, part.sites)))

    def count(self, site: Site) -> int:
        return site.weight.copies * (self.r + site.weight.d_out)


class Projection(nn.Module):
    """down = A [r, largest in], up = B [largest out, r], frozen."""

    def __init__(self, method: VeRA, sites: list[Site]) -> None:
        super().__init__()
        weights = [site.weight for site in sites if site.weight.is_matrix]
        d_in, d_out = max(w.d_in for w in weights), max(w.d_out for w in weights)
        with drawing_from(torch.Generator().manual_seed(method.seed)):
            down = tensor((method.r, d_in), kaiming_uniform(0.0), weights[0].like)
            up = tensor((d_out, method.r), kaiming_uniform(0.0), weights[0].like)
        self.register_buffer("down", down, persistent=method.save_projection)
        self.register_buffer("up", up, persistent=method.save_projection)

    down: Tensor
    up: Tensor


class Scaled(WeightDelta):
    """down_scale = d [*batch, r], up_scale = b [*batch, out]."""

    additive = True

    def __init__(self, method: VeRA, site: Site, projection: Projection) -> None:
        super().__init__()
        w = site.weight
        self.down_scale = w.vector(method.r, constant(method.d_initial))
        self.up_scale = w.vector(w.d_out, zeros)
        self.dropout, self.d_in, self.d_out = method.dropout, w.d_in, w.d_out
        self._shared = (projection,)  # in a tuple: it hangs at the model's root, once

    @property
    def down(self) -> Tensor:
        """A [r, in] of this site."""
        return self._shared[0].down[:, : self.d_in]

    @property
    def up(self) -> Tensor:
        """B [out, r] of this site."""
        return self._shared[0].up[: self.d_out]

    lasting = True

    def work(self) -> int:
        return self.down_scale.shape[-1] * (self.d_in + self.d_out)

    def sources(self) -> Iterator[nn.Module]:
        yield from (self, self._shared[0])

    def weight(self, w: Tensor) -> Tensor:
        return w + self.up_scale[..., None] * ((self.up * self.down_scale[..., None, :]) @ self.down)

    def linear(self, x: Tensor, base: Callable[[Tensor], Tensor], host: Host) -> Tensor:
        up = self.up * (self.up_scale[:, None] * self.down_scale)  # a thin matrix: no activation is scaled
        return low_rank(x, base, host, self.down, up, 1.0, self.dropout if self.training else 0.0)
