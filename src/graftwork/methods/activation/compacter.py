"""Compacter: bottleneck adapters whose matrices are sums of Kronecker products with small matrices shared by all of
them.

Karimi Mahabadi et al. 2021, "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers", arXiv 2106.04647, eq. 4 to 6:
    W = sum_i A_i (x) (s_i t_i),  A_i [n, n] shared,  s_i [k/n, r],  t_i [r, d/n];  y = x W + b
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftwork.core.adapter import Part
from graftwork.core.delta import Delta
from graftwork.core.errors import GraftError
from graftwork.core.fields import choice, count, flag, fraction, number, positive, where
from graftwork.core.initial import normal, parameter, xavier_uniform, zeros
from graftwork.core.method import Method, method, preset
from graftwork.core.site import Site

from ..weight.full import Full
from .nonlinear import ACTIVATIONS


@method("phm")
@dataclass(frozen=True)
class PHM(Method):
    """y' = y + U(g(D(y))),  D: d -> m,  U: m -> d, each y W + b with W = sum_{i<n} A_i (x) B_i.

    n: size and number of the A_i; it divides d and m.  d: bottleneck width m; None takes the site's width // reduction.
    rank: B_i = s_i t_i of rank r; 0 trains B_i whole.  shared: one A [n, n, n] for every site and for both D and
        U; else one per matrix.
    act: g.  dropout: after g.  Init: A N(0, init_std^2), s, t (or B) xavier-uniform with gain sqrt 2, biases 0: near
        the identity.
    Parameters per site: 2 r (d + m) + d + m (whole B_i: 2 d m / n + d + m); n^3 once (or 2 n^3 per site).
    """

    n: int = positive(4)
    d: int | None = positive(None)
    reduction: int = positive(32)
    rank: int = count(1)
    shared: bool = flag(True)
    act: str = choice("gelu_new", *ACTIVATIONS)
    dropout: float = fraction(0.0)
    init_std: float = number(1e-4, low=0.0)
    at: str = where("self.attn, mlp | linear | conv")

    identity = False

    def width(self, site: Site) -> int:
        """m at this site, a multiple of n."""
        return self.d if self.d is not None else max(self.n, site.d // self.reduction // self.n * self.n)

    def build(self, site: Site, part: Part) -> Hypercomplex:
        m = self.width(site)
        if site.d % self.n or m % self.n:
            found = f"n={self.n} does not divide d={site.d} and m={m}"
            raise GraftError(f"{self} at {site.key}", found, "choose n that divides both")
        like = next(site.module.parameters())
        rule = part.shared("rule", lambda: Rule(self, like)) if self.shared else None
        return Hypercomplex(self, site.d, m, like, rule)

    def count(self, site: Site) -> int:
        d, m = site.d, self.width(site)
        weights = 2 * d * m // self.n if not self.rank else 2 * self.rank * (d + m)
        return weights + d + m + (0 if self.shared else 2 * self.n**3)

    def count_shared(self, sites: Sequence[Site]) -> int:
        return self.n**3 if self.shared else 0


class Rule(nn.Module):
    """a [n, n, n]: the matrices A_i."""

    def __init__(self, method: PHM, like: Tensor) -> None:
        super().__init__()
        self.a = parameter((method.n, method.n, method.n), normal(method.init_std), like)


class Linear(nn.Module):
    """x [.., k] -> y [.., d] = x sum_i A_i (x) B_i + b.  s [n, k/n, r], t [n, r, d/n]; whole B_i: s = B."""

    def __init__(self, method: PHM, k: int, d: int, like: Tensor, rule: Rule | None) -> None:
        super().__init__()
        n, r = method.n, method.rank
        init = xavier_uniform(2**0.5)
        self.s = parameter((n, k // n, r or d // n), init, like)  # B itself where it is whole
        self.t = None if not r else parameter((n, r, d // n), init, like)
        self.bias = parameter((d,), zeros, like)
        self.own = Rule(method, like) if rule is None else None
        # in a list, so that the shared rule is registered once, at the model's root
        self._rules = [rule if self.own is None else self.own]

    @property
    def a(self) -> Tensor:
        """A [n, n, n]."""
        (rule,) = self._rules
        assert rule is not None
        return rule.a

    def matrix(self) -> Tensor:
        """W [k, d]; the forward pass never builds it."""
        b = self.s if self.t is None else self.s @ self.t
        return torch.einsum("iab,ipq->apbq", self.a, b).reshape(self.a.shape[1] * b.shape[1], -1)

    def forward(self, x: Tensor) -> Tensor:
        n = self.a.shape[0]
        blocks = x.reshape(*x.shape[:-1], n, -1)  # [.., n, k/n]
        thin = torch.einsum("...ap,ipr->...air", blocks, self.s)
        mixed = torch.einsum("...air,iab->...bir", thin, self.a)
        y = mixed.sum(-2) if self.t is None else torch.einsum("...bir,irq->...bq", mixed, self.t)
        return y.flatten(-2) + self.bias


class Hypercomplex(Delta):
    """down: d -> m, up: m -> d."""

    def __init__(self, method: PHM, d: int, m: int, like: Tensor, rule: Rule | None) -> None:
        super().__init__()
        self.down = Linear(method, d, m, like, rule)
        self.up = Linear(method, m, d, like, rule)
        self.act, self.dropout = method.act, method.dropout

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = ACTIVATIONS[self.act](self.down(y))
        return y + self.up(F.dropout(h, self.dropout, self.training) if self.dropout else h)


@preset("compacter")
def Compacter(n: int = 4, reduction: int = 32, rank: int = 1, norms: bool = True) -> list[Method]:
    """PHM adapters after self-attention and feed-forward (none at cross-attention), and the backbone's layer norms
    trained.

    Parameters: n^3 + (2 r (d + m) + d + m) per adapter + the layer norms.  Source: section 3.2 and rabeehk/compacter.
    """
    adapters = PHM(n=n, reduction=reduction, rank=rank)
    return [adapters, Full(at="norm")] if norms else [adapters]


@preset("compacter_pp")
def CompacterPP(n: int = 4, reduction: int = 32, rank: int = 1, norms: bool = True) -> list[Method]:
    """Compacter++: the adapters after the feed-forward layers only."""
    adapters = PHM(n=n, reduction=reduction, rank=rank, at="mlp")
    return [adapters, Full(at="norm")] if norms else [adapters]
