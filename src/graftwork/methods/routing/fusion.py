"""AdapterFusion: at every place, an attention over what several adapters give, for each token.

Pfeiffer et al. 2021, "AdapterFusion: Non-Destructive Task Composition for Transfer Learning", section 3.2; defaults of the
authors' adapter-hub/adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from graftwork.core.adapter import Part
from graftwork.core.errors import GraftError
from graftwork.core.fields import flag, fraction, number, words
from graftwork.core.initial import normal, parameter, zeros
from graftwork.core.method import Method, method
from graftwork.core.mixer import Members, Mixer
from graftwork.core.site import Site
from graftwork.products.dropout import drop


@method("fusion")
@dataclass(frozen=True)
class Fusion(Method):
    """y' = y + sum_n s_n V u_n,  s = softmax_n((Q h + b_q) . (K u_n + b_k)),  u_n = z_n - y,  for every token; Q, K, V [d, d].

    y is the place's value, z_n what the n-th adapter makes of it, h what the adapters read (y where
    they do not all read the same, or it has another width).
    of: which adapters, the texts of expressions: ["a", "b"], ["de >> ner", "en >> ner"].  joint: they are trained with it;
        otherwise they stay as they are.
    value: V, starting at the identity with 1e-6 beside the diagonal; without it V = I (the static variant).
    residual: u_n = z_n and y' = sum_n s_n V u_n: what a single adapter adds to is part of what is attended to (residual_before).
    query_output: h is y.  dropout: on the scores, in training.  reg: the loss gets reg |I - V|^2 of each place.
    Q, K start at N(0, 0.02^2), biases at 0. Parameters per place: 3 d^2 + 2 d; 2 d^2 + 2 d without V.
    Graft it over adapters that are there: gw.graft(model, gw.Fusion(of=["a", "b"]), "ab"); "fuse(a, b)" and "ab" then say the same.
    When: several finished adapters of other tasks may help a new one, and it is not known which.
    """

    mixes = True
    identity = False

    of: tuple[str, ...] = words()
    value: bool = flag(True)
    residual: bool = flag(False)
    query_output: bool = flag(False)
    dropout: float = fraction(0.0)
    reg: float = number(0.01, low=0.0)
    joint: bool = flag(False)

    def build(self, site: Site, part: Part) -> FusionMixer:
        return FusionMixer(self, site)

    def count(self, site: Site) -> int:
        return (3 if self.value else 2) * site.d**2 + 2 * site.d


class FusionMixer(Mixer):
    """query = Q, key = K with their biases, value = V."""

    def __init__(self, method: Fusion, site: Site) -> None:
        super().__init__()
        d, like = site.d, site.like
        self.query = parameter((d, d), normal(0.02), like)
        self.query_bias = parameter((d,), zeros, like)
        self.key_weight = parameter((d, d), normal(0.02), like)
        self.key_bias = parameter((d,), zeros, like)
        self.value = parameter((d, d), _nearly_identity, like) if method.value else None
        self.method = method

    def mix(self, x: Tensor, y: Tensor, values: Sequence[Tensor], members: Members) -> Tensor:
        m, d = self.method, self.query.shape[0]
        if y.shape[-1] != d:
            raise GraftError(
                f"a fusion at {self.key}", f"values of width {y.shape[-1]}, it has {d}", "choose another `at`"
            )
        same = x.is_floating_point() and x.shape == y.shape
        h = x if same and not m.query_output else y
        u = torch.stack(list(values), -2)  # [..., n, d]
        u = u if m.residual else u - y[..., None, :]
        # q . (K u + b) = (q K) . u + q . b: the keys [..., n, d] are never made
        q = F.linear(h, self.query, self.query_bias)
        scores = torch.einsum("...d,...nd->...n", q @ self.key_weight, u) + (q @ self.key_bias)[..., None]
        s = torch.softmax(drop(scores, m.dropout, self.training), -1)
        o = torch.einsum("...n,...nd->...d", self.noted(s, members), u)
        o = o if self.value is None else F.linear(o, self.value)
        return o if m.residual else y + o

    def auxiliary_loss(self) -> Tensor | None:
        if self.value is None or not self.method.reg:
            return None
        return self.method.reg * (self.value - torch.eye(len(self.value)).to(self.value)).square().sum()


def _nearly_identity(t: Tensor, generator: torch.Generator | None = None) -> None:
    t.fill_(1e-6).fill_diagonal_(1.0)
