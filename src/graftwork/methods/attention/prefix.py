"""Prefix tuning: trained keys and values in front of those of every attention.

Li and Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation"; Liu et al. 2022, "P-Tuning v2".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftwork.core.adapter import Part
from graftwork.core.delta import Delta
from graftwork.core.fields import choice, fraction, number, positive, where
from graftwork.core.initial import kaiming_uniform, normal, parameter, uniform
from graftwork.core.method import Method, method
from graftwork.core.site import Site
from graftwork.sites.heads import widths

from .forms.front import Front
from .forms.positions import Shift


@method("prefix")
@dataclass(frozen=True)
class Prefix(Method):
    """K' = [P_K ; K],  V' = [P_V ; V]:  P_K [length, d_k],  P_V [length, d_v] per attention; queries are unchanged.

    The prefix is visible to every query, also under a causal mask, and is not rotated (no position). It equals
        Attn(q, K', V') = (1 - lam) Attn(q, K, V) + lam Attn(q, P_K, P_V),  lam the softmax mass on P_K.
    length: of the prefix, in positions.  dropout: on P_K and P_V, in training only.
    reparam: "flat" P itself is trained, N(0, init_std^2);
        "mlp" [P_K, P_V] = W_2 tanh(W_1 E + b_1) + b_2,  E [length, d],  W_1 [mid, d],  W_2 [d_k + d_v, mid] per site.
        E (N(0, init_std^2)) and W_1 are shared by the sites of one kind of attention (encoder self, decoder self, cross).
        Saved as P, unless `resume`.  mid: width of its hidden layer.
    at: "attn", or "attn, entry" to let the positions of the real tokens start behind the prefix (at `length`).
    Context: "prefix_rows", bool [batch]: rows that are False do not see the prefix and compute what the backbone does.
    Not the identity at init: even keys of zero take attention mass.
    Parameters: length (d_k + d_v) per site; with "mlp" (mid + 1) (d_k + d_v) per site, and length d + (d + 1) mid per
    kind of attention.  Source: Li and Liang 2021, section 4; XiangLi1999/PrefixTuning; Liu et al. 2022 for "flat".
    When: the weights must not be touched and texts are short: every attention sees trained keys and values.
    """

    length: int = positive(10)
    reparam: str = choice("flat", "flat", "mlp")
    mid: int = positive(512)
    dropout: float = fraction(0.0)
    init_std: float = number(1.0, low=0.0)
    at: str = where("attn")

    identity = False

    @property
    def lr(self) -> float:  # type: ignore[override]
        """Numbers that nothing rescales move little by little: without an MLP they need a higher rate, and with one a lower."""
        return 25 * Method.lr if self.reparam == "flat" else Method.lr / 4

    def build(self, site: Site, part: Part) -> Delta:
        if site.role == "entry":
            return Shift(self.length, site)
        d_k, d_v = widths(site)
        if self.reparam == "flat":
            return PrefixDelta(self, site, d_k, d_v)
        like = site.like
        shared = part.shared(kind_of(site), lambda: Embedding(self, site.d, like))
        return PrefixDelta(self, site, d_k, d_v, shared)

    def count(self, site: Site) -> int:
        width = 0 if site.role == "entry" else sum(widths(site))
        return self.length * width if self.reparam == "flat" else (self.mid + 1) * width

    def count_shared(self, sites: Sequence[Site]) -> int:
        if self.reparam == "flat":
            return 0
        first = {kind_of(site): site.d for site in reversed(sites) if site.role != "entry"}
        return sum(self.length * d + (d + 1) * self.mid for d in first.values())

    def fold(self, part: Part) -> tuple[Method, dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        """Stored as a flat prefix: the keys and values that the trained MLP gives."""
        if self.reparam == "flat":
            return super().fold(part)
        tensors: dict[str, dict[str, Tensor]] = {key: {} for key in part.deltas}
        for key, delta in part.deltas.items():
            if isinstance(delta, PrefixDelta):
                with torch.no_grad():
                    tensors[key] = dict(zip(("keys", "values"), delta.produced(), strict=True))
        return dataclasses.replace(self, reparam="flat"), tensors, {}


def kind_of(site: Site) -> str:
    """Which kind of attention a site is: those of one kind share the MLP."""
    return f"{site.tower or 'all'} {'cross' if site.cross else 'self'}"


class Embedding(nn.Module):
    """tanh(W_1 E + b_1) [length, mid], shared by the sites of one kind of attention."""

    def __init__(self, method: Prefix, d: int, like: Tensor) -> None:
        super().__init__()
        self.table = parameter((method.length, d), normal(method.init_std), like)
        self.weight = parameter((method.mid, d), kaiming_uniform(), like)
        self.bias = parameter((method.mid,), uniform(-(d**-0.5), d**-0.5), like)

    def forward(self) -> Tensor:
        return torch.tanh(F.linear(self.table, self.weight, self.bias))


class PrefixDelta(Front):
    """keys [length, d_k] and values [length, d_v]; or W_2 and b_2, which make them from the shared hidden layer."""

    def __init__(self, method: Prefix, site: Site, d_k: int, d_v: int, shared: Embedding | None = None) -> None:
        super().__init__(method.dropout)
        like = site.like
        self.split = [d_k, d_v]
        self._shared = () if shared is None else (shared,)
        if shared is None:
            self.keys = parameter((method.length, d_k), normal(method.init_std), like)
            self.values = parameter((method.length, d_v), normal(method.init_std), like)
        else:
            bound = method.mid**-0.5
            self.weight = parameter((d_k + d_v, method.mid), kaiming_uniform(), like)
            self.bias = parameter((d_k + d_v,), uniform(-bound, bound), like)

    def produced(self) -> tuple[Tensor, Tensor]:
        if not self._shared:
            return self.keys, self.values
        keys, values = F.linear(self._shared[0](), self.weight, self.bias).split(self.split, dim=-1)
        return keys, values
