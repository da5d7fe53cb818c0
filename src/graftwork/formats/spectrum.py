"""An update of a weight as its singular value decomposition, from which factors of any rank are taken."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.site import Site

SMALLEST = torch.finfo(torch.float32).eps  # a singular value below this share of the largest is rounding
PROBES = (32, 128, 512)  # how many random vectors are tried


@dataclass(frozen=True)
class Spectrum:
    """dW [*batch, out, in] = u diag(s) v, in float64. cheap: its rank was known to be small."""

    site: Site
    u: Tensor
    s: Tensor
    v: Tensor
    cheap: bool

    @property
    def needed(self) -> int:
        """The numerical rank: the largest of the matrices'."""
        return int((self.s > SMALLEST * self.s[..., :1]).sum(-1).max())

    def rank(self, rank: int | None, energy: float | None) -> int:
        """How many singular values to keep: the share `energy` of their squares, at most `rank`; all that are needed."""
        kept = self.needed
        if energy is not None:
            share = self.s.square().cumsum(-1) / self.s.square().sum(-1, keepdim=True).clamp_min(1e-300)
            kept = min(kept, int((share < energy - 1e-12).sum(-1).max()) + 1)
        return kept if rank is None else min(kept, rank)

    def factors(self, kept: int, r: int) -> tuple[Tensor, Tensor]:
        """A [*batch, r, in] and B [*batch, out, r], zero behind the first `kept`."""
        root = torch.where(torch.arange(self.s.shape[-1]) < kept, self.s, 0).sqrt()
        down, up = root[..., None] * self.v, self.u * root[..., None, :]
        lack = max(0, r - root.shape[-1])
        down, up = nn.functional.pad(down, (0, 0, 0, lack)), nn.functional.pad(up, (0, lack))
        return down[..., :r, :], up[..., :r]

    def dense(self) -> Tensor:
        """dW."""
        return (self.u * self.s[..., None, :]) @ self.v


def of_matrix(site: Site, dense: Tensor) -> Spectrum:
    """Of dW [*batch, out, in]. One of low rank is found by its products with a few random vectors, far below the cost of all of it.

    Halko, Martinsson and Tropp 2011, algorithm 4.1; what is left outside of the range is checked, so nothing rests on chance.
    """
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
            return Spectrum(site, q @ u, s, v, False)
    u, s, v = torch.linalg.svd(dense, full_matrices=False)
    return Spectrum(site, u, s, v, False)


def of_factors(site: Site, down: Tensor, up: Tensor) -> Spectrum:
    """Of dW = up down, [*batch, out, r] and [*batch, r, in]: by the decomposition of an r x r matrix."""
    (q_up, r_up), (q_down, r_down) = torch.linalg.qr(up), torch.linalg.qr(down.mT)
    u, s, v = torch.linalg.svd(r_up @ r_down.mT, full_matrices=False)
    return Spectrum(site, q_up @ u, s, v @ q_down.mT, True)
