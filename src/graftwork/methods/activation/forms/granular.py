"""The delta of VL-PET's encoder: an adapter behind a sub-layer, and one gate over both (see `vl_pet`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from graftwork.core.delta import Delta
from graftwork.core.initial import normal, parameter, zeros
from graftwork.core.passes import token_mean
from graftwork.core.site import Site

from .nonlinear import ACTIVATIONS

if TYPE_CHECKING:
    from ..vl_pet import VLPETEncoder

GATES = ("large", "middle_x", "middle_y", "small")


class Granular(Delta):
    """down = D [heads, d / heads, d_model], up = U, with their biases; gate_up = U', w or z, gate_down = D'."""

    reading = "y"

    def __init__(self, method: VLPETEncoder, site: Site) -> None:
        super().__init__()
        draw, like = normal(method.init_std), site.like
        m, d, seen = method.d, site.d, method.entry_width(site)
        self.kind, self.act = method.gate, method.act
        self.source = "norm" if method.source == "residual" else "input" if site.entry is None else "entry"
        self.down = parameter((method.heads, m // method.heads, d), draw, like)
        self.up = parameter((d, m), draw, like)
        self.down_bias, self.up_bias = parameter((m,), zeros, like), parameter((d,), zeros, like)
        rows, columns = {"large": (d, method.gate_dim), "middle_x": (1, d), "small": (1, seen + d)}.get(
            self.kind, (d, 0)
        )
        if self.kind == "large":
            self.gate_down = parameter((method.gate_dim, seen), draw, like)
            self.gate_down_bias = parameter((method.gate_dim,), zeros, like)
        self.gate_up = parameter((rows, columns), draw, like) if columns else parameter((d,), zeros, like)
        self.gate_bias = parameter((rows,), zeros, like) if columns else None

    def opened(self, x: Tensor, y: Tensor, whole: Tensor) -> Tensor:
        """G, [batch, seq, d_model] (large), [batch, seq, 1] (middle_x), [d_model] (middle_y) or [batch, 1, 1] (small)."""
        if self.kind == "middle_y":
            return 1 + self.gate_up
        if self.kind == "large":
            seen = ACTIVATIONS[self.act](_affine(x, self.gate_down, self.gate_down_bias))
        else:
            seen = x + y if self.kind == "middle_x" else torch.cat([x, whole], -1)
        g = torch.sigmoid(_affine(seen, self.gate_up, self.gate_bias))
        return token_mean(g, self.runtime, real=True) if self.kind == "small" else g

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        inner = ACTIVATIONS[self.act](_affine(y, self.down.flatten(0, 1), self.down_bias))
        whole = y + _affine(inner, self.up, self.up_bias)
        return self.opened(x, y, whole) * whole


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    flat = F.linear(x.reshape(-1, x.shape[-1]), weight, bias)  # on more axes, other bits when weights are frozen
    return flat.view(*x.shape[:-1], -1)
