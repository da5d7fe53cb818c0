"""SURM as an adapter: one structured square matrix in the place of a bottleneck.

Sehanobish et al. 2024, "Structured Unrestricted-Rank Matrices for Parameter Efficient Fine-tuning", arXiv 2406.17740,
section 4.2.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from graftwork.core.adapter import Part
from graftwork.core.fields import choice, positive, where
from graftwork.core.initial import parameter, zeros
from graftwork.core.method import Method, method
from graftwork.core.site import Site

from ..weight.forms.structured import KINDS, Structured, check, count
from .forms.nonlinear import ACTIVATIONS
from .forms.residual import Branch


@method("surm_adapter")
@dataclass(frozen=True)
class SURMAdapter(Method):
    """h + g(M h) + c on the output h [..., d] of a sub-layer, M [d, d] as of `surm`.  Identity at init (M = 0, c = 0).

    kind, r, k: of M.  act: g.  Parameters: those of M, and d.
    When: as surm, on activations.
    """

    kind: str = choice("circulant", *KINDS)
    r: int = positive(8)
    k: int = positive(2)
    act: str = choice("gelu", *ACTIVATIONS)
    at: str = where("attn, mlp | linear | conv")

    lr = 5e-3

    def build(self, site: Site, part: Part) -> StructuredBranch:
        check(self.kind, site.d, site.d, self.r, f"{self} at {site.key}")
        return StructuredBranch(self, site)

    def count(self, site: Site) -> int:
        return count(self.kind, site.d, site.d, self.k) + site.d


class StructuredBranch(Branch):
    """structure = M, shift = c [d]."""

    def __init__(self, method: SURMAdapter, site: Site) -> None:
        super().__init__("after", site)
        like = site.like
        self.structure = Structured(method.kind, site.d, site.d, method.r, method.k, like)
        self.shift = parameter((site.d,), zeros, like)
        self.act = method.act

    def branch(self, h: Tensor) -> Tensor:
        return ACTIVATIONS[self.act](self.structure(h).to(h.dtype)) + self.shift
