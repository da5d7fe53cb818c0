"""ABBA: the update is the elementwise product of two low-rank matrices, the first of which starts at the weight itself.

Singhal et al. 2025, "ABBA: Highly Expressive Hadamard Product Adaptation for Large Language Models".
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from graftwork.core.adapter import Part
from graftwork.core.errors import GraftError
from graftwork.core.fields import choice, fraction, number, rank, where
from graftwork.core.initial import kaiming_uniform, made, zeros
from graftwork.core.method import Method, method
from graftwork.core.site import Site
from graftwork.products.spectrum import leading

from .forms.hadamard import Hadamard


@method("abba")
@dataclass(frozen=True)
class ABBA(Method):
    """W' = W + s (B1 A1) * (B2 A2), * elementwise,  A_i [r_i, in],  B_i [out, r_i].  Identity at init (B2 = 0); mergeable.

    r1, r2: ranks; that of the update reaches r1 r2, for the parameters of a LoRA of rank r1 + r2.
    scale: "code" s = sqrt(alpha1 alpha2);  "paper" s = alpha1 alpha2 / sqrt(r1 r2), which follows from LoRA's own.
    dropout: on the input, in training only (the published code has the option and never applies it).
    Init: B1 A1 is the best approximation of W of rank r1, its singular values halved between both (B1 = U sqrt S, A1 = sqrt S V^T);
    B2 zero; A2 kaiming-uniform (a = 0).
    Parameters: (r1 + r2) (in + out) per weight.  Source: Singhal et al. 2025, arXiv 2505.14238; CERT-Lab/abba.
    When: LoRA's rank limits what is learned (arithmetic, reasoning) and memory allows the weight to be decomposed once; of equal
        parameters it reaches rank r1 r2.
    """

    r1: int = rank(16)
    r2: int = rank(16)
    alpha1: float = number(32.0, low=0.0)
    alpha2: float = number(32.0, low=0.0)
    scale: str = choice("code", "code", "paper")
    dropout: float = fraction(0.0)
    at: str = where("q, k, v, o, gate, up, down | q, k, v, o, up, down | linear | conv")

    mergeable = True
    sized_by = ("r1", "r2")

    @property
    def s(self) -> float:
        """The factor of the update."""
        both = self.alpha1 * self.alpha2
        return both / (self.r1 * self.r2) ** 0.5 if self.scale == "paper" else both**0.5

    def build(self, site: Site, part: Part) -> Hadamard:
        w = site.weight
        w.require_matrix("abba", self.dropout)
        if self.r1 > min(w.d_in, w.d_out):
            found = f"a weight of {w.d_out} x {w.d_in}, whose rank is at most {min(w.d_in, w.d_out)}"
            raise GraftError(f"{self} at {site.key}", found, "choose a smaller r1, or other sites")
        halves = cache(lambda: leading(site.dense, self.r1).factors(self.r1))
        one = (
            w.parameter(w.d_out, self.r1, made(lambda: halves()[1])),
            w.parameter(self.r1, w.d_in, made(lambda: halves()[0])),
        )
        two = w.parameter(w.d_out, self.r2, zeros), w.parameter(self.r2, w.d_in, kaiming_uniform(0.0))
        return Hadamard(one, two, self.s, self.dropout)

    def count(self, site: Site) -> int:
        w = site.weight
        return w.copies * (self.r1 + self.r2) * (w.d_in + w.d_out)
