"""Conv-Adapter: a bottleneck beside a convolution that keeps its locality.

Chen et al. 2022, "Conv-Adapter: Exploring Parameter Efficient Transfer Learning for ConvNets".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from graftwork.core.adapter import Part
from graftwork.core.delta import Delta
from graftwork.core.errors import GraftError
from graftwork.core.fields import choice, flag, number, positive, where
from graftwork.core.initial import constant, kaiming_uniform, parameter, uniform, zeros
from graftwork.core.method import Method, method
from graftwork.core.plan import channels_first
from graftwork.core.site import Site

from .forms.nonlinear import ACTIVATIONS
from .forms.window import Window, window_around, window_of


@method("conv_adapter")
@dataclass(frozen=True)
class ConvAdapter(Method):
    """y' = y + a * (U g(D * x + b_D) + b_U),  D [w, d_in / w, *kernel] (w groups),  U [d_out, w],  a [d_out].

    w = d_in // reduction.  D has the kernel, the stride, the padding and the dilation of the convolution it stands
        beside, so that both outputs have one size, and each bottleneck channel sees d_in / w input channels.
    position: "parallel" x is the convolution's input; "sequential" its output y (stride 1).  At a block ("at='block'")
        the same around the whole block, with its widest kernel and its stride: the paper's residual forms.
        The official ResNet adds behind the norm and the activation that follow the convolution, as a part of the model.
    kernel: None takes the convolution's, and leaves 1 x 1 convolutions alone; another one has the same centres.
    act: g ("gelu" for ConvNeXt).  grouped: False gives D one group.  scale: a at the start.
    init: "default" as torch's convolutions; "zero_up" U and b_U zero, the identity.
    Downsampling convolutions between stages: at="conv, /downsampling_layer.1/".
    Parameters per site, K the kernel's size: K d_in + w + w d_out + 2 d_out (K w d_in with one group).
    Source: Chen et al. 2022, arXiv 2208.07463, eq. 1; Hhhhhhao/Conv-Adapter.
    When: convolutional backbones, where an adapter must see neighbouring positions.
    """

    reduction: int = positive(8)
    kernel: int | None = positive(None)
    act: str = choice("relu", *ACTIVATIONS)
    position: str = choice("parallel", "parallel", "sequential")
    grouped: bool = flag(True)
    scale: float = number(1.0)
    init: str = choice("default", "default", "zero_up")
    at: str = where("conv")

    @property
    def identity(self) -> bool:  # type: ignore[override]
        """Only with init="zero_up"."""
        return self.init == "zero_up"

    def build(self, site: Site, part: Part) -> Local | None:
        window = self.window(site)
        return None if window is None else Local(self, site, window)

    def count(self, site: Site) -> int:
        window = self.window(site)
        if window is None:
            return 0
        w = self.width(window)
        seen = window.d_in // w if self.grouped else window.d_in
        return w * seen * math.prod(window.kernel) + w + w * window.d_out + 2 * window.d_out

    def width(self, window: Window) -> int:
        """w."""
        return max(1, window.d_in // self.reduction)

    def window(self, site: Site) -> Window | None:
        """How D slides at this site, or None where there is nothing to adapt."""
        asked = f"{self} at {site.key}"
        if site.role == "block":
            if not channels_first(site.module):
                found = (
                    f"{type(site.module).__name__} holds linear layers too: which axis has the channels is not known"
                )
                raise GraftError(asked, found, "choose its convolutions (at='conv')")
            window = window_around(site, asked)
        else:
            window = window_of(site.module, asked)
            if self.kernel is None and not window.spatial:
                return None
        window = window if self.kernel is None else window.resized(self.kernel, asked)
        window = window if self.position == "parallel" else window.behind(asked)
        if self.grouped and window.d_in % self.width(window):
            found = f"{window.d_in} channels do not go into {self.width(window)} groups"
            raise GraftError(asked, found, "choose another reduction, or grouped=False")
        return window


class Local(Delta):
    """down = D, up = U, their biases, scale = a."""

    def __init__(self, method: ConvAdapter, site: Site, window: Window) -> None:
        super().__init__()
        w, like = method.width(window), site.like
        self.window, self.groups, self.act = window, w if method.grouped else 1, method.act
        self.reading = "x" if method.position == "parallel" else "y"
        seen = window.d_in // self.groups
        fan = seen * math.prod(window.kernel)
        self.down = parameter((w, seen, *window.kernel), kaiming_uniform(fan_in=fan), like)
        self.down_bias = parameter((w,), uniform(-(fan**-0.5), fan**-0.5), like)
        shut = method.init == "zero_up"
        self.up = parameter((window.d_out, w), zeros if shut else kaiming_uniform(), like)
        self.up_bias = parameter((window.d_out,), zeros if shut else uniform(-(w**-0.5), w**-0.5), like)
        self.scale = parameter((window.d_out,), constant(method.scale), like)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.window.convolve(self.reads(x, y).movedim(-1, 1), self.down, self.down_bias, self.groups)
        return y + self.scale * F.linear(ACTIVATIONS[self.act](h.movedim(1, -1)), self.up, self.up_bias)
