"""Gated: a sub-method that each example switches on or off, by a sigmoid of what it reads.

Mao et al. 2021, "UniPELT: A Unified Framework for Parameter-Efficient Language Model Tuning", arXiv 2110.07577, and
morningmoni/UniPELT.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor

from graftwork.core.adapter import Part
from graftwork.core.delta import Delta, WeightDelta
from graftwork.core.errors import GraftError
from graftwork.core.fields import choice, inner, number
from graftwork.core.method import Method, flatten, get, method, preset
from graftwork.core.site import Site

from .change import Weighed
from .gate import Gate
from .inherit import Around


@method("gated")
@dataclass(frozen=True)
class Gated(Around):
    """g = mean_t sigmoid(x_t w + b), one number per example; it multiplies what the method inside adds.  w [d], x [batch, seq, d].

    of: the method inside. A bottleneck: y + g A(h), x the input h of D. A prefix: [g P_K ; K] and [g P_V ; V] (a closed gate leaves
        keys of zero in the softmax), x the input of the attention. A weight method on linear layers: y + g (W' - W) x, x the layer's
        input; with LoRA(alpha=r) the gate stands in the place of alpha / r, as published.
    tokens: the mean is over "all" tokens, padding included, as in the official code, or over the "real" ones by the attention mask.
    init: "normal" w N(0, init_std^2), b zero;  "uniform" both U(-1/sqrt(d), 1/sqrt(d)).
    g sees later tokens, so that generation with a key-value cache is refused.
    Identity at init if the method inside is.  Not mergeable: g depends on the example.
    Parameters: those of the method inside + d + 1 per site.  Source: section 3.2, eq. 1 to 3.
    When: the network shall learn for each example how much a method inside takes part.
    """

    of: Method = inner("bottleneck")
    tokens: str = choice("all", "all", "real")
    init: str = choice("normal", "normal", "uniform")
    init_std: float = number(0.02, low=0.0)

    mergeable = False

    def build(self, site: Site, part: Part) -> Delta | None:
        delta = self.of.build(site, part)
        if delta is None:
            return None
        if self.tokens == "real" and any(s.cross and s.tower == site.tower for s in part.anatomy.sites):
            found = "a decoder with cross-attention: the attention mask is the encoder's"
            raise GraftError(f"{self} at {site.key}", found, "use tokens='all', or gate the encoder's sites")
        gate = Gate(self, self.of.reads(site), site.like)
        if isinstance(delta, WeightDelta):
            if not (site.weight.linear and delta.overrides("linear")):
                do = "choose linear layers"
                raise GraftError(f"{self} at {site.key}", "a weight that is not applied token by token", do)
            return Weighed(delta, gate, site, "example")
        if not hasattr(delta, "gate"):
            do = "gate a bottleneck, a prefix or a method of weights"
            raise GraftError(f"{self} at {site.key}", f"{self.of.name} has no place for a gate", do)
        delta.gate = gate
        return delta

    def count(self, site: Site) -> int:
        return self.of.count(site) + self.of.reads(site) + 1

    def fold(self, part: Part) -> tuple[Method, dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        """The stored form of the method inside, and the gates."""
        within = Part(self.of, part.sites, part.anatomy)
        within.shared_modules = part.shared_modules
        within.deltas = {key: d.delta if isinstance(d, Weighed) else d for key, d in part.deltas.items()}
        folded, tensors, shared = self.of.fold(within)
        out: dict[str, dict[str, Tensor]] = {}
        for key, delta in part.deltas.items():
            above = "delta." if isinstance(delta, Weighed) else ""
            own = {f"gate.{name}": t for name, t in delta.get_submodule("gate").state_dict().items()}
            out[key] = {f"{above}{name}": t for name, t in tensors.get(key, {}).items()} | own
        return dataclasses.replace(self, of=folded), out, shared


@preset("unipelt")
def UniPELT(parts: str = "apl", reduction: int = 16, length: int = 10, mid: int = 512, r: int = 8) -> list[Method]:
    """Gated sub-methods in every layer: a: adapters behind the feed-forward layer; p: prefixes; l: LoRA on q and v; b: BitFit, ungated.

    parts: which of them ("ap", "apl", "aplb").  reduction: d / m of the adapters.  length, mid: of the prefix and its MLP.  r: of LoRA.
    at: "mlp.norm", for post-norm backbones (BERT); for pre-norm ones give at="mlp" (where there are adapters).
    Parameters per layer: a: 2 d m + m + d;  p: 2 d length once folded;  l: 4 d r;  gates: d + 1 for each of a and p, 2 (d + 1) for l.
    Source: Mao et al. 2021, section 3.
    When: few rows, and no time to find out which method suits the task.
    """
    if not parts or set(parts) - set("aplb") or len(set(parts)) < len(parts):
        raise GraftError(f"UniPELT(parts={parts!r})", "not some of a, p, l and b", "choose 'ap', 'apl' or 'aplb'")
    made: dict[str, list[Method]] = {}
    if "a" in parts:
        adapter = get("bottleneck")(reduction=reduction, act="relu", position="sum", init="bert", at="mlp.norm")
        made["a"] = [Gated(of=one) for one in flatten(adapter)]
    if "p" in parts:
        prefix = get("prefix")(length=length, reparam="mlp", mid=mid)
        made["p"] = [Gated(of=one, init="uniform") for one in flatten(prefix)]
    if "l" in parts:
        made["l"] = [Gated(of=one, init="uniform") for one in flatten(get("lora")(r=r, alpha=float(r)))]
    if "b" in parts:
        made["b"] = [*flatten(get("bitfit")())]
    return [one for part in "aplb" for one in made.get(part, [])]
