"""Coupling layers: bijections of vectors, each half changed by a network of the other (see `invertible`).

Dinh et al. 2014, "NICE", arXiv 1410.8516, eq. 10 (additive) and Kingma and Dhariwal 2018, "Glow", arXiv 1807.03039, table 1 (affine).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftwork.core.initial import normal, parameter, zeros

from ...activation.forms.nonlinear import ACTIVATIONS

CLAMP = 5.0  # the logarithm of a scale stays within +-0.636 pi / 2 * CLAMP


def halves(d: int) -> tuple[int, int]:
    """The widths of e1 and e2."""
    return d // 2, d - d // 2


class Network(nn.Module):
    """W_2 act(W_1 x + b_1) + b_2."""

    def __init__(self, d_in: int, d_out: int, reduction: int, act: str, std: float, like: Tensor | None) -> None:
        super().__init__()
        m = max(1, d_in // reduction)
        self.act = act
        self.down, self.up = (parameter(shape, normal(std), like) for shape in ((m, d_in), (d_out, m)))
        self.down_bias, self.up_bias = (parameter((width,), zeros, like) for width in (m, d_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(ACTIVATIONS[self.act](F.linear(x, self.down, self.down_bias)), self.up, self.up_bias)


class Nice(nn.Module):
    """o1 = e1 + F(e2),  o2 = e2 + G(o1)."""

    outputs = 1  # numbers that F and G give for each of those they change

    def __init__(self, d: int, reduction: int, act: str, std: float, like: Tensor | None) -> None:
        super().__init__()
        self.split = d1, d2 = halves(d)
        self.F = Network(d2, self.outputs * d1, reduction, act, std, like)
        self.G = Network(d1, self.outputs * d2, reduction, act, std, like)

    def forward(self, e: Tensor) -> Tensor:
        """f(e) [..., d]."""
        e1, e2 = e.split(self.split, dim=-1)
        o1 = self.changed(e1, self.F(e2))
        return torch.cat([o1, self.changed(e2, self.G(o1))], -1)

    def inverse(self, o: Tensor) -> Tensor:
        """f^-1(o) [..., d]."""
        o1, o2 = o.split(self.split, dim=-1)
        e2 = self.restored(o2, self.G(o1))
        return torch.cat([self.restored(o1, self.F(e2)), e2], -1)

    def changed(self, e: Tensor, given: Tensor) -> Tensor:
        """A half, changed by what the network of the other gives."""
        return e + given

    def restored(self, o: Tensor, given: Tensor) -> Tensor:
        """`changed` undone."""
        return o - given


class Glow(Nice):
    """o1 = c(s) e1 + t,  [s, t] = F(e2);  o2 = c(s) e2 + t,  [s, t] = G(o1);  c(s) = exp(0.636 CLAMP atan(s / CLAMP))."""

    outputs = 2

    def changed(self, e: Tensor, given: Tensor) -> Tensor:
        s, t = given.chunk(2, dim=-1)
        return log_scale(s).exp() * e + t

    def restored(self, o: Tensor, given: Tensor) -> Tensor:
        s, t = given.chunk(2, dim=-1)
        return (o - t) * (-log_scale(s)).exp()


def log_scale(s: Tensor) -> Tensor:
    """The logarithm of c(s): s near zero, and bounded."""
    return 0.636 * CLAMP * torch.atan(s / CLAMP)
