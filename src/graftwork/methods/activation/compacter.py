"""Compacter: bottleneck adapters whose matrices are sums of Kronecker products with small matrices shared by all of
them.

Karimi Mahabadi et al. 2021, "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers", arXiv 2106.04647, eq. 4 to 6:
    W = sum_i A_i (x) (s_i t_i),  A_i [n, n] shared,  s_i [k/n, r],  t_i [r, d/n];  y = x W + b
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graftwork.core.adapter import Part
from graftwork.core.errors import GraftError
from graftwork.core.fields import choice, count, flag, fraction, number, positive, where
from graftwork.core.method import Method, method, preset
from graftwork.core.site import Site

from ..weight.full import Full
from .forms.hypercomplex import Hypercomplex, Rule
from .forms.nonlinear import ACTIVATIONS
from .forms.residual import check_position


@method("phm")
@dataclass(frozen=True)
class PHM(Method):
    """y' = y + U(g(D(y))),  D: d -> m,  U: m -> d, each y W + b with W = sum_{i<n} A_i (x) B_i.

    n: size and number of the A_i; it divides d and m.  d: bottleneck width m; None takes the site's width // reduction.
    rank: B_i = s_i t_i of rank r; 0 trains B_i whole.  shared: one A [n, n, n] for every site and for both D and
        U; else one per matrix.
    position: "after" as above; "sum" y + U(g(D(y + r))), r the residual stream, as for bottlenecks.
    act: g.  dropout: after g.  Init: A N(0, init_std^2), s, t (or B) xavier-uniform with gain sqrt 2, biases 0: near
        the identity.
    Parameters per site: 2 r (d + m) + d + m (whole B_i: 2 d m / n + d + m); n^3 once (or 2 n^3 per site).
    When: bottleneck adapters whose matrices are stored as sums of Kronecker products.
    """

    n: int = positive(4)
    d: int | None = positive(None)
    reduction: int = positive(32)
    rank: int = count(1)
    shared: bool = flag(True)
    act: str = choice("gelu_new", *ACTIVATIONS)
    position: str = choice("after", "after", "sum")
    dropout: float = fraction(0.0)
    init_std: float = number(1e-4, low=0.0)
    at: str = where("self.attn, mlp | linear | conv")

    identity = False
    sized_by = ("reduction",)

    def width(self, site: Site) -> int:
        """m at this site, a multiple of n."""
        return self.d if self.d is not None else max(self.n, site.d // self.reduction // self.n * self.n)

    def build(self, site: Site, part: Part) -> Hypercomplex:
        m = self.width(site)
        if site.d % self.n or m % self.n:
            found = f"n={self.n} does not divide d={site.d} and m={m}"
            raise GraftError(f"{self} at {site.key}", found, "choose n that divides both")
        check_position(self.position, site, f"{self} at {site.key}")
        like = site.like
        rule = part.shared("rule", lambda: Rule(self, like)) if self.shared else None
        return Hypercomplex(self, site, m, like, rule)

    def reads(self, site: Site) -> int:
        return site.d

    def count(self, site: Site) -> int:
        d, m = site.d, self.width(site)
        weights = 2 * d * m // self.n if not self.rank else 2 * self.rank * (d + m)
        return weights + d + m + (0 if self.shared else 2 * self.n**3)

    def count_shared(self, sites: Sequence[Site]) -> int:
        return self.n**3 if self.shared else 0


@preset("compacter")
def Compacter(n: int = 4, reduction: int = 32, rank: int = 1, norms: bool = True) -> list[Method]:
    """PHM adapters after self-attention and feed-forward (none at cross-attention), and the backbone's layer norms
    trained.

    Parameters: n^3 + (2 r (d + m) + d + m) per adapter + the layer norms.  Source: section 3.2 and rabeehk/compacter.
    When: encoder-decoders on small data with a tenth of the adapters' parameters.
    """
    adapters = PHM(n=n, reduction=reduction, rank=rank)
    return [adapters, Full(at="norm")] if norms else [adapters]


@preset("compacter_pp")
def CompacterPP(n: int = 4, reduction: int = 32, rank: int = 1, norms: bool = True) -> list[Method]:
    """Compacter++: the adapters after the feed-forward layers only.

    When: as compacter, with half of its adapters.
    """
    adapters = PHM(n=n, reduction=reduction, rank=rank, at="mlp")
    return [adapters, Full(at="norm")] if norms else [adapters]
