"""How a convolution slides: what an adapter beside it must copy, so that both outputs have one size."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from graftwork.core.errors import GraftError
from graftwork.core.site import Site

CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Window:
    """d_in -> d_out channels by a kernel that moves by `stride` over an input padded on both sides by `padding` (as `mode` says)."""

    d_in: int
    d_out: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    mode: str = "zeros"

    @property
    def spatial(self) -> bool:
        """Whether an output sees more than one position."""
        return max(self.kernel) > 1

    def resized(self, kernel: int, asked: str) -> Window:
        """Another kernel whose windows have the same centres. GraftError where there is none."""
        spare = [d * (k - kernel) for d, k in zip(self.dilation, self.kernel, strict=True)]
        padding = tuple(p - s // 2 for p, s in zip(self.padding, spare, strict=True))
        if any(s % 2 for s in spare):
            found = f"a kernel {list(self.kernel)}, whose centres it cannot have"
            raise GraftError(asked, found, "choose a kernel that is odd where this one is, or leave kernel=None")
        return Window(
            self.d_in, self.d_out, (kernel,) * len(self.kernel), self.stride, padding, self.dilation, self.mode
        )

    def odd(self, asked: str) -> Window:
        """Itself. GraftError where a side of the kernel is even, and so has no middle."""
        if any(k % 2 == 0 for k in self.kernel):
            found = f"an even kernel {list(self.kernel)}, which has no centre"
            raise GraftError(asked, found, "choose convolutions with odd kernels")
        return self

    def behind(self, asked: str) -> Window:
        """A kernel of the same size on what this one gives, which keeps its size."""
        one, padding = (1,) * len(self.kernel), tuple(k // 2 for k in self.odd(asked).kernel)
        return Window(self.d_out, self.d_out, self.kernel, one, padding, one)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        """x [batch, d_in, *space] with weight [out, d_in / groups, *kernel]."""
        padding = self.padding
        if self.mode != "zeros" or min(padding) < 0:
            mode = "constant" if self.mode == "zeros" or min(padding) < 0 else self.mode  # below zero it crops
            x, padding = F.pad(x, [p for p in reversed(padding) for _ in "lr"], mode), (0,) * len(padding)
        return CONVOLVE[len(padding)](x, weight, bias, self.stride, padding, self.dilation, groups)  # type: ignore[operator,no-any-return]


def window_of(conv: nn.Module, asked: str) -> Window:
    """The window of a convolution. GraftError for anything else."""
    if not isinstance(conv, _ConvNd) or isinstance(conv, _ConvTransposeNd):
        do = "choose convolutions, with at='conv' or a /regex/"
        raise GraftError(asked, f"{type(conv).__name__} is not a convolution", do)
    if isinstance(conv.padding, str):
        total = [
            d * (k - 1) if conv.padding == "same" else 0 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)
        ]
        if any(t % 2 for t in total):
            raise GraftError(asked, f"padding='same' around an even kernel {list(conv.kernel_size)}", "choose others")
        padding = tuple(t // 2 for t in total)
    else:
        padding = tuple(conv.padding)  # type: ignore[arg-type]
    return Window(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, padding, conv.dilation, conv.padding_mode
    )  # fmt: skip


def window_around(site: Site, asked: str) -> Window:
    """That of a whole block of convolutions: its widest kernel, all of its stride."""
    convs = [window_of(m, asked) for m in site.module.modules() if isinstance(m, _ConvNd)]
    if not convs:
        raise GraftError(asked, f"no convolution in {type(site.module).__name__}", "choose blocks of convolutions")
    widest, stride = max(convs, key=lambda w: w.kernel), max(w.stride for w in convs)
    one = (1,) * len(stride)
    return Window(convs[0].d_in, site.d, widest.kernel, stride, tuple(k // 2 for k in widest.kernel), one)
