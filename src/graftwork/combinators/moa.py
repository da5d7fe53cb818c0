"""MoA: experts of different kinds in one block, each taken with a weight of its own by one router of the block.

Cao et al. 2025, "MoA: Heterogeneous Mixture of Adapters for Parameter-Efficient Fine-Tuning of Large Language Models",
arXiv 2506.05928, and DCDmllm/MoA.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from graftwork.core.adapter import Part
from graftwork.core.delta import Delta, WeightDelta
from graftwork.core.errors import GraftError
from graftwork.core.fields import choice, flag, inners, number, positive
from graftwork.core.method import Method, method
from graftwork.core.site import Site
from graftwork.sites.where import covers

from .block_router import BlockRouter, Share
from .change import Weighed
from .experts import RoutedAttention, RoutedOutput

LORAS = " + ".join(f"lora(r=8, alpha=8.0, at={role!r})" for role in ("q", "k", "v", "o", "gate", "up", "down"))
PROMPT = "llama_adapter(length=10, squash='none', at='self.attn')"
ADAPTER = "bottleneck(d=16, act='silu', position='parallel', at='mlp')"


@method("moa_hetero")
@dataclass(frozen=True)
class MoA(Method):
    """Every expert changes what stands at its sites, y -> f_e(y):  y' = y + w_e (f_e(y) - y),  w = sigmoid(R(x)) in [0, 1]^E, a token's
    weights, x the input of the block. No softmax: experts do not compete.

    of: the experts, of any kinds that edit an output, an attention or the weight of a linear layer, each with its own `at`, without "|".
        Published: LoRA on each linear layer (a backbone without "gate" wants others), a prompt with its own attention, a parallel adapter.
    router: "linear" R(x) = W x + b;  "swiglu" W_2 (silu(W_1 x + b_1) * (W_3 x + b_3)) + b_2, `mult` E wide.  W kaiming-uniform, b zero.
    sparse: an expert is kept for a token where w_e >= tau, and only kept tokens are sent through it; the others are as without it.
    threshold: "learned" tau = max_threshold sigmoid(t x + t_0), t and t_0 zero at first; "constant" tau = max_threshold.
    shifted: kept experts have w_e - tau in the place of w_e, which trains tau. Otherwise tau is compared only: published, and not trained.
    Identity at init if the experts are. Not mergeable: w depends on the token. The attention must be that of the block's own tokens.
    Parameters: those of the experts, and per block d E + E, or 2 (d m E + m E) + m E E + E for m = mult, and d + 1 for a learned tau.
    Source: section 3.
    When: one kind of method is not enough and which is best differs from token to token: LoRA, adapters and prompts as experts.
    """

    of: tuple[Method, ...] = inners(f"{LORAS} + {PROMPT} + {ADAPTER}")
    router: str = choice("linear", "linear", "swiglu")
    mult: int = positive(4)
    sparse: bool = flag(False)
    threshold: str = choice("learned", "learned", "constant")
    max_threshold: float = number(0.5, 0.0, 1.0)
    shifted: bool = flag(False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.at:
            wrong = next((m for m in self.of if not isinstance(m.at, str) or "|" in m.at or m.needs), None)
            if wrong is not None:
                found = (
                    f"the expert {wrong} needs {' and '.join(wrong.needs)}"
                    if wrong.needs
                    else f"the expert {wrong} at {wrong.at!r}"
                )
                raise GraftError(
                    type(self).__name__, found, "give experts without needs, each with its sites: LoRA(at='q, v')"
                )
            object.__setattr__(self, "at", ", ".join(["block", *dict.fromkeys(m.at for m in self.of)]))  # type: ignore[arg-type]

    @property
    def identity(self) -> bool:  # type: ignore[override]
        """As the experts."""
        return all(m.identity for m in self.of)

    def build(self, site: Site, part: Part) -> Delta | None:
        keys = part.shared("blocks", nn.Identity)  # whose weights: it tells the adapters of one block apart
        if site.role == "block":
            return BlockRouter(self, site, keys)
        e = self.expert_at(site)
        delta = None if e is None else self.of[e].build(site, Part(self.of[e], part.sites, part.anatomy))
        if e is None or delta is None:
            return None
        if site.cross and site.role in ("k", "v", "kv", "qkv"):
            do = "give the expert the self-attention's alone: at='self.v'"
            raise GraftError(f"{self} at {site.key}", "it reads the tokens of another tower", do)
        block = next((s for s in part.sites if s.role == "block" and f"{site.path}.".startswith(f"{s.path}.")), None)
        if block is None:
            raise GraftError(
                f"{self} at {site.key}", "a site in no block that has a router", "add 'block' to at, or leave at out"
            )
        both = delta.overrides("attend") and delta.overrides("forward")  # two edits under one weight
        if both or any(map(delta.overrides, ("around", "enter", "amend"))):
            found = f"{self.of[e].name} does more than edit an output or an attention"
            raise GraftError(f"{self} at {site.key}", found, "choose another expert, or another position")
        share = Share(keys, block.key, e, self.sparse)
        if delta.overrides("attend"):
            return RoutedAttention(delta, share)
        if not isinstance(delta, WeightDelta):
            return RoutedOutput(delta, share)
        if not (site.weight.linear and delta.overrides("linear")):
            raise GraftError(
                f"{self} at {site.key}", "a weight that is not applied token by token", "choose linear layers"
            )
        return Weighed(delta, share, site, "token")

    def expert_at(self, site: Site) -> int | None:
        """The number of the expert that a site belongs to. GraftError where there are several."""
        found = [e for e, m in enumerate(self.of) if covers(site, m.at, m.layers)]
        if len(found) > 1:
            raise GraftError(
                f"{self} at {site.key}", f"the experts {found} both sit there", "give each site to one expert"
            )
        return found[0] if found else None

    def count(self, site: Site) -> int:
        if site.role != "block":
            e = self.expert_at(site)
            return 0 if e is None else self.of[e].count(site)
        n, d = len(self.of), site.d
        wide = self.mult * n
        tau = d + 1 if self.sparse and self.threshold == "learned" else 0
        return tau + (d * n + n if self.router == "linear" else 2 * (d * wide + wide) + wide * n + n)
