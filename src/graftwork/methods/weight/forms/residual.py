"""A low-rank pair beside the frozen pair that it started as: the base weight stays what it is, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from graftwork.core.adapter import Part
from graftwork.core.delta import WeightDelta
from graftwork.core.errors import GraftError
from graftwork.core.initial import Initial, tensor, values
from graftwork.core.plan import Host
from graftwork.core.weight import Weight
from graftwork.products.lowrank import low_rank


class Residual(WeightDelta):
    """W' = W + s (B A - B_0 A_0),  down = A [*batch, r, in], up = B [*batch, out, r] trained, first_down = A_0 and
    first_up = B_0 frozen.

    dropout: on the input of A, in training only; the frozen term stands for a part of W, whose input is not dropped.
    settled: the pair has its place.  seen: told of every input x [..., in], None outside of a calibration.
    """

    lasting = True
    first_down: Tensor
    first_up: Tensor

    def __init__(self, w: Weight, r: int, scale: float, dropout: float, down: Initial, up: Initial) -> None:
        super().__init__()
        self.down, self.up = w.parameter(r, w.d_in, down), w.parameter(w.d_out, r, up)
        self.scale, self.dropout = scale, dropout
        for name in ("down", "up"):
            started = self.get_parameter(name).detach()
            self.register_buffer(f"first_{name}", tensor(tuple(started.shape), values(started), w.like))
        self.settled = True
        self.seen: Callable[[Tensor], None] | None = None

    def pair(self) -> tuple[Tensor, Tensor]:
        """[A; A_0] [*batch, 2 r, in] and [B, -B_0] [*batch, out, 2 r]: a plain LoRA of twice the rank on W."""
        return torch.cat([self.down, self.first_down], dim=-2), torch.cat([self.up, -self.first_up], dim=-1)

    def factors(self) -> tuple[Tensor, Tensor]:
        down, up = self.pair()
        return down, self.scale * up

    def linear(self, x: Tensor, base: Callable[[Tensor], Tensor], host: Host) -> Tensor:
        if self.seen is not None:
            self.seen(x)
        elif not self.settled and self.training and torch.is_grad_enabled():
            raise GraftError(
                f"train the adapter at {self.key}", "its factors have no place yet", "call gw.calibrate first"
            )
        if not (self.dropout and self.training):
            return low_rank(x, base, host, *self.pair(), self.scale)
        y = low_rank(x, base, host, self.down, self.up, self.scale, self.dropout)
        taken = F.linear(F.linear(x, self.first_down), self.first_up)
        return torch.sub(y, taken.to(y.dtype), alpha=self.scale)

    @torch.no_grad()
    def settle(self, down: Tensor, up: Tensor) -> None:
        """Start at this pair, which then is the frozen one, too."""
        for name, value in (("down", down), ("up", up)):
            p = self.get_parameter(name)
            p.copy_(value)
            self.get_buffer(f"first_{name}").copy_(p)
        self.settled = True

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        super().restore(tensors)
        self.settled = self.settled or bool(self.first_down.any())


def joined(part: Part) -> dict[str, dict[str, Tensor]]:
    """The tensors of the plain LoRA of twice the rank, by site."""
    pairs = {key: d.pair() for key, d in part.deltas.items() if isinstance(d, Residual)}
    return {key: {"down": down.detach(), "up": up.detach()} for key, (down, up) in pairs.items()}


def require_rank(method: object, w: Weight, r: int, key: str) -> None:
    """GraftError where the weight has fewer than r directions."""
    if r > min(w.d_in, w.d_out):
        found = f"a weight of {w.d_out} x {w.d_in}, which has no {r} directions"
        raise GraftError(f"{method} at {key}", found, f"choose at most {min(w.d_in, w.d_out)}, or other sites")
