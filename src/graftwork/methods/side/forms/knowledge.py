"""The deltas of K-Adapter: an adapter layer beside a block, and the features at the end of the stack (see `k_adapter`)."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftwork.core.errors import GraftError
from graftwork.core.initial import made, normal, ones, parameter, zeros
from graftwork.core.site import Site
from graftwork.products.dropout import drop

from .trail import End, Line, Seen, Step, visible

if TYPE_CHECKING:
    from ..k_adapter import KAdapter


class Layer(nn.Module):
    """x' = LN(x + attention(x)),  x'' = LN(x' + down(gelu(up(x'))))."""

    def __init__(self, d: int, heads: int, d_ff: int, dropout: float, like: Tensor) -> None:
        super().__init__()
        start = normal(0.02)
        self.qkv, self.out = Line(d, 3 * d, like, start), Line(d, d, like, start)
        self.up, self.down = Line(d, d_ff, like, start), Line(d_ff, d, like, start)
        self.gains = nn.ParameterList([parameter((d,), ones, like) for _ in range(2)])
        self.shifts = nn.ParameterList([parameter((d,), zeros, like) for _ in range(2)])
        self.heads, self.dropout = heads, dropout

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x [batch, seq, d];  mask: True where a query may look, [batch or 1, 1, seq or 1, seq]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        x = self.normed(0, x + drop(self.out(seen), self.dropout, self.training))
        return self.normed(1, x + drop(self.down(F.gelu(self.up(x))), self.dropout, self.training))

    def normed(self, i: int, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.gains[i], self.shifts[i], 1e-5)


class Knowledge(Step):
    """down = D, layers = T, up = U."""

    def __init__(self, method: KAdapter, site: Site, trail: str, causal: bool) -> None:
        super().__init__(site, trail)
        d, like, start = method.d, site.like, normal(method.init_std)
        self.down, self.up = Line(site.d, d, like, start), Line(d, site.d, like, start)
        self.layers = nn.ModuleList(
            [Layer(d, method.heads, method.d_ff, method.dropout, like) for _ in range(method.depth)]
        )
        self.causal = causal

    def know(self, u: Tensor, given: dict[str, Any]) -> Tensor:
        """o from u, both [batch, seq, D].  given: the block's arguments."""
        x, mask = self.down(u), self.mask(u, given)
        for layer in self.layers:
            x = layer(x, mask)
        return u + self.up(x)

    def mask(self, u: Tensor, given: dict[str, Any]) -> Tensor | None:
        """True where a token may look: where the block's own may, not at padding, and always at itself."""
        seq, padding = u.shape[1], self.runtime.mask
        found = [visible(given, seq)]
        if self.causal:
            found.append(torch.ones(seq, seq, dtype=torch.bool, device=u.device).tril()[None, None])
        if padding is not None and padding.shape == u.shape[:2]:
            found.append(padding[:, None, None].bool())
        masks = [t for t in found if t is not None]
        if not masks:
            return None
        return functools.reduce(torch.logical_and, masks) | torch.eye(seq, dtype=torch.bool, device=u.device)


class Features(End):
    """dense = (W_c, b_c)."""

    def __init__(self, method: KAdapter, site: Site, trail: str) -> None:
        super().__init__(trail)
        d, like = site.d, site.like
        eye = made(lambda: torch.eye(d, 2 * d)) if method.start == "identity" else None
        self.dense = Line(2 * d, d, like, eye)

    def finish(self, y: Tensor, seen: list[Seen]) -> Tensor:
        """W_c [y ; o_last] + b_c."""
        if self.runtime.past:
            do = "generate with use_cache=False"
            raise GraftError("k_adapter with a key-value cache", "its layers keep no keys of earlier tokens", do)
        out: Tensor | None = None
        for one in seen:
            out = one.step.know(one.x if out is None else one.x + out, one.given)
        assert out is not None
        return self.dense(torch.cat([y, out], -1))  # type: ignore[no-any-return]
