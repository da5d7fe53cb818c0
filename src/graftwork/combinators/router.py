"""The dense router of a mixture: a softmax over the experts for every token, or for every head of a token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftwork.core.delta import Delta
from graftwork.core.initial import kaiming_uniform, normal, parameter
from graftwork.core.site import Site

if TYPE_CHECKING:
    from .mixture import Mixture


def reads_input(site: Site) -> bool:
    """Whether the router reads the site's input: at a linear layer. Elsewhere it reads the output."""
    return site.width is None and site.weight.linear


class Router(nn.Module):
    """weight = W_g [experts, dim]."""

    def __init__(self, method: Mixture, site: Site) -> None:
        super().__init__()
        like = site.like
        init = kaiming_uniform() if method.router_init == "kaiming" else normal(method.router_std)
        self.weight = parameter((method.experts_at(site), method.dim(site)), init, like)
        self.top_k, self.renormalise = method.top_k or len(self.weight), method.renormalise
        self.balance, self.z_loss = method.balance, method.z_loss
        self.heads = method.heads(site)
        self.loss: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "loss": None}  # a copy does not share the graph of the last pass

    def forward(self, h: Tensor) -> Tensor:
        """p [.., experts] for h [.., dim]; with heads [.., heads, experts] for h [.., heads dim]."""
        if self.heads > 1:
            h = h.unflatten(-1, (self.heads, -1))
        logits = F.linear(h.float(), self.weight.float())
        p = logits.softmax(-1)
        k = min(self.top_k, p.shape[-1])
        if self.training and (self.balance or self.z_loss):
            self.loss = self.penalty(logits, p, p.topk(k if self.renormalise else 1, dim=-1).indices)
        if k < p.shape[-1]:
            best = p.topk(k, dim=-1)
            p = torch.zeros_like(p).scatter(-1, best.indices, best.values)
        return (p / p.sum(-1, keepdim=True) if self.renormalise else p).to(h.dtype)

    def penalty(self, logits: Tensor, p: Tensor, chosen: Tensor) -> Tensor:
        """balance E^2 mean_e(f_e P_e) + z_loss mean(logsumexp^2), f the shares of what is chosen, P the mean p."""
        experts = p.shape[-1]
        share = F.one_hot(chosen.flatten(), experts).float().mean(0)
        balance = experts**2 * (share * p.flatten(0, -2).mean(0)).mean()
        return self.balance * balance + self.z_loss * logits.logsumexp(-1).square().mean()

    def mixed(self, p: Tensor, values: Tensor) -> Tensor:
        """sum_e p_e v_e for v [experts, d], per head where there are heads: [.., d]. Equal v give v exactly."""
        if self.heads > 1:
            split = values.unflatten(-1, (self.heads, -1))  # [experts, heads, d_head]
            return self._sum(p, split, "...he,ehd->...hd").flatten(-2)
        return self._sum(p, values, "...e,ed->...d")

    def _sum(self, p: Tensor, values: Tensor, rule: str) -> Tensor:
        if self.top_k < p.shape[-1] and not self.renormalise:
            return torch.einsum(rule, p, values)
        return values[0] + torch.einsum(rule, p, values - values[0])  # p sums to one


def merged(experts: Sequence[Delta], router: Router, p: Tensor) -> dict[str, Tensor]:
    """The experts' vectors, mixed for each token: name -> [.., d]."""
    each = [dict(e.named_parameters()) for e in experts]  # not get_parameter: other tensors may stand in their place
    return {n: router.mixed(p, torch.stack([own[n] for own in each])) for n in each[0]}


def are_vectors(delta: Delta) -> bool:
    """Whether all that a delta trains are vectors."""
    return all(p.dim() == 1 for p in delta.parameters())
