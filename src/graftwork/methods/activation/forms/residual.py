"""The delta of bottleneck adapters, and where a residual branch can stand in a block (see `bottleneck`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftwork.core.delta import Delta
from graftwork.core.errors import GraftError
from graftwork.core.initial import ones, parameter, uniform, zeros
from graftwork.core.site import Site
from graftwork.products.dropout import drop

from .nonlinear import ACTIVATIONS, starts

if TYPE_CHECKING:
    from ..bottleneck import Bottleneck

POSITIONS = ("after", "parallel", "residual", "before", "sum")


def check_position(position: str, site: Site, asked: str) -> None:
    """GraftError where a branch cannot stand there."""
    if position in ("residual", "before", "sum") and site.norm is None and not (position == "sum" and _is_norm(site)):
        do = "use position='after' or 'parallel'"
        raise GraftError(asked, "no norm is known in front of this sub-layer", do)
    if position == "parallel" and site.entry is None and not site.weight.linear:
        found = f"the input of {type(site.module).__name__} has another layout than its output"
        raise GraftError(asked, found, "use position='after', or at='attn, mlp'")


def _is_norm(site: Site) -> bool:
    return site.role == "norm"


class Branch(Delta):
    """A residual branch `branch(h)` at one of the positions; a subclass says what the branch computes."""

    def __init__(self, position: str, site: Site) -> None:
        super().__init__()
        self.position, self.twice = position, position == "sum" and _is_norm(site)  # behind the residual add
        self.gate: nn.Module | None = None
        entry = "entry" if site.entry is not None else "input"
        self.reading = {"after": "y", "sum": "x + y"}.get(position, "x")
        self.source = {"after": "input", "parallel": entry}.get(position, "norm")

    def branch(self, h: Tensor) -> Tensor:
        """A(h): [..., d_in] -> [..., d_out]."""
        raise NotImplementedError

    def gated(self, h: Tensor) -> Tensor:
        """The branch, times its gate where it has one."""
        return self.branch(h) if self.gate is None else self.branch(h) * self.gate(h, self.runtime)

    def enter(self, x: Tensor) -> Tensor:
        """position "before": the norm and the skip both see r + A(r)."""
        self.runtime.state[self, "branch"] = a = self.gated(x)
        return x + a

    def amend(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        """position "sum" at a norm: x = a + r is edited by what the norm gives for it, and then passes the norm."""
        return x + self.gated(base(x))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.position == "before":
            return y + self.runtime.state.pop((self, "branch"))
        return y + self.gated(self.reads(x, y))

    def overrides(self, function: str) -> bool:
        if function in ("amend", "forward"):
            return self.twice == (function == "amend")
        return self.position == "before" if function == "enter" else super().overrides(function)


class Residual(Branch):
    """down = D, up = U, with their biases, norm and scale."""

    def __init__(self, method: Bottleneck, site: Site, like: Tensor | None = None) -> None:
        super().__init__(method.position, site)
        d_in, m, d_out = method.widths(site)
        like = site.like if like is None else like
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

    def branch(self, h: Tensor) -> Tensor:
        m, shape = self.method, h.shape
        h = h.reshape(
            -1, shape[-1]
        )  # F.linear on more axes takes other paths, with other bits, when weights are frozen
        if m.norm == "before":
            h = F.layer_norm(h, h.shape[-1:], self.norm_weight, self.norm_bias)
        h = ACTIVATIONS[m.act](F.linear(h, self.down, self.down_bias))
        h = F.linear(drop(h, m.dropout, self.training), self.up, self.up_bias)
        if m.norm == "after":
            h = F.layer_norm(h, h.shape[-1:], self.norm_weight, self.norm_bias)
        h = h.reshape(*shape[:-1], -1)
        if m.drop_path and self.training:
            keep = torch.rand(h.shape[0], *[1] * (h.dim() - 1), device=h.device) >= m.drop_path
            h = h * keep.to(h.dtype) / (1 - m.drop_path)
        h = h if isinstance(self.scale, float) and self.scale == 1 else h * self.scale
        return drop(h, m.out_dropout, self.training)
