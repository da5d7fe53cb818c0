"""K-Adapter: a stack of transformer layers beside the frozen model for each source of knowledge, fed by a few of its states.

Wang et al. 2021, "K-Adapter: Infusing Knowledge into Pre-Trained Models with Adapters". Nothing is back-propagated
through the backbone, and adapters do not see each other.
"""

from __future__ import annotations

from dataclasses import dataclass

from graftwork.core.adapter import Part
from graftwork.core.delta import Delta
from graftwork.core.errors import GraftError
from graftwork.core.fields import choice, fraction, number, positive, text, where
from graftwork.core.method import Method, method
from graftwork.core.site import Site
from graftwork.sites.where import in_layers

from .forms.knowledge import Features, Knowledge
from .forms.trail import causal, ending, stack_of


@method("k_adapter")
@dataclass(frozen=True)
class KAdapter(Method):
    """o_k = u_k + U T(D u_k),  u_1 = H_{l_1},  u_k = H_{l_k} + o_{k-1};  H' = W_c [H_last ; o_last] + b_c.

    H_l [batch, seq, D]: input of backbone block l, without a graph;  H_last: output of the stack's last norm, or else of
    its last block.  D: D -> d and U: d -> D linear maps ~ N(0, init_std^2), biases 0.  T: `depth` post-norm transformer
    layers of width d with `heads` heads and a gelu MLP of width d_ff, which see what the backbone's attention may see.
    states: the l_k, as numbers and ranges, -1 the last block's.
    start: W_c "random", as the official code; "identity" [I, 0], the identity at init.
    Downstream of several: `a | b` gives the features of both in one pass.  Not with a key-value cache.
    Parameters: per state depth (4 d^2 + 2 d d_ff + 9 d + d_ff) + 2 d D + d + D;  once 2 D^2 + D.
    Source: Wang et al. 2021, section 3.1; microsoft/K-Adapter.
    When: knowledge of several sources, each trained by itself on plenty of data, which must not disturb each other.
    """

    states: str = text("0,11,23")
    d: int = positive(768)
    depth: int = positive(2)
    heads: int = positive(12)
    d_ff: int = positive(3072)
    init_std: float = number(2e-4, low=0.0)
    dropout: float = fraction(0.0)
    start: str = choice("random", "random", "identity")
    at: str = where("block, top")

    lr = 1e-4  # whole transformer layers

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d % self.heads:
            raise GraftError(f"{self}", f"{self.heads} heads in a width of {self.d}", "choose d as a multiple of heads")

    @property
    def identity(self) -> bool:  # type: ignore[override]
        """Only with start="identity"."""
        return self.start == "identity"

    def build(self, site: Site, part: Part) -> Delta | None:
        asked, trail = f"{self} at {site.key}", f"k_adapter {id(part)} {site.tower}"
        if not ending(part, site):
            return None
        chosen = in_layers(stack_of(part, site, asked), self.states, "k_adapter's states")
        if site.role == "top":
            return Features(self, site, trail)
        return Knowledge(self, site, trail, causal(site.module)) if site in chosen else None

    def count(self, site: Site) -> int:
        d, wide = self.d, site.d
        if site.role == "top":
            return 2 * wide**2 + wide if site.exit is not None else 0
        if site not in in_layers(_numbered(site), self.states, "k_adapter's states"):
            return 0
        return self.depth * (4 * d**2 + 2 * d * self.d_ff + 9 * d + self.d_ff) + 2 * d * wide + d + wide


def _numbered(site: Site) -> list[Site]:
    """The site among the places of its stack, of which nothing else is known."""
    return [
        site if i == site.layer else Site("", "block", site.module, layer=i, depth=site.depth)
        for i in range(site.depth)
    ]
