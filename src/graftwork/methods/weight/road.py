"""RoAd: pairs of output features are rotated and scaled.

Liao and Monz 2024, "3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability", eq. 2 to 4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from graftwork.core.adapter import Part
from graftwork.core.delta import WeightDelta
from graftwork.core.errors import GraftError
from graftwork.core.fields import choice, positive, where
from graftwork.core.initial import ones, zeros
from graftwork.core.method import Method, method
from graftwork.core.plan import Host
from graftwork.core.site import Site

from .forms.multiplied import require_divisor

EACH = {"1": 1, "2": 2, "4": 4}  # angles for every two features


@method("road")
@dataclass(frozen=True)
class RoAd(Method):
    """h' = c1 * h + c2 * rot(h),  h = W x + b,  c1 = alpha cos(theta),  c2 = alpha sin(theta).  Identity at init (theta = 0, alpha = 1);
    mergeable.

    In each group of g features i is paired with i + g / 2:  rot(h)_i = -h_(i + g/2),  rot(h)_(i + g/2) = h_i.
    variant: "1", an angle and a scale for each pair (a rotation); "2", for each feature; "4", for each feature one of each for c1
        and another for c2, which come by groups: the g of c1, then the g of c2.
    group: g, even; it divides the outputs.
    Adapters that turn different features (the others at theta = 0, alpha = 1) commute, and can be trained apart.
    Parameters: out per weight for variant 1, 2 out for 2, 4 out for 4.  Source: Liao and Monz 2024, arXiv 2409.00119.
    When: many users in one batch: elementwise work only, no products of matrices; and tasks that shall occupy separate features.
    """

    variant: str = choice("1", *EACH)
    group: int = positive(64)
    at: str = where("q, k, v, o, gate, up, down | q, k, v, o, up, down | linear | conv")

    mergeable = True
    lr = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group % 2:
            raise GraftError(f"{self}", f"{self.group} features cannot be paired", "choose an even group")

    def build(self, site: Site, part: Part) -> Rotary:
        w = site.weight
        w.require_matrix("road")
        require_divisor(f"{self} at {site.key}", self.group, w.d_out, "a group")
        return Rotary(self, site)

    def count(self, site: Site) -> int:
        return site.weight.copies * EACH[self.variant] * site.weight.d_out


class Rotary(WeightDelta):
    """theta, alpha [*batch, out / 2, out or 2 out]."""

    lasting = True

    def __init__(self, method: RoAd, site: Site) -> None:
        super().__init__()
        w = site.weight
        self.paired, self.variant = method.group // 2, method.variant
        self.theta = w.vector(EACH[method.variant] * w.d_out // 2, zeros)
        self.alpha = w.vector(EACH[method.variant] * w.d_out // 2, ones)

    def columns(self) -> tuple[Tensor, Tensor]:
        """c1 and c2 [*batch, groups, 2, g / 2]."""
        first, second = (f(self.theta).mul(self.alpha) for f in (torch.cos, torch.sin))
        if self.variant == "1":
            shape = (-1, 1, self.paired)
            first, second = (c.unflatten(-1, shape).expand(*c.shape[:-1], -1, 2, -1) for c in (first, second))
        elif self.variant == "2":
            first, second = (c.unflatten(-1, (-1, 2, self.paired)) for c in (first, second))
        else:
            first = first.unflatten(-1, (-1, 2, 2, self.paired))[..., 0, :, :]
            second = second.unflatten(-1, (-1, 2, 2, self.paired))[..., 1, :, :]
        return first, second

    def weight(self, w: Tensor) -> Tensor:
        first, second = (c[..., None] for c in self.columns())
        pairs = w.unflatten(-2, (-1, 2, self.paired))  # [*batch, groups, 2, g / 2, in]
        return (first * pairs + second * _turned(pairs, -3)).flatten(-4, -2)

    def bias(self, b: Tensor | None) -> Tensor | None:
        return b if b is None else self.turned(b)

    def turned(self, h: Tensor) -> Tensor:
        """h' [.., out] from h [.., out]."""
        first, second = (c.to(h.dtype) for c in self.columns())
        pairs = h.unflatten(-1, (-1, 2, self.paired))
        return (first * pairs + second * _turned(pairs, -2)).flatten(-3)

    def linear(self, x: Tensor, base: Callable[[Tensor], Tensor], host: Host) -> Tensor:
        return self.turned(base(x))


def _turned(pairs: Tensor, dim: int) -> Tensor:
    """rot: minus the second of each pair, and the first."""
    a, b = pairs.unbind(dim)
    return torch.stack([-b, a], dim)
