"""The deltas of CoDA: at a block, at its attention, and at each of its linear layers (see `coda`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graftwork.core.attention import Attention
from graftwork.core.delta import Delta
from graftwork.core.errors import GraftError
from graftwork.core.initial import parameter, uniform
from graftwork.core.masks import Tokens
from graftwork.core.plan import first_output, first_tensor, replace_first, replace_output
from graftwork.core.site import Site

from ...activation.forms.residual import Residual
from .soft_topk import exact, iterated

if TYPE_CHECKING:
    from ..coda import CoDA


def taken(t: Tensor, index: Tensor, axis: int = 1) -> Tensor:
    """The entries at index [batch, k] along an axis of t [batch, ..]."""
    at = index.view(index.shape[0], *[1] * (axis - 1), -1, *[1] * (t.dim() - axis - 1))
    return t.gather(axis, at.expand(*t.shape[:axis], -1, *t.shape[axis + 1 :]))


def put_back(t: Tensor, index: Tensor, n: int, axis: int = 1) -> Tensor:
    """Zeros, but for the entries t at index [batch, k] along an axis of length n."""
    at = index.view(index.shape[0], *[1] * (axis - 1), -1, *[1] * (t.dim() - axis - 1)).expand_as(t)
    return t.new_zeros(*t.shape[:axis], n, *t.shape[axis + 1 :]).scatter(axis, at, t)


class Choice(Delta):
    """At a block: weight = w [1, d], and the adapter."""

    def __init__(self, method: CoDA, site: Site, adapter: Residual, trail: str) -> None:
        super().__init__()
        self.weight = parameter((1, site.d), uniform(-(site.d**-0.5), site.d**-0.5), site.like)
        self.adapter, self.method, self.trail = adapter, method, trail

    def inner(self) -> list[Delta]:
        return [self.adapter]

    def around(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        x = first_tensor(args, kwargs)
        if x.dim() != 3:
            found = f"states {list(x.shape)}, not [batch, tokens, d]"
            raise GraftError(f"the tokens of {self.key}", found, "choose another host")
        if self.runtime.past:
            found = "a key-value cache: the choice is among all tokens, and those in the cache are not seen"
            raise GraftError("a pass through a conditional adapter", found, "generate with use_cache=False")
        state = self.runtime.state
        outer = state.get(self.trail)
        weights, index = self.chosen(x, outer)
        state[self.trail], state[self.trail, "shape"] = index, x.shape[:2]
        out = base(*args, **kwargs)
        given = state[self.trail, "given"] if outer is not None else state.pop((self.trail, "given"))
        if outer is None:
            del state[self.trail]
        else:
            state[self.trail] = outer
        y = first_output(out)
        kept = put_back(torch.ones_like(index), index, x.shape[1]).bool()
        y = torch.where(kept[..., None], y + (weights[..., None] - 1).to(y.dtype) * (y - x), x)
        y = y + self.adapter.branch(given)
        return y if isinstance(out, Tensor) else replace_output(out, y)

    def chosen(self, x: Tensor, outer: Tensor | None) -> tuple[Tensor, Tensor]:
        """lambda [batch, n] and the places [batch, k], rising, of the largest, for x [batch, n, d].

        outer [batch, n']: the only ones to choose among, where another conditional adapter around this one has chosen.
        """
        m, n = self.method, x.shape[1]
        s = F.linear(x.reshape(-1, x.shape[-1]), self.weight).view(x.shape[:-1])
        s = s.to(torch.promote_types(s.dtype, torch.float32))
        mask = self.runtime.mask
        if mask is not None and mask.shape == s.shape:
            s = s.masked_fill(~mask.bool(), s.detach().min() - 100)
        if outer is not None:
            n = outer.shape[1]
            s = torch.where(put_back(torch.ones_like(outer), outer, x.shape[1]).bool(), s, s.detach().min() - 100)
        k = math.ceil(n / m.reduction)
        if m.solver == "exact":
            weights = exact(s, k, m.eps)
        else:
            weights = iterated(s, k, m.eps, m.iters, m.eps_init, m.eps_decay)
        return weights, s.topk(k, -1).indices.sort(-1).values


class Among(Delta):
    """At an attention: the queries are those of the chosen tokens, and the keys, too, or those of all."""

    def __init__(self, method: CoDA, trail: str) -> None:
        super().__init__()
        self.trail, self.all = trail, method.attention == "k-to-all"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, attention: Attention) -> Tensor:
        index, x = self.runtime.state[self.trail], attention.input
        self.runtime.state[self.trail, "given"] = x
        if q.shape[2] == index.shape[1] < x.shape[1]:  # another conditional adapter has taken the tokens
            return attention(q, k, v, mask)
        n, extra = x.shape[1], k.shape[2] - attention.keys
        if x.dim() != 3 or q.shape[2] != n or attention.keys != n or q.shape[0] != index.shape[0]:
            found = f"queries {list(q.shape)} and {attention.keys} keys for {n} tokens of {index.shape[0]} rows"
            raise GraftError(f"the tokens at {self.key}", found, "choose a model whose attention is over all tokens")
        if not self.all:
            k, v = (torch.cat([t[:, :, :extra], taken(t[:, :, extra:], index, 2)], 2) for t in (k, v))
        some = attention.on(Tokens(index, None if self.all else index))
        return put_back(some(taken(q, index, 2), k, v, mask), index, n, 2)


class Gathered(Delta):
    """At a linear layer: it runs for the chosen tokens, and gives zeros for the others."""

    def __init__(self, trail: str) -> None:
        super().__init__()
        self.trail = trail

    def around(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        x = first_tensor(args, kwargs)
        index = self.runtime.state.get(self.trail)
        if index is None or x.dim() != 3 or x.shape[:2] != self.runtime.state[self.trail, "shape"]:
            return base(*args, **kwargs)
        n = x.shape[1]
        args, kwargs = replace_first(args, kwargs, x, taken(x, index))
        return put_back(self.runtime.run_part(lambda t: taken(t, index), base, *args, **kwargs), index, n)
