"""A matrix by its singular value decomposition, from which factors of any rank are taken.

|D - B A|^2, B A cut at rank r, is the sum of the squared singular values behind the r-th, and no other pair of that rank
loses less (Eckart and Young 1936).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST = torch.finfo(torch.float32).eps  # a singular value below this share of the largest is rounding


@dataclass(frozen=True)
class Spectrum:
    """D [*batch, out, in] = u diag(s) v, s falling, in float64."""

    u: Tensor
    s: Tensor
    v: Tensor

    @property
    def needed(self) -> int:
        """The numerical rank: the largest of the matrices'."""
        return int((self.s > SMALLEST * self.s[..., :1]).sum(-1).max())

    def energy(self, r: int) -> float:
        """The share of |D|^2 in the first r singular values; 1 where D is zero."""
        squares = self.s.square()
        whole = float(squares.sum())
        return float(squares[..., :r].sum()) / whole if whole else 1.0

    def rank(self, r: int | None = None, energy: float | None = None) -> int:
        """As many singular values as there are, at most r, and no more than keep this share of |D|^2; at least 1."""
        kept = self.needed
        if energy is not None:
            kept = next((k for k in range(kept + 1) if self.energy(k) >= energy), kept)
        return max(1, kept if r is None else min(kept, r))

    def factors(self, r: int) -> tuple[Tensor, Tensor]:
        """A = sqrt(s) v [*batch, r, in] and B = u sqrt(s) [*batch, out, r]."""
        root = self.s[..., :r].sqrt()
        return root[..., None] * self.v[..., :r, :], self.u[..., :r] * root[..., None, :]


def of_matrix(dense: Tensor) -> Spectrum:
    """Of D [*batch, out, in]."""
    return _settled(*torch.linalg.svd(dense.double(), full_matrices=False))


def of_factors(down: Tensor, up: Tensor) -> Spectrum:
    """Of D = up down, [*batch, out, r] and [*batch, r, in], by the decomposition of an r x r matrix; D is never made."""
    (q_up, r_up), (q_down, r_down) = torch.linalg.qr(up.double()), torch.linalg.qr(down.double().mT)
    u, s, v = torch.linalg.svd(r_up @ r_down.mT, full_matrices=False)
    return _settled(q_up @ u, s, v @ q_down.mT)


def _settled(u: Tensor, s: Tensor, v: Tensor) -> Spectrum:
    """One sign for each pair of vectors, whatever machine made them: the largest entry of v is positive."""
    sign = v.gather(-1, v.abs().argmax(-1, keepdim=True)).sign()
    sign = torch.where(sign == 0, 1.0, sign)
    return Spectrum(u * sign.mT, s, v * sign)
