"""CoDA: a router keeps k of n tokens of each row for the frozen layer; all tokens pass a light adapter.

Lei et al. 2023, "Conditional Adapters: Parameter-efficient Transfer Learning with Fast Inference", arXiv 2304.04947; its soft top-k
is that of lucidrains/CoLT5-attention (coor_descent).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from graftwork.core.adapter import Part
from graftwork.core.delta import Delta
from graftwork.core.errors import GraftError
from graftwork.core.fields import choice, fraction, number, positive, where
from graftwork.core.method import Method, method
from graftwork.core.site import Site
from graftwork.core.weight import is_conv1d

from ..activation.bottleneck import Bottleneck
from .forms.conditional import Among, Choice, Gathered
from .forms.search import block_name


@method("coda")
@dataclass(frozen=True)
class CoDA(Method):
    """out = X + W_u relu(W_d LN X + b_d) + b_u + P^T diag(lambda) Heavy(P X),  P the k tokens of each row with the largest lambda.

    Heavy: what the frozen block adds to its input. lambda = softtopk(X w), w [d]: the argmax of s^T l + eps H(l) over 0 <= l <= 1,
        sum l = k; it is what trains w.  LN X: what the block's attention is given.
    reduction: r, k = ceil(n / r).  m: width of the adapter.  dropout: before W_u.
    attention: "k-to-all" the kept tokens attend to all, so that only projections of keys and values run for all; "k-to-k" to each other.
    solver: "iterated" as published, `iters` rounds with eps_t = max(eps, eps_init eps_decay^(t - 1)), which for a small eps have not
        converged; "exact" (an eps near 1 keeps gradients alive: a saturated lambda has none).
    All linear layers of the block, and attention, see k tokens of a row (a packed projection of q, k and v all in "k-to-all", experts
        always); padding is chosen last.
    Of two conditional adapters, a >> b, the first chooses among the tokens that the second has chosen.
    Decoders with cross-attention are left dense. The choice sees later tokens: generation with a key-value cache is refused elsewhere.
    Not the identity at init: the other tokens leave the block out.  Init: w U(-1/sqrt(d), 1/sqrt(d)), W_d kaiming-uniform, others zero.
    Raises GraftError for blocks without an attention module.  Parameters per block: 2 m d + m + d, and d.  Source: section 3.
    When: long inputs and an encoder whose speed matters: most tokens skip the heavy layers, at some loss.
    """

    reduction: float = number(3.0, low=1.0)
    m: int = positive(64)
    dropout: float = fraction(0.0)
    attention: str = choice("k-to-all", "k-to-all", "k-to-k")
    solver: str = choice("iterated", "iterated", "exact")
    iters: int = positive(20)
    eps: float = number(0.02, low=1e-4)
    eps_init: float = number(4.0, low=1e-4)
    eps_decay: float = number(0.7, 0.0, 1.0)
    at: str = where("block, attn, linear")

    identity = False

    @property
    def adapter(self) -> Bottleneck:
        """What every token has."""
        return Bottleneck(d=self.m, act="relu", dropout=self.dropout)

    def build(self, site: Site, part: Part) -> Delta | None:
        sites = part.anatomy.sites
        if site.layer is None or any(s.cross and s.tower == site.tower for s in sites):
            return None
        trail = f"coda {block_name(site)}"
        if site.role == "block":
            there = [s for s in part.sites if s.role == "attn" and block_name(s) == block_name(site)]
            if len(there) != 1 or type(there[0].module).forward is nn.Module.forward:
                found = f"{len(there)} attention modules among its sites that the block calls"
                raise GraftError(f"{self} at {site.key}", found, "choose a transformer, at='block, attn, linear'")
            return Choice(self, site, self.adapter.build(site, part), trail)
        if site.role == "attn":
            return Among(self, trail)
        makes_keys = any(s.path == site.path for role in ("k", "v", "kv", "qkv") for s in part.anatomy.of(role))
        plain = isinstance(site.module, nn.Linear) or is_conv1d(site.module)
        within = any(isinstance(s.module, nn.MultiheadAttention) and site.path.startswith(s.path) for s in sites)
        if not plain or within or (makes_keys and self.attention == "k-to-all"):
            return None
        return Gathered(trail)

    def count(self, site: Site) -> int:
        return self.adapter.count(site) + site.d if site.role == "block" else 0

    def count_shared(self, sites: Sequence[Site]) -> int:
        """None of the decoders that are left dense."""
        dense = {s.tower for s in sites if s.cross}
        return -sum(self.count(s) for s in sites if s.tower in dense)
