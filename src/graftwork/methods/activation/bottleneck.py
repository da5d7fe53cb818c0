"""Bottleneck adapters: a small residual MLP at the output of a sub-layer or block.

Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP"; Bapna and Firat 2019 (own norm, block output);
He et al. 2021, "Towards a Unified View" (scaled parallel adapters); Steitz and Roth 2024, "Adapters Strike Back"
(Adapter+).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftwork.core.adapter import Part
from graftwork.core.delta import Delta
from graftwork.core.errors import GraftError
from graftwork.core.fields import choice, flag, fraction, number, positive, where
from graftwork.core.initial import ones, parameter, uniform, zeros
from graftwork.core.method import Method, method
from graftwork.core.site import Site

from .nonlinear import ACTIVATIONS, starts


@method("bottleneck")
@dataclass(frozen=True)
class Bottleneck(Method):
    """A(h) = s (U drop(g(D norm(h) + b_D)) + b_U),  D [m, d],  U [d, m];  the skip is never scaled or dropped.

    d: bottleneck width m; None takes the site's width // reduction.  act: g.  bias: b_D and b_U.
    position (a = the sub-layer's output before the residual add, r = the residual stream before its norm, x = its
    input):
        "after" a + A(a) · "parallel" a + A(x) · "residual" a + A(r) · "before" the sub-layer and the skip both see r
        + A(r).
        At a whole block ("at='block'") "after" edits the block's output.
    norm: a LayerNorm of its own "before" D, or "after" U (no skip in it), or "none".
    scale: s fixed;  scaling: "fixed", one learned "scalar", or a learned vector per "channel", both starting at
        `scale`.
    dropout: after g.  drop_path: whole branches are dropped per sample in training, the kept ones divided by 1 - p.
    init: "houlsby" D, U truncated normal (init_std, cut at 2 std), "bert" N(0, init_std^2), "lora" D kaiming-uniform,
        U zero,
        "zero_up" D N(0, init_std^2), U zero; biases zero (b_D uniform +-1/sqrt(d) with "lora" and lora_bias).
    Parameters per site: 2 m d + (m + d with bias) + (2 d with norm) + (1 or d with learned scaling).
    """

    d: int | None = positive(None)
    reduction: int = positive(16)
    act: str = choice("gelu", *ACTIVATIONS)
    position: str = choice("after", "after", "parallel", "residual", "before")
    norm: str = choice("none", "none", "before", "after")
    scale: float = number(1.0)
    scaling: str = choice("fixed", "fixed", "scalar", "channel")
    dropout: float = fraction(0.0)
    drop_path: float = fraction(0.0)
    init: str = choice("lora", "lora", "houlsby", "bert", "zero_up")
    init_std: float = number(0.02, low=0.0)
    lora_bias: bool = flag(False)
    bias: bool = flag(True)
    at: str = where("attn, mlp | linear | conv")

    @property
    def identity(self) -> bool:  # type: ignore[override]
        """With a zero up-projection the branch is exactly zero, unless a norm of its own follows it."""
        return self.init in ("lora", "zero_up")

    def build(self, site: Site, part: Part) -> Residual:
        if self.position in ("residual", "before") and site.norm is None:
            do = "use position='after' or 'parallel'"
            raise GraftError(f"{self} at {site.key}", "no norm is known in front of this sub-layer", do)
        if self.position == "parallel" and site.entry is None and not site.weight.linear:
            found = f"the input of {type(site.module).__name__} has another layout than its output"
            raise GraftError(f"{self} at {site.key}", found, "use position='after', or at='attn, mlp'")
        return Residual(self, site)

    def widths(self, site: Site) -> tuple[int, int, int]:
        """(d in, m, d out) at this site."""
        reads_input = self.position == "parallel" and site.entry is None
        m = self.d if self.d is not None else max(1, site.d // self.reduction)
        return (site.weight.d_in if reads_input else site.d), m, site.d

    def count(self, site: Site) -> int:
        d_in, m, d_out = self.widths(site)
        norm = {"none": 0, "before": 2 * d_in, "after": 2 * d_out}[self.norm]
        scale = {"fixed": 0, "scalar": 1, "channel": d_out}[self.scaling]
        return m * (d_in + d_out) + (m + d_out if self.bias else 0) + norm + scale


class Residual(Delta):
    """down = D, up = U, with their biases, norm and scale."""

    def __init__(self, method: Bottleneck, site: Site) -> None:
        super().__init__()
        d_in, m, d_out = method.widths(site)
        like = next(site.module.parameters())
        down, up = starts(method.init, method.init_std)
        self.down = parameter((m, d_in), down, like)
        self.up = parameter((d_out, m), up, like)
        bound = d_in**-0.5
        b_down = uniform(-bound, bound) if method.lora_bias else zeros
        self.down_bias = parameter((m,), b_down, like) if method.bias else None
        self.up_bias = parameter((d_out,), zeros, like) if method.bias else None
        width = d_out if method.norm == "after" else d_in
        self.norm_weight = None if method.norm == "none" else parameter((width,), ones, like)
        self.norm_bias = None if method.norm == "none" else parameter((width,), zeros, like)
        if method.scaling != "fixed":
            shape = (1,) if method.scaling == "scalar" else (d_out,)
            self.scale: nn.Parameter | float = parameter(shape, lambda t, g: t.fill_(method.scale), like)
        else:
            self.scale = method.scale
        self.method = method
        self.source = {"after": "input", "parallel": "entry" if site.entry is not None else "input"}.get(
            method.position, "norm"
        )

    def branch(self, h: Tensor) -> Tensor:
        """A(h): [..., d_in] -> [..., d_out]."""
        m, shape = self.method, h.shape
        h = h.reshape(
            -1, shape[-1]
        )  # F.linear on more axes takes other paths, with other bits, when weights are frozen
        if m.norm == "before":
            h = F.layer_norm(h, h.shape[-1:], self.norm_weight, self.norm_bias)
        h = ACTIVATIONS[m.act](F.linear(h, self.down, self.down_bias))
        h = F.linear(F.dropout(h, m.dropout, self.training) if m.dropout else h, self.up, self.up_bias)
        if m.norm == "after":
            h = F.layer_norm(h, h.shape[-1:], self.norm_weight, self.norm_bias)
        h = h.reshape(*shape[:-1], -1)
        if m.drop_path and self.training:
            keep = torch.rand(h.shape[0], *[1] * (h.dim() - 1), device=h.device) >= m.drop_path
            h = h * keep.to(h.dtype) / (1 - m.drop_path)
        return h if isinstance(self.scale, float) and self.scale == 1 else h * self.scale

    def enter(self, x: Tensor) -> Tensor:
        """position "before": the norm and the skip both see r + A(r)."""
        self.runtime.state[self, "branch"] = a = self.branch(x)
        return x + a

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.method.position == "before":
            return y + self.runtime.state.pop((self, "branch"))
        return y + self.branch(y if self.method.position == "after" else x)

    def overrides(self, function: str) -> bool:
        return self.method.position == "before" if function == "enter" else super().overrides(function)
