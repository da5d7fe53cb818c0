"""The delta of Compacter: linear maps whose matrices are sums of Kronecker products (see `compacter`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from graftwork.core.initial import normal, parameter, xavier_uniform, zeros
from graftwork.core.site import Site
from graftwork.products.dropout import drop

from .nonlinear import ACTIVATIONS
from .residual import Branch

if TYPE_CHECKING:
    from ..compacter import PHM


class Rule(nn.Module):
    """a [n, n, n]: the matrices A_i."""

    def __init__(self, method: PHM, like: Tensor) -> None:
        super().__init__()
        self.a = parameter((method.n, method.n, method.n), normal(method.init_std), like)


class Linear(nn.Module):
    """x [.., k] -> y [.., d] = x sum_i A_i (x) B_i + b.  s [n, k/n, r], t [n, r, d/n]; whole B_i: s = B."""

    def __init__(self, method: PHM, k: int, d: int, like: Tensor, rule: Rule | None) -> None:
        super().__init__()
        n, r = method.n, method.rank
        init = xavier_uniform(2**0.5)
        self.s = parameter((n, k // n, r or d // n), init, like)  # B itself where it is whole
        self.t = None if not r else parameter((n, r, d // n), init, like)
        self.bias = parameter((d,), zeros, like)
        self.own = Rule(method, like) if rule is None else None
        # in a list, so that the shared rule is registered once, at the model's root
        self._rules = [rule if self.own is None else self.own]

    @property
    def a(self) -> Tensor:
        """A [n, n, n]."""
        (rule,) = self._rules
        assert rule is not None
        return rule.a

    def matrix(self) -> Tensor:
        """W [k, d]; the forward pass never builds it."""
        b = self.s if self.t is None else self.s @ self.t
        return torch.einsum("iab,ipq->apbq", self.a, b).reshape(self.a.shape[1] * b.shape[1], -1)

    def forward(self, x: Tensor) -> Tensor:
        n = self.a.shape[0]
        blocks = x.reshape(*x.shape[:-1], n, -1)  # [.., n, k/n]
        thin = torch.einsum("...ap,ipr->...air", blocks, self.s)
        mixed = torch.einsum("...air,iab->...bir", thin, self.a)
        y = mixed.sum(-2) if self.t is None else torch.einsum("...bir,irq->...bq", mixed, self.t)
        return y.flatten(-2) + self.bias


class Hypercomplex(Branch):
    """down: d -> m, up: m -> d."""

    def __init__(self, method: PHM, site: Site, m: int, like: Tensor, rule: Rule | None) -> None:
        super().__init__(method.position, site)
        self.down = Linear(method, site.d, m, like, rule)
        self.up = Linear(method, m, site.d, like, rule)
        self.act, self.dropout = method.act, method.dropout

    def branch(self, h: Tensor) -> Tensor:
        h = ACTIVATIONS[self.act](self.down(h))
        return self.up(drop(h, self.dropout, self.training))
