"""OFT, COFT and OFTv2: the input of a frozen weight is rotated by a block-diagonal orthogonal matrix.

Qiu et al. 2023, "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", section 3.2 (the Cayley transform, blocks, COFT);
Qiu et al. 2025, "Orthogonal Finetuning Made Scalable", section 3 (the rotation of the input, and the truncated Neumann series).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from graftwork.core.adapter import Part
from graftwork.core.delta import WeightDelta
from graftwork.core.errors import GraftError
from graftwork.core.fields import flag, fraction, number, positive, where
from graftwork.core.initial import zeros
from graftwork.core.method import Method, method
from graftwork.core.plan import Host
from graftwork.core.site import Site
from graftwork.core.weight import Weight

from .forms.multiplied import width
from .forms.rotations import cayley, joined, turn, turned_weight


@method("oft")
@dataclass(frozen=True)
class OFT(Method):
    """y = W (x R) + b,  R = blockdiag(R_1 .. R_n),  R_i = (I + Q_i)(I - Q_i)^-1,  Q_i skew-symmetric [b, b].  Identity at init (Q =
    0); mergeable.

    Q_i holds q_i [b (b - 1) / 2] in its strict upper triangle, row by row, and its negative below. The bias is not rotated.
    A convolution's flattened filters are rotated (no patch of the input is), an embedding at its vectors.
    block_size: b; where it does not divide the input, the nearest divisor (of two, the smaller).  blocks: n, in its place.
    terms: t of the series  R_i = I + 2 Q + ... + 2 Q^(t-2) + Q^(t-1), which stands for the inverse.  exact: the inverse.
    share: one R_i for all blocks.  coft: ||Q_i|| (Frobenius) is held at or below eps / sqrt(n).
    block_dropout: share of the blocks that a training pass leaves unrotated, drawn anew each time (not with share).
    Parameters: n b (b - 1) / 2 per weight, b (b - 1) / 2 with share.
    Source: Qiu et al. 2023, arXiv 2306.07280; Qiu et al. 2025, arXiv 2506.19847.
    When: pretrained relations between neurons must survive fine-tuning (images, subject-driven generation); rotations do not
        change their angles.
    """

    block_size: int = positive(32)
    blocks: int | None = positive(None)
    terms: int = positive(5)
    exact: bool = flag(False)
    share: bool = flag(False)
    coft: bool = flag(False)
    eps: float = number(6e-5, low=0.0)
    block_dropout: float = fraction(0.0)
    at: str = where("q, v | linear | conv")

    mergeable = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share and self.block_dropout:
            raise GraftError(f"{self}", "one rotation for all blocks", "leave block_dropout or share out")

    def sizes(self, w: Weight) -> tuple[int, int]:
        """(n, b) at a weight."""
        d = width(w)
        wanted = self.blocks or self.block_size
        nearest = min((k for k in range(1, d + 1) if d % k == 0), key=lambda k: (abs(k - wanted), k))
        return (nearest, d // nearest) if self.blocks else (d // nearest, nearest)

    def build(self, site: Site, part: Part) -> Rotated:
        site.weight.require_matrix("oft", self.block_dropout)
        if self.sizes(site.weight)[1] == 1:
            found = f"{width(site.weight)} inputs, which make blocks of one number"
            raise GraftError(f"{self} at {site.key}", found, "choose a block_size nearer to one of its divisors")
        return Rotated(self, site.weight)

    def count(self, site: Site) -> int:
        n, b = self.sizes(site.weight)
        return site.weight.copies * (1 if self.share else n) * (b * (b - 1) // 2)

    def step(self, part: Part, progress: float) -> None:
        for delta in part.deltas.values() if self.coft else ():
            assert isinstance(delta, Rotated)
            with torch.no_grad():
                delta.q.copy_(delta.bounded())


class Rotated(WeightDelta):
    """q [*batch, n, b (b - 1) / 2], of one block where all share it."""

    lasting = True

    def __init__(self, method: OFT, w: Weight) -> None:
        super().__init__()
        (self.blocks, self.size), self.lookup = method.sizes(w), w.lookup
        self.q = w.parameter(1 if method.share else self.blocks, self.size * (self.size - 1) // 2, zeros)
        self.terms, self.block_dropout = None if method.exact else method.terms, method.block_dropout
        self.bound = method.eps / self.q.shape[-2] ** 0.5 if method.coft else None

    def bounded(self) -> Tensor:
        """q, scaled where ||Q_i||^2 = 2 |q_i|^2 is above the bound; its gradient is that of the scaled one, as if q had been scaled."""
        if self.bound is None:
            return self.q
        norm = self.q.detach().norm(dim=-1, keepdim=True) * 2**0.5
        return (self.q * (self.bound / norm.clamp_min(self.bound))).detach() + (self.q - self.q.detach())

    def rotation(self) -> Tensor:
        """R_1 .. R_n [*batch, n, b, b]."""
        above, q = torch.triu_indices(self.size, self.size, 1, device=self.q.device), self.bounded()
        upper = q.new_zeros(*q.shape[:-1], self.size**2).index_copy(-1, above[0] * self.size + above[1], q)
        upper = upper.unflatten(-1, (self.size, self.size))
        skew = upper - upper.mT
        made = cayley(skew) if self.terms is None else _series(skew, self.terms)
        return made.expand(*made.shape[:-3], self.blocks, self.size, self.size)

    def weight(self, w: Tensor) -> Tensor:
        return turned_weight(w, joined(self.rotation()), self.lookup)

    def linear(self, x: Tensor, base: Callable[[Tensor], Tensor], host: Host) -> Tensor:
        made = self.rotation()
        if self.block_dropout and self.training:
            off = torch.randperm(self.blocks, device=made.device)[: int(self.block_dropout * self.blocks)]
            eye = torch.eye(self.size, dtype=made.dtype, device=made.device)
            made = made.index_copy(0, off, eye.expand(len(off), -1, -1))
        return base(turn(x, joined(made)))

    def work(self) -> int:
        # the rotation, and the products it is made of, once a call
        return self.blocks * self.size**2 * (1 + self.size * (self.terms or 2))


def _series(q: Tensor, terms: int) -> Tensor:
    """I + 2 Q + ... + 2 Q^(t-2) + Q^(t-1) = (I + Q)(I + Q + ... + Q^(t-2))."""
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    if terms == 1:
        return eye.expand_as(q)
    summed = eye.expand_as(q)
    for _ in range(terms - 2):
        summed = eye + q @ summed
    return summed + q @ summed
