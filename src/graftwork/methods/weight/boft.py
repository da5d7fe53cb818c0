"""BOFT: the input of a frozen weight is rotated by a product of butterfly factors, and its outputs are rescaled.

Liu et al. 2023, "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization", section 4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from graftwork.core.adapter import Part
from graftwork.core.delta import WeightDelta
from graftwork.core.errors import GraftError
from graftwork.core.fields import fraction, positive, where
from graftwork.core.initial import ones, zeros
from graftwork.core.method import Method, method
from graftwork.core.plan import Host
from graftwork.core.site import Site
from graftwork.core.weight import Weight

from .forms.multiplied import width
from .forms.rotations import cayley, joined, side_by_side, turn, turned_weight


@method("boft")
@dataclass(frozen=True)
class BOFT(Method):
    """y = s * (W (x R)) + b,  R = F_(m-1) ... F_1 F_0,  F_i = P_i blockdiag(Q_i1 .. Q_iD) P_i^T,  D = in / b.  Identity at init (A = 0,
    s = 1); mergeable.

    Q = (I - S)(I + S)^-1,  S = (A - A^T) / 2,  A [m, D, b, b];  s [out]. P_i takes the halves of blocks in each stretch of b 2^i
    inputs, those with even numbers first (P_0 = I), so that R has blocks of b 2^(m-1), full for m = log2(D) + 1. A convolution's
    flattened filters are rotated; an embedding is rotated and rescaled at its vectors.
    block_size: b.  blocks: D, in its place.  factors: m.
    block_dropout: share of the blocks of one factor, drawn at random, that a training pass takes for the identity.
    Parameters: m in b + out per weight (of A only the skew part acts).  Source: Liu et al. 2023, arXiv 2311.06243.
    When: the geometry of pretrained features must survive (subject-driven images) and oft's blocks are too coarse; several
        factors make a step dear.
    """

    block_size: int = positive(4)
    blocks: int | None = positive(None)
    factors: int = positive(1)
    block_dropout: float = fraction(0.0)
    at: str = where("q, v | linear | conv")

    mergeable = True
    lr = 1e-2

    def size(self, w: Weight) -> int:
        """b at a weight."""
        return width(w) // self.blocks if self.blocks else self.block_size

    def build(self, site: Site, part: Part) -> Butterfly:
        w = site.weight
        w.require_matrix("boft", self.block_dropout)
        d, asked = width(w), f"{self} at {site.key}"
        b = self.size(w)
        if d % (self.blocks or b) or b < 2:
            raise GraftError(asked, f"an input of {d} numbers", "choose blocks of two or more numbers that divide it")
        if self.factors > 1 and (b % 2 or d % (b << (self.factors - 1))):
            found = f"an input of {d} numbers, not divisible by b 2^(m-1) = {b << (self.factors - 1)}, or an odd b"
            raise GraftError(asked, found, "choose fewer factors, or another even block_size")
        return Butterfly(self, w, b)

    def count(self, site: Site) -> int:
        w = site.weight
        return w.copies * (self.factors * width(w) * self.size(w) + w.d_out)


class Butterfly(WeightDelta):
    """blocks = A [*batch, m, D b, b], whose D blocks stand one below the other; scale = s [*batch, out]."""

    lasting = True

    def __init__(self, method: BOFT, w: Weight, b: int) -> None:
        super().__init__()
        self.m, self.size, self.d, self.lookup = method.factors, b, width(w), w.lookup
        self.blocks = w.parameter(method.factors * self.d, b, zeros)
        self.scale = w.vector(w.d_out, ones)
        self.block_dropout = method.block_dropout

    def orthogonal(self) -> Tensor:
        """Q [*batch, m, D, b, b]."""
        a = self.blocks.unflatten(-2, (self.m, -1, self.size))
        return cayley((a.mT - a) / 2)

    def rotation(self, q: Tensor) -> Tensor:
        """R as blocks of b 2^(m-1)."""
        made = side_by_side(q[..., 0, :, :, :], 1 << (self.m - 1))
        rows, chunk = made.flatten(-3, -2), made.shape[-1]
        for i in range(1, self.m):
            order = permutation(self.d, self.size, i).to(rows.device)
            sorted_rows = rows.index_select(-2, order.argsort()).unflatten(
                -2, (-1, self.size)
            )  # P_i^T of what is made so far
            rows = (q[..., i, :, :, :] @ sorted_rows).flatten(-3, -2).index_select(-2, order)
        return rows.unflatten(-2, (-1, chunk))

    def weight(self, w: Tensor) -> Tensor:
        made = joined(self.rotation(self.orthogonal()))
        return self.scale[..., None] * turned_weight(w, made, self.lookup)

    def linear(self, x: Tensor, base: Callable[[Tensor], Tensor], host: Host) -> Tensor:
        q = self.orthogonal()
        if self.block_dropout and self.training:
            off = torch.randperm(q.shape[1], device=q.device)[: int(self.block_dropout * q.shape[1])]
            one = torch.randint(self.m, (), device=q.device)
            eye = torch.eye(self.size, dtype=q.dtype, device=q.device)
            q = q.index_put((one.expand_as(off), off), eye)
        y = base(turn(x, joined(self.rotation(q))))
        s = self.scale.to(y.dtype)
        return y * s if host.bias is None else torch.addcmul(host.bias * (1 - s), y, s)

    def work(self) -> int:
        chunk = self.size << (self.m - 1)
        return self.d * chunk * (1 + self.size * self.m)  # the rotation, and its factors, once a call


def permutation(d: int, b: int, i: int) -> Tensor:
    """P_i as the place that each of d rows comes from: in every stretch of b 2^i the halves of blocks with even numbers come first."""
    return torch.arange(d).view(-1, 1 << i, 2, b // 2).transpose(1, 2).flatten()
