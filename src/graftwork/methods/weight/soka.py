"""SoKA: the leading terms of the weight's Kronecker-product SVD are trained, and the rest stays as it is.

"Singular Value Decomposition on Kronecker Adaptation for Large Language Model", 2025, arXiv 2506.15251; the Kronecker-product SVD:
Van Loan and Pitsianis 1993, "Approximation with Kronecker Products".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graftwork.core.adapter import Part
from graftwork.core.errors import GraftError
from graftwork.core.fields import number, positive, where
from graftwork.core.method import Method, method
from graftwork.core.site import Site

from .forms.kronecker_svd import KroneckerSVD, decomposed, sides

FLAT = 1e-6  # a spectrum that stays this near its chord, as a share of its largest value, has no elbow


@method("soka")
@dataclass(frozen=True)
class SoKA(Method):
    """W' = W - W_pr + sum_{k<=r} s_k U_k (x) V_k,  U_k [m1, n1],  V_k [out / m1, in / n1].  Identity at init; mergeable.

    At the start the sum is W_pr, the first r terms of W = sum_k s_k U_k (x) V_k, which come from the SVD of the rearranged weight
    [m1 n1, out in / (m1 n1)]; all of s, U and V are trained, and W_pr, which is kept beside them, is not. m1 and n1 are the divisors
    nearest to sqrt(out) and sqrt(in).
    r: number of terms; None takes for each weight the smaller of those that hold `tau` of its squared singular values and those before
        the elbow of its spectrum, at most r_max.
    Stored: s, U, V and the first s; W_pr is computed from W again, which must have those singular values.
    Parameters: r (m1 n1 + out in / (m1 n1) + 1) per weight.  Source: arXiv 2506.15251; how r is picked is in part our reading.
    When: a start in the weight's own Kronecker terms, for low-rank adaptation that begins faster.
    """

    r: int | None = positive(None)
    tau: float = number(0.9, low=0.0, high=1.0)
    r_max: int = positive(128)
    at: str = where("q, v | linear | conv")

    mergeable = True
    lr = 5e-4

    def build(self, site: Site, part: Part) -> KroneckerSVD:
        site.weight.require_matrix("soka")
        rows, columns = self.sizes(site)
        if self.r is not None and self.r > min(rows, columns):
            found = f"a weight of {site.weight.d_out} x {site.weight.d_in}, which has {min(rows, columns)} terms"
            raise GraftError(f"{self} at {site.key}", found, "choose a smaller r")
        # on the meta device there is nothing to decompose
        spectrum = None if site.dense.is_meta else decomposed(site, self.r)
        r = self.terms(site) if spectrum is None else self.r or self.kept(spectrum.s)
        return KroneckerSVD(site.weight, r, spectrum)

    def sizes(self, site: Site) -> tuple[int, int]:
        """(m1 n1, out in / (m1 n1))."""
        (m1, n1), (m2, n2) = sides(site.weight)
        return m1 * n1, m2 * n2

    def terms(self, site: Site) -> int:
        """r at this site; where it is picked, the spectrum must be there (on the meta device: the most there may be)."""
        if self.r is not None:
            return self.r
        most = min(*self.sizes(site), self.r_max)
        if site.dense.is_meta:
            return most
        return self.kept(decomposed(site, None).s)

    def kept(self, s: Tensor) -> int:
        """r for the singular values s [*batch, K]: of several matrices the largest."""
        return min(max(picked(row, self.tau) for row in s.reshape(-1, s.shape[-1])), self.r_max)

    def count(self, site: Site) -> int:
        return site.weight.copies * self.terms(site) * (sum(self.sizes(site)) + 1)


def picked(s: Tensor, tau: float) -> int:
    """How many of the falling singular values s [K] to keep: the smaller of what holds the share tau of their squares, and elbow."""
    share = s.double().square().cumsum(0) / s.double().square().sum()
    energy = int((share < tau - 1e-9).sum()) + 1
    return max(1, min(energy, elbow(s)))


def elbow(s: Tensor) -> int:
    """The number of values before the one farthest from the chord between the first and the last; K for a straight line."""
    n = len(s)
    chord = torch.linspace(1, 0, n, dtype=s.dtype, device=s.device) * (s[0] - s[-1]) + s[-1]
    distance = (s - chord).abs()  # the distance to the line is this times a constant
    return n if float(distance.max()) <= FLAT * float(s[0]) else max(1, int(distance.argmax()))
