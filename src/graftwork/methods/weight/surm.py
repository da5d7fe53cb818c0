"""SURM: an update of full rank and few parameters, a structured matrix.

Sehanobish et al. 2024, "Structured Unrestricted-Rank Matrices for Parameter Efficient Fine-tuning", arXiv 2406.17740,
section 4; arijitthegame/structured-matrices-PEFT, whose transforms lose the last number of an odd width, and whose
skew-circulant product takes the roots of z^(n+1) + 1 in the place of z^n + 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from graftwork.core.adapter import Part
from graftwork.core.delta import WeightDelta
from graftwork.core.fields import choice, fraction, number, positive, where
from graftwork.core.method import Method, method
from graftwork.core.plan import Host
from graftwork.core.site import Site
from graftwork.products.dropout import drop

from .forms.structured import KINDS, Structured, check, count


@method("surm")
@dataclass(frozen=True)
class SURM(Method):
    """W' = W + s M.  Identity at init; mergeable.  M, of two parts of which the second starts at zero:

    kind: "circulant" Circ(a * b), C[i, j] = c[(i - j) mod n] · "toeplitz" T(b) T(a), T[i, j] = v[|i - j|] ·
        "ldr" sum_i Circ(g_i) Skew(h_i), i = 1 to k (low displacement rank), S[i, j] = h[i - j], or -h[n + i - j] above the
        diagonal: all three on square weights, their products by FFT, n log n for each position ·
        "kronecker" kron(B, A), A [r, in / r], B [out / r, r]; r must divide both sizes.
    r: of kronecker.  k: of ldr.  scale: s (for kronecker the papers' alpha / r).  dropout: on the input of M, in
        training only.
    Init: a and h N(0, 0.02^2), A kaiming-uniform (a = sqrt 5); b, g and B zero.
    Parameters: 2 n; 2 n k with ldr; in + out with kronecker.
    When: square projections on long sequences, where the count shall be linear in the width and products go by FFT.
    """

    kind: str = choice("circulant", *KINDS)
    r: int = positive(8)
    k: int = positive(2)
    scale: float = number(1.0)
    dropout: float = fraction(0.0)
    at: str = where("q, k, v | linear | conv")

    mergeable = True
    lr = 5e-3

    def build(self, site: Site, part: Part) -> StructuredUpdate:
        w = site.weight
        w.require_matrix("surm", self.dropout)
        check(self.kind, w.d_in, w.d_out, self.r, f"{self} at {site.key}")
        return StructuredUpdate(self, site)

    def count(self, site: Site) -> int:
        w = site.weight
        return w.copies * count(self.kind, w.d_in, w.d_out, self.k)


class StructuredUpdate(WeightDelta):
    """structure: M."""

    lasting = True

    def __init__(self, method: SURM, site: Site) -> None:
        super().__init__()
        w = site.weight
        self.structure = Structured(method.kind, w.d_in, w.d_out, method.r, method.k, w.like, w.batch)
        self.scale, self.dropout = method.scale, method.dropout

    def update(self) -> Tensor:
        return self.scale * self.structure.matrix()

    def linear(self, x: Tensor, base: Callable[[Tensor], Tensor], host: Host) -> Tensor:
        y = base(x)
        seen = drop(x, self.dropout, self.training)
        return torch.add(y, self.structure(seen).to(y.dtype), alpha=self.scale)

    def work(self) -> int:
        return self.structure.work()
