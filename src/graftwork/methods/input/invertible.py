"""Invertible adapters: a bijection of the embeddings, undone in front of the LM head.

Pfeiffer et al. 2020, "MAD-X: An Adapter-Based Framework for Multi-Task Cross-Lingual Transfer", arXiv 2005.00052.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from graftwork.core.adapter import Part
from graftwork.core.delta import Delta
from graftwork.core.errors import GraftError
from graftwork.core.fields import choice, number, positive, where
from graftwork.core.method import Method, method
from graftwork.core.site import Site

from ..activation.forms.nonlinear import ACTIVATIONS
from .forms.coupling import Glow, Nice, halves


@method("invertible")
@dataclass(frozen=True)
class Invertible(Method):
    """e -> f(e) where the sequence is embedded, h -> f^-1(h) in front of the LM head.  e = [e1 ; e2], halves of width d/2:

    coupling: "nice" o1 = e1 + F(e2), o2 = e2 + G(o1), undone by e2 = o2 - G(o1), e1 = o1 - F(e2); volume-preserving;
        "glow" o1 = c(s) e1 + t with [s, t] = F(e2), o2 = c(s) e2 + t with [s, t] = G(o1), c(s) = exp(3.18 atan(s / 5)).
        F, G = W_2 act(W_1 x + b_1) + b_2, hidden width d/2 // reduction.
    The embeddings are edited with all that the backbone adds to them, behind their norm, as in AdapterHub's library (see `embedded` in
    `graftwork anatomy`); in an encoder-decoder those of the encoder. Without an LM head (a task head) there is no inverse.
    In a stack the adapters' inverses run in the opposite order. It belongs to no layer.
    Init: W N(0, init_std^2), b zero: near the identity.
    Parameters: "nice" 2 (2 (d/2) m + m + d/2), m = d/2 // reduction; "glow" 2 (3 (d/2) m + m + d).  Source: section 4.3.
    When: another language's tokens must be read and written by a backbone that saw few of them (as a part of MAD-X).
    """

    coupling: str = choice("nice", "nice", "glow")
    reduction: int = positive(2)
    act: str = choice("relu", *ACTIVATIONS)
    init_std: float = number(0.02, low=0.0)
    at: str = where("embedded")

    identity = False
    layered = False

    def build(self, site: Site, part: Part) -> Delta:
        if site.role != "embedded":
            raise GraftError(f"{self} at {site.key}", "no place where a sequence is embedded", "use at='embedded'")
        return Bijection(self, site, part)

    def count(self, site: Site) -> int:
        outputs = 2 if self.coupling == "glow" else 1  # scale and shift, or the shift alone
        total = 0
        for d_in, d_out in (halves(site.d)[::-1], halves(site.d)):
            m = max(1, d_in // self.reduction)
            total += m * d_in + m + outputs * d_out * (m + 1)
        return total


def like(site: Site, part: Part) -> Tensor | None:
    """A tensor of the tower's dtype and device: what embeds its sequence may have none of its own (a dropout)."""
    towers = [s.module for s in part.anatomy.of("entry") if s.tower == site.tower]
    return next((p for module in (site.module, *towers) for p in module.parameters()), None)


class Bijection(Delta):
    """coupling: f."""

    def __init__(self, method: Invertible, site: Site, part: Part) -> None:
        super().__init__()
        kind = Glow if method.coupling == "glow" else Nice
        self.coupling = kind(site.d, method.reduction, method.act, method.init_std, like(site, part))
        self.undone = site.unembed is not None

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.coupling(y)

    def enter(self, x: Tensor) -> Tensor:
        return self.coupling.inverse(x)

    def overrides(self, function: str) -> bool:
        return self.undone if function == "enter" else super().overrides(function)
