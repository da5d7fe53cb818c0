"""p-Adapter: an adapter whose first stage passes messages along the attention's own map, by a p-Laplacian.

Wu et al. 2024, "p-Laplacian Adaptation for Generative Pre-trained Vision-Language Models", arXiv 2312.10613, eq. 4 to 12;
wuhy68/p-Adapter. That code leaves a query's own node out of cross-attention by mistake; here it is in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from graftwork.core.adapter import Part
from graftwork.core.attention import Attention
from graftwork.core.delta import Delta
from graftwork.core.errors import GraftError
from graftwork.core.fields import choice, flag, number, positive, where
from graftwork.core.initial import constant, kaiming_uniform, parameter, zeros
from graftwork.core.method import Method, method
from graftwork.core.site import Site

EPS = 1e-8


@method("laplacian")
@dataclass(frozen=True)
class Laplacian(Method):
    """h + U (gelu(G h + b_G) * F') + b_U,  h the attention's output, G [m, d], U [d, m], m = d // reduction.  Identity at init (U = 0).

    F' is one step along the attention map M [queries, keys], head by head, over nodes F = D W_o v + b_D (W_o the frozen output map,
    D [m, d], split over the heads):
        A'_ij = M_ij || sqrt(M_ij + eps) (F_i - F_j) + eps ||^(p - 2),   eps = 1e-8
        F'_i = a_i (sum_j A'_ij F_j + 2 mu / p F_i),   a_i = 1 / (sum_j A'_ij + 2 mu / p),   mu = mu0 (2 + tanh theta)
    so that every F'_i is a convex combination; p < 2 weighs near nodes more, p = 2 is plain averaging.
    p: at the start; trained with `train_p`.  mu0: how much of a node stays.
    graph: of self-attention, "values": the nodes are the values, a query's own among them; "bipartite": queries and values. That of
        cross-attention is always the second. It is the same function with a key-value cache and without.
    self_edge: "keep", as published: i = j has the finite weight (eps sqrt(m / heads))^(p - 2), which outweighs all others where p < 2;
        "zero" leaves it out.  pool: in cross-attention, v and M are averaged along the keys to this many.
    Init: D, G Kaiming-uniform, U, biases and theta zero.  The probabilities are read without dropout, and stay what they are.
    Parameters per attention: 3 d m + 2 m + d + 1, and 1 more with train_p.
    When: the part of p_adapter that re-weighs attention.
    """

    p: float = number(1.25, low=1.0)
    mu0: float = number(0.1, low=1e-6)
    reduction: int = positive(8)
    graph: str = choice("values", "values", "bipartite")
    self_edge: str = choice("keep", "keep", "zero")
    pool: int | None = positive(None)
    train_p: bool = flag(False)
    at: str = where("attn")

    def build(self, site: Site, part: Part) -> MessagePassing:
        outputs = part.inside(site, "o") if site.role == "attn" else []
        if len(outputs) != 1 or site.heads is None:
            found = f"a site of role {site.role!r} with {len(outputs)} output maps and {site.heads} heads"
            raise GraftError(f"{self} at {site.key}", found, "use at='attn'")
        if self.m(site) % site.heads or not self.m(site):
            found = f"width {site.d} // {self.reduction} = {self.m(site)} for {site.heads} heads"
            raise GraftError(f"{self} at {site.key}", found, "choose another reduction: the heads share it evenly")
        return MessagePassing(self, site, outputs[0])

    def m(self, site: Site) -> int:
        """Width of the nodes, all heads together."""
        return site.d // self.reduction

    def count(self, site: Site) -> int:
        m, d = self.m(site), site.d
        return 3 * d * m + 2 * m + d + 1 + self.train_p


def edges(m: Tensor, own: Tensor, nodes: Tensor, p: Tensor | float) -> Tensor:
    """A' [..., T, S] from the map [..., T, S], the queries' own nodes [..., T, c] and all nodes [..., S, c]."""
    d, near = torch.cdist(own, nodes, compute_mode="donot_use_mm_for_euclid_dist"), m + EPS
    # || sqrt(near) (F_i - F_j) + eps ||^2, written out; what has eps in it only keeps the power finite, and takes no gradient
    cross = 2 * EPS * near.sqrt() * (own.sum(-1)[..., None] - nodes.sum(-1)[..., None, :])
    square = near * d * d + cross.detach() + own.shape[-1] * EPS**2
    return m * square.clamp_min(EPS**2) ** (p / 2 - 1)


def passed(edge: Tensor, own: Tensor, nodes: Tensor, share: Tensor | float) -> Tensor:
    """F' [..., T, c]: a_i (sum_j A'_ij F_j + share F_i), a_i = 1 / (sum_j A'_ij + share)."""
    return (edge @ nodes + share * own) / (edge.sum(-1, keepdim=True) + share)


class MessagePassing(Delta):
    """down = D, gate = G, up = U, with their biases; theta, and p where it is trained."""

    reading, itself = "y", True  # what it finds inside of the attention is its own

    def __init__(self, method: Laplacian, site: Site, output: Site) -> None:
        super().__init__()
        like, m, d = site.like, method.m(site), site.d
        self.down, self.down_bias = parameter((m, d), kaiming_uniform(), like), parameter((m,), zeros, like)
        self.gate_weight, self.gate_bias = parameter((m, d), kaiming_uniform(), like), parameter((m,), zeros, like)
        self.up, self.up_bias = parameter((d, m), zeros, like), parameter((d,), zeros, like)
        self.theta = parameter((), zeros, like)
        self.p = parameter((), constant(method.p), like) if method.train_p else method.p
        self.method, self.heads, self.bipartite = method, site.heads, site.cross or method.graph == "bipartite"
        self.pool = method.pool if site.cross else None
        self._output = (output,)  # the backbone's, never a child of this delta

    def nodes(self, t: Tensor) -> Tensor:
        """F [batch, heads, n, m / heads] of queries or values [batch, heads, n, d_head]."""
        (site,) = self._output
        stored = site.module._parameters
        w, b = stored[site.weight.name], stored.get(site.weight.bias or "")
        assert w is not None
        h = F.linear(t.transpose(1, 2).flatten(2), site.weight.dense(w), site.weight.bias_of(b))
        return F.linear(h, self.down, self.down_bias).unflatten(-1, (self.heads, -1)).transpose(1, 2).float()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, attention: Attention) -> Tensor:
        m = attention.probabilities(q, k, mask).float()
        values = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
        if self.pool is not None:
            m = F.adaptive_avg_pool1d(m.flatten(0, 1), self.pool).unflatten(0, m.shape[:2])
            pooled = F.adaptive_avg_pool1d(values.mT.flatten(0, 1), self.pool)
            values = pooled.unflatten(0, values.shape[:2]).mT
        nodes = self.nodes(values)
        own = self.nodes(q) if self.bipartite else nodes[:, :, nodes.shape[2] - q.shape[2] :]
        p = self.p if isinstance(self.p, float) else self.p.float()
        edge = edges(m, own, nodes, p)
        if not self.bipartite and self.method.self_edge == "zero":
            edge = edge.tril(edge.shape[-1] - edge.shape[-2] - 1) + edge.triu(edge.shape[-1] - edge.shape[-2] + 1)
        share = 2 / p * self.method.mu0 * (2 + self.theta.float().tanh())
        self.runtime.state[self, "passed"] = passed(edge, own, nodes, share).transpose(1, 2).flatten(2)
        return attention(q, k, v, mask)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        gate = F.gelu(F.linear(y, self.gate_weight, self.gate_bias))
        edit = gate * self.runtime.state.pop((self, "passed")).to(gate.dtype).view(gate.shape)
        return y + F.linear(edit, self.up, self.up_bias)
