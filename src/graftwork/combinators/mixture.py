"""Mixture: several copies of one method at every site, mixed token by token by a dense softmax router.

Zadouri et al. 2023, "Pushing Mixture of Experts to the Limit", arXiv 2309.05444 (MoV, MoLoRA) and for-ai/parameter-
efficient-moe.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from graftwork.core.adapter import Part
from graftwork.core.delta import Delta, WeightDelta
from graftwork.core.errors import GraftError
from graftwork.core.fields import by_depth, choice, flag, inner, number, positive
from graftwork.core.initial import normal, tensor
from graftwork.core.method import Method, flatten, get, method, preset
from graftwork.core.site import Site

from .inherit import Around
from .routed import MixedActivation, MixedWeight
from .router import reads_input


@method("mixture")
@dataclass(frozen=True)
class Mixture(Around):
    """sum_e p_e(h) Delta_e,  p = softmax(W_g h) in float32,  W_g [experts, dim] ~ N(0, router_std^2), no bias; one p
    per token.

    of: the method inside, built `experts` times at every site.  experts: E, or a tuple of numbers that are spread over the depth: layer l
        of L has experts[l n // L] of a tuple of n.
        Experts that are vectors (IA3) are merged for each token before they are used: h * (sum_e p_e l_e).
        Low-rank updates are mixed as products: y + sum_e p_e B_e A_e x, by two thin products for all experts together.
        All others are run one by one; the backbone's own product is computed once.
    router: "token" h is the input x of a linear layer (any other site: its output y);
        "head" at q, k, v the layer's output y, one p per head, W_g [experts, d_head] shared by the heads; elsewhere
        as "token"; "input" h is what the experts read, at any site.
    top_k: only the k largest p are kept, as they are, or, with renormalise, divided by their sum.
    router_init: "normal", or "kaiming" W_g kaiming-uniform (a = sqrt 5).
    expert_std: matrices of the experts that do not start at zero are drawn N(0, expert_std^2).
    balance, z_loss: weights of E^2 mean_e(f_e P_e) and of mean(logsumexp^2) in the auxiliary loss; P the mean p, f the share of the tokens
        whose first choice is e, with renormalise that of all k choices.
    Identity at init if the method inside is.  Not mergeable: p depends on the token.  experts=1 is the method inside,
    without a router.
    Parameters: experts * (those of the method inside + dim).
    When: tasks differ within a batch or a text and no label says which: a router mixes experts for each token.
    """

    of: Method = inner("lora")
    experts: int | tuple[int, ...] = by_depth(4)
    router: str = choice("token", "token", "head", "input")
    top_k: int | None = positive(None)
    renormalise: bool = flag(False)
    router_init: str = choice("normal", "normal", "kaiming")
    router_std: float = number(0.02, low=0.0)
    expert_std: float | None = number(None, low=0.0)
    balance: float = number(0.0, low=0.0)
    z_loss: float = number(0.0, low=0.0)

    @property
    def identity(self) -> bool:  # type: ignore[override]
        """As the method inside; a top-k choice without renormalisation scales what it keeps."""
        return self.of.identity and (self.top_k is None or self.renormalise)

    @property
    def mergeable(self) -> bool:  # type: ignore[override]
        """Only a mixture of one."""
        numbers = (self.experts,) if isinstance(self.experts, int) else self.experts
        return self.of.mergeable and set(numbers) == {1}

    def build(self, site: Site, part: Part) -> Delta | None:
        first, n = self.of.build(site, part), self.experts_at(site)
        if first is None or n == 1:
            return first
        experts = [first, *(self.of.build(site, part) for _ in range(n - 1))]
        if any(first.overrides(f) for f in ("attend", "around", "enter", "amend")):
            raise GraftError(
                f"{self} at {site.key}", f"{self.of.name} does more than edit an output", "mix another method"
            )
        if self.router == "input" and first.reading == "y":
            asked, found = f"{self} at {site.key}", f"{self.of.name} reads the output there"
            raise GraftError(asked, found, "give it another position, or use router='token'")
        if self.expert_std is not None:
            for expert in experts:
                _redraw(expert, self.expert_std)
        kept = [e for e in experts if e is not None]
        if not isinstance(first, WeightDelta):
            return MixedActivation(self, site, kept)
        if not (site.weight.linear and first.overrides("linear")):
            do = "choose linear layers, or experts=1"
            raise GraftError(f"{self} at {site.key}", "a weight that is not applied token by token", do)
        return MixedWeight(self, site, kept)

    def experts_at(self, site: Site) -> int:
        """How many experts a site has. GraftError where that is by depth, and the site has none."""
        if isinstance(self.experts, int):
            return self.experts
        if site.layer is None:
            do = "give one number of experts, or choose sites in repeated blocks"
            raise GraftError(f"{self} at {site.key}", "a site in no layer, and experts by depth", do)
        return self.experts[site.layer * len(self.experts) // site.depth]

    def heads(self, site: Site) -> int:
        """How many p a token has at this site."""
        return site.heads or 1 if self.router == "head" and site.role in ("q", "k", "v") else 1

    def dim(self, site: Site) -> int:
        """Width of the router's input h."""
        if self.router == "head" and site.role in ("q", "k", "v"):
            return site.d // self.heads(site)
        if self.router == "input":
            return self.of.reads(site)
        return site.weight.d_in if reads_input(site) else site.d

    def count(self, site: Site) -> int:
        n = self.experts_at(site)
        return self.of.count(site) + ((n - 1) * self.of.count(site) + n * self.dim(site) if n > 1 else 0)


def _redraw(expert: nn.Module | None, std: float) -> None:
    for p in () if expert is None else expert.parameters():
        if p.dim() > 1 and not p.is_meta and p.detach().any():
            p.data = tensor(tuple(p.shape), normal(std), p)


@preset("mov")
def MoV(experts: int = 10) -> list[Method]:
    """MoV: (IA)^3 vectors on keys, values (per head) and the inner activation of the feed-forward, mixed per token.

    Parameters per block: E (d_k + d_v + d_ff) + E (d_h + d_h + d_ff).  Source: Zadouri et al. 2023, section 3.
    When: as molora, with vectors as experts: a hundredth of the parameters.
    """
    (of,) = flatten(get("ia3")())
    return [Mixture(of=of, experts=experts, router="head")]


@preset("molora")
def MoLoRA(experts: int = 10, r: int = 4, alpha: float = 16.0) -> list[Method]:
    """MoLoRA: E LoRA pairs on every linear layer of attention and feed-forward, mixed per token.

    Parameters per weight: E r (in + out) + E in.  Source: Zadouri et al. 2023, section 3.
    When: instruction tuning over many tasks, with more capacity than one LoRA.
    """
    (of,) = flatten(get("lora")(r=r, alpha=alpha))
    at = "q, k, v, o, up, gate, down | q, k, v, o, up, down | q, k, v, o, gate_up, down | linear"
    return [Mixture(of=of, experts=experts, expert_std=0.02, at=at)]
