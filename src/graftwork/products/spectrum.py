"""A matrix by its singular value decomposition, from which factors of any rank are taken.

|D - B A|^2, B A cut at rank r, is the sum of the squared singular values behind the r-th, and no other pair of that rank
loses less (Eckart and Young 1936).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST = torch.finfo(torch.float32).eps  # a singular value below this share of the largest is rounding
PROBES = (32, 128, 512)  # how many random vectors are tried


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
        """How many singular values to keep: the share `energy` of the squares of every matrix, at most r; all that are needed."""
        kept = self.needed
        if energy is not None:
            share = self.s.square().cumsum(-1) / self.s.square().sum(-1, keepdim=True).clamp_min(1e-300)
            kept = min(kept, int((share < energy - 1e-12).sum(-1).max()) + 1)
        return kept if r is None else min(kept, r)

    def factors(self, kept: int, r: int | None = None) -> tuple[Tensor, Tensor]:
        """A = sqrt(s) v [*batch, r, in] and B = u sqrt(s) [*batch, out, r], zero behind the first `kept`; r: None takes `kept`."""
        root, r = self.s[..., :kept].sqrt(), kept if r is None else r
        down, up = root[..., None] * self.v[..., :kept, :], self.u[..., :kept] * root[..., None, :]
        lack = r - root.shape[-1]
        return F.pad(down, (0, 0, 0, lack)), F.pad(up, (0, lack))

    @property
    def dense(self) -> Tensor:
        """D."""
        return (self.u * self.s[..., None, :]) @ self.v


def of_matrix(dense: Tensor) -> Spectrum:
    """Of D [*batch, out, in]. One of low rank is found by its products with a few random vectors, far below the cost of all of it.

    Halko, Martinsson and Tropp 2011, algorithm 4.1; what is left outside of the range is checked, so nothing rests on chance.
    """
    dense = dense.double()
    generator = torch.Generator().manual_seed(0)
    for k in PROBES:
        if 4 * k > min(dense.shape[-2:]):
            break
        probes = torch.randn(dense.shape[-1], k, generator=generator, dtype=dense.dtype)
        q = torch.linalg.qr(dense @ probes).Q
        inner = q.mT @ dense
        left, whole = ((t * t).sum((-2, -1)) for t in (dense - q @ inner, dense))
        if bool((left <= (SMALLEST / 16) ** 2 * whole).all()):
            u, s, v = torch.linalg.svd(inner, full_matrices=False)
            return _settled(q @ u, s, v)
    return _settled(*torch.linalg.svd(dense, full_matrices=False))


def leading(dense: Tensor, r: int, steps: int = 10) -> Spectrum:
    """The first r singular values of D and their vectors, in float32 (float64 for D in float64), of D's own device.

    By subspace iteration from random vectors of one seed (Halko, Martinsson and Tropp 2011, algorithm 4.4): r + 10 of them, `steps`
    times; a matrix that has few more is decomposed whole.
    """
    dense = dense.to(torch.promote_types(dense.dtype, torch.float32))
    k = r + 10
    if 4 * k > min(dense.shape[-2:]):
        u, s, v = torch.linalg.svd(dense, full_matrices=False)
    else:
        generator = torch.Generator().manual_seed(0)
        probes = torch.randn(dense.shape[-1], k, generator=generator, dtype=dense.dtype).to(dense.device)
        q = torch.linalg.qr(dense @ probes).Q
        for _ in range(steps):
            q = torch.linalg.qr(dense @ torch.linalg.qr(dense.mT @ q).Q).Q
        u, s, v = torch.linalg.svd(q.mT @ dense, full_matrices=False)
        u = q @ u
    return _settled(u[..., :r], s[..., :r], v[..., :r, :])


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
