"""SSF: a trained scale and shift for every channel behind every operation of the backbone.

Lian et al. 2022, "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning", arXiv 2210.08823, eq. 3 and 5;
dongzelian/SSF. That code guesses the channel axis from sizes, and takes the wrong one where an image is as wide as it is deep;
here it is the axis of the weight's rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvTransposeNd

from graftwork.core.adapter import Part
from graftwork.core.delta import Delta, Diagonal, WeightDelta
from graftwork.core.errors import GraftError
from graftwork.core.fields import choice, number, where
from graftwork.core.initial import Initial, normal, ones, zeros
from graftwork.core.method import Method, method
from graftwork.core.plan import Host
from graftwork.core.site import Site

from .forms.biases import require_bias


@method("ssf")
@dataclass(frozen=True)
class SSF(Method):
    """h' = g * h + c for the output h of every operation, channel by channel,  g [d], c [d].  Mergeable.

    As a weight: W' = diag(g) W and b' = g * b + c for linear maps and convolutions, where a layer without a bias gets one;
    the same of a norm's gain and bias; of an embedding every vector. A norm without a bias (RMSNorm) has its output edited, and
    is not merged.
    init: "identity" g = 1, c = 0;  "official" g ~ N(1, init_std^2), c ~ N(0, init_std^2), which is near the backbone.
    at: by default patch embedding, linear maps, convolutions and norms: all that has a weight.
    When: vision backbones, also convolutional ones, that must cost nothing extra once merged, at a fifth of a percent of them.
    Parameters: 2 d per operation; ViT-B/16: 205,824.  Source: Lian et al. 2022, section 3.2.
    """

    init: str = choice("identity", "identity", "official")
    init_std: float = number(0.02, low=0.0)
    at: str = where("any")

    mergeable = True

    @property
    def identity(self) -> bool:  # type: ignore[override]
        """Unless the official draws are asked for."""
        return self.init == "identity"

    def build(self, site: Site, part: Part) -> ScaleShift | EditedOutput | None:
        if site.module._parameters.get(site.param) is None:
            return None  # a class token, a table of positions
        w, do = site.weight, "choose linear layers, convolutions, norms or embeddings"
        if not w.is_matrix and w.bias is None:
            return EditedOutput(self, site)
        if isinstance(site.module, _ConvTransposeNd):
            raise GraftError(f"{self} at {site.key}", "a transposed convolution, whose rows are not its channels", do)
        if not w.lookup:
            require_bias(str(self), site, do)
        return ScaleShift(self, site)

    def starts(self) -> tuple[Initial, Initial]:
        """The initial values of g and c."""
        if self.init == "identity":
            return ones, zeros

        def around_one(t: Tensor, generator: torch.Generator | None) -> None:
            t.normal_(1.0, self.init_std, generator=generator)

        return around_one, normal(self.init_std)

    def count(self, site: Site) -> int:
        return 0 if site.module._parameters.get(site.param) is None else 2 * site.weight.d_out


class ScaleShift(WeightDelta):
    """scale = g [d], shift = c [d], as a change of the weight and the bias."""

    lasting = True

    def __init__(self, method: SSF, site: Site) -> None:
        super().__init__()
        scale, shift = method.starts()
        self.scale, self.shift = site.weight.vector(site.d, scale), site.weight.vector(site.d, shift)

    def weight(self, w: Tensor) -> Tensor:
        return w * (self.scale[:, None] if self.view.is_matrix else self.scale)

    def adapted(self, name: str, stored: Tensor | None) -> Tensor | None:
        """Of an embedding every vector [d], however many there are by now: it has no bias that could hold c."""
        return (
            stored * self.scale + self.shift
            if self.view.lookup and stored is not None
            else super().adapted(name, stored)
        )

    def bias(self, b: Tensor | None) -> Tensor | None:
        return self.shift if b is None else self.scale * b + self.shift

    def diagonal(self) -> Diagonal | None:
        return None, self.scale, self.shift

    def linear(self, x: Tensor, base: Callable[[Tensor], Tensor], host: Host) -> Tensor:
        y = base(x)
        return torch.addcmul(self.shift.to(y.dtype), y, self.scale.to(y.dtype))


class EditedOutput(Delta):
    """scale = g [d], shift = c [d], where no weight can hold them."""

    reading = "y"

    def __init__(self, method: SSF, site: Site) -> None:
        super().__init__()
        scale, shift = method.starts()
        self.scale, self.shift = site.weight.vector(site.d, scale), site.weight.vector(site.d, shift)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.addcmul(self.shift.to(y.dtype), y, self.scale.to(y.dtype))
