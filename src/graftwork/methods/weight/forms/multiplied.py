"""Multiplication of a weight by matrices that differ from the identity by a thin product, on either side.

W' = (I + C D) W (I + P Q) differs from W by a low-rank product whose factors contain W:  W' - W = [W P, C] [Q; D W (I + P Q)].
So it is computed as LoRA's is, and no [in, in] matrix is ever formed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from graftwork.core.delta import WeightDelta
from graftwork.core.errors import GraftError
from graftwork.core.plan import Host
from graftwork.core.weight import Weight
from graftwork.products.dropout import drop
from graftwork.products.lowrank import low_rank

Pair = tuple[Tensor, Tensor]


class Multiplied(WeightDelta):
    """W' = (I + C D) W (I + P Q); the bias is not multiplied.  rank: columns of P and C together.

    dropout: on the input of the whole site, in training only.
    """

    lasting = True

    def __init__(self, rank: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.rank, self.dropout = rank, dropout

    def right(self) -> Pair | None:
        """P [*batch, in, k] and Q [*batch, k, in], or None for nothing on this side."""
        return None

    def left(self) -> Pair | None:
        """C [*batch, out, l] and D [*batch, l, out], or None for nothing on this side."""
        return None

    def difference(self, w: Tensor) -> Pair:
        """down [*batch, k + l, in] and up [*batch, out, k + l] with W' - W = up down."""
        downs, ups, right, left = [], [], self.right(), self.left()
        if right is not None:
            p, q = right
            ups.append(w @ p)
            downs.append(q)
        if left is not None:
            c, d = left
            seen = d @ w
            downs.append(seen if right is None else seen + (d @ ups[0]) @ downs[0])
            ups.append(c)
        return torch.cat(downs, -2), torch.cat(ups, -1)

    def weight(self, w: Tensor) -> Tensor:
        down, up = self.difference(w)
        return w + up @ down

    def linear(self, x: Tensor, base: Callable[[Tensor], Tensor], host: Host) -> Tensor:
        x = drop(x, self.dropout, self.training)
        down, up = self.difference(host.weight)
        return low_rank(x, base, host, down, up, 1.0)

    def work(self) -> int:
        d_out, d_in = self.view.shape[-2:]
        return self.rank * (d_in + d_out + d_in * d_out)  # the last: the factors, once a call


def width(w: Weight) -> int:
    """Size of the input of a site, which a method on the input side acts on; of an embedding, that of its vectors."""
    return w.d_out if w.lookup else w.d_in


def require_divisor(asked: str, parts: int, size: int, what: str) -> None:
    """GraftError unless `parts` (`what` they are) divides the size of a weight's axis."""
    if size % parts:
        like = [n for n in range(1, size + 1) if size % n == 0 and n % 2 == parts % 2] or [1]
        near = min(like, key=lambda n: (abs(n - parts), n))
        raise GraftError(asked, f"{parts} does not divide {size}", f"choose {what} that does, such as {near}")
