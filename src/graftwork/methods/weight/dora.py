"""DoRA: the magnitude of each output unit is trained, and its direction is updated by a low-rank product.

Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", eq. 5 and section 4.3 (the norm is held constant in the
backward pass).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from graftwork.core.adapter import Part
from graftwork.core.delta import WeightDelta
from graftwork.core.fields import flag, fraction, number, rank, where
from graftwork.core.initial import kaiming_uniform, normal, values, zeros
from graftwork.core.method import Method, method
from graftwork.core.plan import Host
from graftwork.core.site import Site
from graftwork.products.dropout import drop
from graftwork.products.lowrank import low_rank

SMALLEST = 1e-12  # squared norm below which a row has no direction: a row of zeros keeps a finite gain


@method("dora")
@dataclass(frozen=True)
class DoRA(Method):
    """W' = diag(m / |V|) V,  V = W + s B A,  s = alpha / r,  |V|_j = ||V[j, :]||.  Identity at init (B = 0, m = |W|);
    mergeable.

    m [out], A [r, in], B [out, r]. The norm runs over everything but the output unit: a convolution's kernel and
    inputs, an embedding's vocabulary (m then has the width of the embedding). The bias is not rescaled.
    r: rank.  alpha: None takes 2 r.  dropout: on the input, in training only; what the gain changes sees the dropped
        input too.
    exact: the gradient also flows through |V|; by default |V| counts as a constant.
    Parameters: r (in + out) + out per weight.  Source: Liu et al. 2024, arXiv 2402.09353, eq. 5 and 11; NVlabs/DoRA.
    When: LoRA falls short at a low rank: usually a little better for the same rank, at a dearer step; merges to the same speed.
    """

    r: int = rank(32)
    alpha: float | None = number(None)
    dropout: float = fraction(0.0)
    exact: bool = flag(False)
    at: str = where("q, k, v, up, down | q, v | linear | conv")

    mergeable = True
    lr = 1e-3

    @property
    def scale(self) -> float:
        """s, the factor of B A."""
        return 2.0 if self.alpha is None else self.alpha / self.r

    def build(self, site: Site, part: Part) -> Decomposed:
        site.weight.require_matrix("dora", self.dropout)
        return Decomposed(self, site)

    def count(self, site: Site) -> int:
        w = site.weight
        return w.copies * (self.r * (w.d_in + w.d_out) + w.d_out)


class Decomposed(WeightDelta):
    """down = A [*batch, r, in], up = B [*batch, out, r], magnitude = m [*batch, out]."""

    def __init__(self, method: DoRA, site: Site) -> None:
        super().__init__()
        w = site.weight
        self.down = w.parameter(method.r, w.d_in, zeros if w.lookup else kaiming_uniform())
        self.up = w.parameter(w.d_out, method.r, normal() if w.lookup else zeros)
        self.scale, self.dropout, self.exact = method.scale, method.dropout, method.exact
        stored = site.module._parameters[w.name]
        assert stored is not None
        with torch.no_grad():
            self.magnitude = w.vector(w.d_out, values(self.norm(w.dense(stored))))

    def norm(self, w: Tensor) -> Tensor:
        """|V| [*batch, out], at least in float32, without forming V: ||w||^2 + 2 s <w A^T, B> + s^2 <B A A^T, B>, by
        rows."""
        down, up = (self.down, self.up) if self.exact else (self.down.detach(), self.up.detach())
        wide = torch.promote_types(w.dtype, torch.float32)
        cross = (w @ down.mT).to(wide) * up
        own = (up @ (down @ down.mT)).to(wide) * up
        square = torch.linalg.vector_norm(w, dim=-1, dtype=wide).square()
        square = square + (2 * self.scale * cross + self.scale**2 * own).sum(-1)
        return square.clamp_min(SMALLEST).sqrt()

    def gain(self, w: Tensor) -> Tensor:
        """m / |V| [*batch, out]; exactly one at init, because |V| is rounded as m is."""
        return self.magnitude / self.norm(w).to(self.magnitude.dtype)

    lasting = True

    def work(self) -> int:
        (*_, r, d_in), d_out = self.down.shape, self.up.shape[-2]
        return r * (d_in + d_out + d_in * d_out)  # the last: the norm, once a call

    def weight(self, w: Tensor) -> Tensor:
        return self.gain(w)[..., None] * (w + self.scale * (self.up @ self.down))

    def linear(self, x: Tensor, base: Callable[[Tensor], Tensor], host: Host) -> Tensor:
        w = host.weight
        g = self.gain(w)
        if self.dropout and self.training:
            y, x = base(x), drop(x, self.dropout)
            out = torch.addcmul(y, F.linear(x, w), (g - 1).to(y.dtype))
            return out.addcmul_(F.linear(F.linear(x, self.down), self.up), (self.scale * g).to(y.dtype))
        v = low_rank(x, base, host, self.down, self.up, self.scale)  # x V^T + b
        if host.bias is None:
            return v * g.to(v.dtype)
        return torch.addcmul(host.bias * (1 - g).to(v.dtype), v, g.to(v.dtype))
