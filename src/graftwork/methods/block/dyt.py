"""DyT: token by token, whether the frozen feed-forward runs is decided in each block; all tokens have the parallel adapter.

Zhao et al. 2024, "Dynamic Tuning Towards Parameter and Inference Efficiency for ViT Adaptation", arXiv 2403.11808, and
NUS-HPC-AI-Lab/Dynamic-Tuning.
"""

from __future__ import annotations

from dataclasses import dataclass

from graftwork.core.adapter import Part
from graftwork.core.errors import GraftError
from graftwork.core.fields import count, flag, fraction, number, positive, where
from graftwork.core.method import Method, method
from graftwork.core.site import Site

from ..activation.bottleneck import Bottleneck
from .forms.dispatch import Dispatch, Rates


@method("dyt")
@dataclass(frozen=True)
class DyT(Method):
    """x <- x + M * MLP(LN x) + s (W_u drop(relu(W_d x + b_d)) + b_u),  M in {0, 1} for each token,  logit = w^T x + b.

    In training M = 1[sigmoid((logit + G1 - G2) / tau) > threshold], G1, G2 ~ Gumbel(0, 1), with the gradient of the sigmoid; in
        evaluation M = 1[sigmoid(logit) > threshold], and the feed-forward runs on the kept tokens alone (a compiled pass masks).
    d: width of the adapter.  scale: s.  dropout: before W_u.  stochastic: False leaves G1 and G2 out.
    target, alpha: `gw.auxiliary_loss` is alpha (mean of M over layers and decided tokens - target)^2.
    keep: so many first tokens of each row always run, and are not decided: the class token; 0 for a model without one.
    With gw.context(model, complete=True) all tokens run (M = 1): the second pass that `gw.complete_loss` is made of.
    Not the identity at init: about half of the tokens leave the feed-forward out.  Init: W_d kaiming-uniform, W_u and biases zero, w and
        b U(-1/sqrt(width), 1/sqrt(width)).
    Raises GraftError at a feed-forward that is no module of its own (BERT's), or has no norm in front.
    Parameters per block: 2 d width + d + width, and width + 1 of the dispatcher.  Source: section 3.
    When: vision transformers that shall be adapted and faster at inference at once; tokens that matter less skip the feed-forward
        layers.
    """

    d: int = positive(64)
    target: float = number(0.5, 0.0, 1.0)
    alpha: float = number(2.0, low=0.0)
    tau: float = number(5.0, low=1e-3)
    threshold: float = fraction(0.5)
    scale: float = number(1.0)
    dropout: float = fraction(0.1)
    keep: int = count(1)
    stochastic: bool = flag(True)
    at: str = where("mlp")

    identity = False

    @property
    def adapter(self) -> Bottleneck:
        """What every token has."""
        return Bottleneck(d=self.d, act="relu", position="residual", scale=self.scale, dropout=self.dropout)

    def build(self, site: Site, part: Part) -> Dispatch:
        if site.role != "mlp" or any(s.role == "block" and s.path == site.path for s in part.anatomy.sites):
            found = f"{type(site.module).__name__} is no module that is a feed-forward and nothing else"
            raise GraftError(f"{self} at {site.key}", found, "choose at='mlp' on a pre-norm model (ViT, Llama, T5)")
        return Dispatch(self, site, self.adapter.build(site, part), part.shared("rates", Rates))

    def count(self, site: Site) -> int:
        return self.adapter.count(site) + site.d + 1
