"""A block of rows and columns of a weight, which is trained, moved to where the loss feels it most, and leaves behind what it was.

Wang et al. 2025, "LoSiA", section 3, with the gradient of LoSiA-Pro.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from graftwork.core.delta import WeightDelta
from graftwork.core.initial import tensor, zeros
from graftwork.core.plan import Host
from graftwork.core.site import Site
from graftwork.products.lowrank import whole_update

from .difference import folded_places, spread_places
from .localise import largest_block, sensitivity
from .partial import partial_update


class Subnet(WeightDelta):
    """block [*batch, r, c] at the rows [*batch, r] and the columns [*batch, c];  left = dW without it [*batch, out, in], frozen.

    While it is looked at: mean = I and spread = U [*batch, out, in], otherwise empty.  since: steps since it was moved.
    """

    lasting = True
    rows: Tensor
    columns: Tensor
    left: Tensor
    mean: Tensor
    spread: Tensor
    since: Tensor

    def __init__(self, site: Site, r: int, c: int, period: int) -> None:
        super().__init__()
        w = site.weight
        self.block = w.parameter(r, c, zeros)
        self.register_buffer("left", tensor(w.shape, zeros, w.like))
        for name, whole, chosen in (("rows", w.d_out, r), ("columns", w.d_in, c)):
            self.register_buffer(name, _drawn((*w.batch, whole), chosen, self.left))
        for name in ("mean", "spread"):
            self.register_buffer(name, self.left.new_empty(0))
        self.register_buffer("since", torch.tensor(period, device="cpu"))  # Python's to decide on, also under "meta"
        self.looked_at = False
        self._probe: tuple[Tensor, ...] = ()  # a leaf whose gradient is that of the whole weight
        self._before: tuple[Tensor, ...] = ()  # the block before the optimiser's step, while its steps are shortened

    def update(self) -> Tensor:
        dense = self.into(self.left, self.block)
        if not (self.looked_at and self.training and torch.is_grad_enabled()):
            return dense
        if not self._probe:
            self._probe = (torch.zeros_like(dense, requires_grad=True),)
        return dense + self._probe[0]

    def linear(self, x: Tensor, base: Callable[[Tensor], Tensor], host: Host) -> Tensor:
        if self.looked_at and self.training and torch.is_grad_enabled():
            return whole_update(x, base, host, self.update())
        return partial_update(x, base, host, self.block, self, self.left)

    def into(self, w: Tensor, values: Tensor) -> Tensor:
        at = self.rows.long()[..., :, None] * w.shape[-1] + self.columns[..., None, :]
        return w.flatten(-2).scatter_add(-1, at.flatten(-2), values.flatten(-2)).view(w.shape)

    def seen(self, x: Tensor) -> Tensor:
        return x.index_select(-1, self.columns)

    def gradient(self, g: Tensor, seen: Tensor) -> Tensor:
        return g.index_select(-1, self.rows).t() @ seen

    @torch.no_grad()
    def shorten(self, period: int) -> None:
        """Take back the part of the optimiser's step that the warm-up does not allow: none of the first is left, all after T."""
        since = int(self.since)
        if since < period:
            (before,) = self._before or (torch.zeros_like(self.block),)
            self.block.copy_(before.lerp(self.block, since / period))
            self._before = (self.block.detach().clone(),)
        else:
            self._before = ()
        self.since.fill_(min(since + 1, period))

    @torch.no_grad()
    def observe(self, w: Tensor, beta1: float, beta2: float, taylor: str) -> None:
        """Take the sensitivity of every number of the weight w, as this step's gradient says it, into the averages."""
        if not self._probe or self._probe[0].grad is None:
            return
        g = self._probe[0].grad
        if dist.is_available() and dist.is_initialized():  # no optimiser's parameter: nobody else averages it
            dist.all_reduce(g)
            g.div_(dist.get_world_size())
        now = sensitivity((w + self.into(self.left, self.block)) * g, taylor)
        if not self.mean.numel():
            self.mean, self.spread = torch.zeros_like(now), torch.zeros_like(now)
        self.mean.lerp_(now, 1 - beta1)
        self.spread.lerp_((now - self.mean).abs(), 1 - beta2)
        self._probe[0].grad = None

    @torch.no_grad()
    def move(self) -> None:
        """To the block with the largest sum of I U; what was trained is left where it is."""
        if not self.mean.numel():
            return
        score = (self.mean * self.spread).flatten(0, -3) if self.mean.dim() > 2 else (self.mean * self.spread)[None]
        places = [largest_block(q, self.rows.shape[-1], self.columns.shape[-1]) for q in score]
        self.left.copy_(self.into(self.left, self.block))
        self.block.zero_()
        self.rows.copy_(torch.stack([r for r, _ in places]).view_as(self.rows))
        self.columns.copy_(torch.stack([c for _, c in places]).view_as(self.columns))
        self.mean, self.spread = self.mean.new_empty(0), self.spread.new_empty(0)
        self.since.zero_()
        self._probe = self._before = ()

    def folded(self) -> dict[str, Tensor]:
        """The stored form: places and values of dW where it is not zero, and where the block is."""
        whole = self.into(self.left, self.block.detach())
        return {**folded_places("left", whole, whole != 0), "rows": self.rows, "columns": self.columns}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the stored form, or the unfolded one with the state of the schedule."""
        dense = dict(tensors)
        if "index.left" in dense:
            dense["left"], _ = spread_places(dense, "left", self.left.shape, self.key)
            dense |= {"block": torch.zeros(self.block.shape), "since": self.since.clone()}
            dense |= {"mean": self.mean.new_empty(0), "spread": self.spread.new_empty(0)}
        for name in ("mean", "spread"):
            if name in dense and dense[name].shape == self.left.shape:
                self._buffers[name] = self.left.new_empty(self.left.shape)
        super().restore(dense)
        self._before = (self.block.detach().clone(),)


def _drawn(shape: tuple[int, ...], k: int, like: Tensor) -> Tensor:
    """k different places of each row, rising."""
    given = torch.empty(0, dtype=torch.float64, device=like.device)  # real numbers that hold every place

    def draw(t: Tensor, generator: torch.Generator | None) -> None:
        t.copy_(torch.rand(shape, generator=generator).argsort(-1)[..., :k].sort(-1).values)

    return tensor((*shape[:-1], k), draw, given).int()
