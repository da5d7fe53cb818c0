"""From a vector to an image, and the image added to another: the decoder of `blackvip` at work."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftwork.core.delta import Delta
from graftwork.core.errors import GraftError
from graftwork.core.initial import ones, parameter, tensor, uniform, zeros
from graftwork.core.site import Site

if TYPE_CHECKING:
    from ..blackvip import BlackVIP

WIDTHS = (64, 32, 32, 16)  # channels behind each stage but the last
STAGES = len(WIDTHS) + 1


def layout(source: int, stages: int) -> list[tuple[int, int, int, int]]:
    """(channels in, channels between, groups, channels out) of each stage but the last, from `source` channels."""
    plan: list[tuple[int, int, int, int]] = []
    c = source
    for width in WIDTHS[: stages - 1]:
        between, groups = (c, c) if plan else (WIDTHS[0], min(c, WIDTHS[0]))
        plan.append((c, between, groups, width))
        c = width
    return plan


class Stage(nn.Module):
    """spread [c, between / groups, 2, 2] with its bias, joined [between, out, 1, 1], and a norm's weight, bias and statistics."""

    mean: Tensor
    variance: Tensor

    def __init__(self, c: int, between: int, groups: int, out: int, like: Tensor) -> None:
        super().__init__()
        own, across = (between // groups * 4) ** -0.5, out**-0.5  # torch's bounds, of the fans in as it counts them
        self.spread = parameter((c, between // groups, 2, 2), uniform(-own, own), like)
        self.spread_bias = parameter((between,), uniform(-own, own), like)
        self.joined = parameter((between, out, 1, 1), uniform(-across, across), like)
        self.weight, self.bias = parameter((out,), ones, like), parameter((out,), zeros, like)
        self.register_buffer("mean", tensor((out,), zeros, like))
        self.register_buffer("variance", tensor((out,), ones, like))
        self.groups = groups

    def forward(self, h: Tensor, batch_norm: bool) -> Tensor:
        """[batch, c, n, n] -> [batch, out, 2 n, 2 n]."""
        h = F.conv_transpose2d(h, self.spread, self.spread_bias, stride=2, groups=self.groups)
        h = F.conv_transpose2d(h, self.joined)
        if batch_norm:
            h = F.batch_norm(h, self.mean, self.variance, self.weight, self.bias, self.training)
        else:
            h = F.instance_norm(h, weight=self.weight, bias=self.bias)
        return F.gelu(h)


class Drawn(Delta):
    """trigger = t, stages, last [16, 3, 2, 2]."""

    def __init__(self, method: BlackVIP, site: Site) -> None:
        super().__init__()
        self.method, like = method, site.like
        plan = layout(method.src_dim // method.grid**2, method.stages)
        self.trigger = parameter((method.src_dim - method.features,), uniform(0.0, 0.1), like)
        self.stages = nn.ModuleList(Stage(*sizes, like) for sizes in plan)
        bound = (3 * 4) ** -0.5
        self.last = parameter((plan[-1][-1], 3, 2, 2), uniform(-bound, bound), like)
        self.low = [-m / s for m, s in zip(method.mean, method.std, strict=True)]
        self.high = [(1 - m) / s for m, s in zip(method.mean, method.std, strict=True)]

    def amend(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        """Images [batch, height, width, 3]."""
        prompt = self.decode(self.seen(x)).movedim(1, -1)
        if prompt.shape != x.shape:
            found = f"images {list(x.shape[1:])}, prompts {list(prompt.shape[1:])}"
            do = "give a grid and stages with grid * 2^stages pixels"
            raise GraftError(f"{self.method} at {self.key}", found, do)
        low, high = (x.new_tensor(bounds) for bounds in (self.low, self.high))
        return (x + self.method.eps_p * prompt.to(x.dtype)).clamp(low, high)

    def seen(self, x: Tensor) -> Tensor:
        """z [batch, features]."""
        if self.method.encoder == "pixels":
            return F.adaptive_avg_pool2d(x.movedim(-1, 1), self.method.side).flatten(1)
        z = self.context("features")
        if not isinstance(z, Tensor) or z.shape != (x.shape[0], self.method.features):
            found = f"features {list(z.shape) if isinstance(z, Tensor) else z} for {x.shape[0]} images"
            do = f"give what a frozen encoder sees, [batch, {self.method.features}]: gw.context(model, features=...)"
            raise GraftError(f"{self.method} at {self.key}", found, do)
        return z.detach()

    def decode(self, z: Tensor) -> Tensor:
        """The prompts [batch, 3, size, size]."""
        h = torch.cat([z.to(self.trigger.dtype), self.trigger.expand(z.shape[0], -1)], 1)
        h = h.reshape(z.shape[0], -1, self.method.grid, self.method.grid)
        for stage in self.stages:
            h = stage(h, self.method.norm == "batch")
        return F.conv_transpose2d(h, self.last, stride=2)
