"""Prompts of a vision tower at work: more tokens in front of a block, fewer behind it (see `vpt`)."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftwork.core.adapter import Part
from graftwork.core.attention import Attention, projected
from graftwork.core.delta import Delta
from graftwork.core.errors import GraftError
from graftwork.core.initial import normal, parameter, uniform
from graftwork.core.plan import first_output, first_tensor, replace_first, replace_output
from graftwork.core.site import Site
from graftwork.products.dropout import drop

FAN = 3 * 16 * 16  # numbers in a patch, where nothing embeds patches


def check_block(asked: str, site: Site, part: Part) -> None:
    """GraftError unless the site is a block with one attention, of tokens that have no text's masks and positions."""
    if any(s.role == "entry" and s.tower == site.tower for s in part.anatomy.sites):
        raise GraftError(asked, "a text's tokens, with masks and positions of their own", "use prompt or prefix")
    inside = len(part.inside(site, "attn")) if site.role == "block" else 0
    if inside != 1:
        found = f"{inside} attentions in a block" if site.role == "block" else f"a site of role {site.role!r}"
        raise GraftError(asked, found, "choose blocks of a vision transformer: at='block', 'vision.block'")


def windowed(block: nn.Module) -> bool:
    """Whether a block must be told more than its tokens and their mask: it lays them out in the plane, to part them into windows."""
    given = list(inspect.signature(block.forward).parameters.values())[1:]
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return any(p.default is p.empty and p.kind in plain and "mask" not in p.name for p in given)


def bound(part: Part, width: int) -> float:
    """v of the initial U(-v, v)."""
    patches = [s.module for s in part.anatomy.of("embed") if isinstance(s.module, nn.Conv2d)]
    return math.sqrt(6 / ((patches[0].weight[0].numel() if patches else FAN) + width))


class Tokens(nn.Module):
    """prompt = P [n, width]."""

    def __init__(self, n: int, width: int, v: float, like: Tensor) -> None:
        super().__init__()
        self.prompt = parameter((n, width), uniform(-v, v), like)

    def forward(self) -> Tensor:
        return self.prompt


class Projection(nn.Module):
    """proj: weight [d, width], bias [d]."""

    def __init__(self, width: int, d: int, like: Tensor) -> None:
        super().__init__()
        self.weight = parameter((d, width), normal(math.sqrt(2 / d)), like)
        self.bias = parameter((d,), uniform(-(width**-0.5), width**-0.5), like)

    def forward(self, p: Tensor) -> Tensor:
        return F.linear(p, self.weight, self.bias)


class VisualPrompt(Delta):
    """tokens: P where the block's prompts begin, unless blocks share it.  cuts: they end behind this block.

    num_tokens: how many there are where others have put them in front of an earlier block.
    """

    def __init__(
        self,
        asked: str,
        site: Site,
        part: Part,
        tokens: Tokens | None,
        projection: Projection | None = None,
        *,
        num_tokens: int,
        dropout: float,
        cuts: bool = True,
        shared: bool = False,
    ) -> None:
        super().__init__()
        self.num_tokens, self.dropout, self.cuts = num_tokens, dropout, cuts
        self.tokens = None if shared else tokens
        self._made: tuple[Any, Any] = (tokens, projection)  # in a tuple: what is shared is no part of one delta
        self._windows: tuple[Any, ...] = ()
        if windowed(site.module):
            (attention,) = part.inside(site, "attn")
            norm = next((s.module for s in part.anatomy.of("norm") if s.path == attention.norm), None)
            keys, values = part.inside(site, "k"), part.inside(site, "v")
            if norm is None or len(keys) != 1 or len(values) != 1:
                found = "its norm or its key and value projections are not known"
                raise GraftError(f"{asked} at {site.key}", found, "choose other layers")
            self._windows = (norm, keys[0], values[0])

    def rows(self, batch: int) -> Tensor:
        """drop(proj(P)) [batch, n, d], or [1, n, d] where all rows have the same."""
        tokens, projection = self._made
        p = tokens() if projection is None else projection(tokens())
        if not (self.dropout and self.training):
            return p[None]  # type: ignore[no-any-return]
        return drop(p.expand(batch, -1, -1), self.dropout)

    def around(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        x = first_tensor(args, kwargs)
        if any(isinstance(v, Tensor | tuple) and v is not x for v in (*args, *kwargs.values())):
            found = "the block is also given a mask or positions of its tokens"
            raise GraftError(f"visual prompts at {self.key}", found, "leave the mask out, or choose other blocks")
        n = self.num_tokens
        if self._made[0] is not None:
            rows = self.rows(x.shape[0]).to(x.dtype).expand(x.shape[0], -1, -1)
            # blocks see no order: behind the first token, which is the class token where there is one
            args, kwargs = replace_first(args, kwargs, x, torch.cat([x[:, :1], rows, x[:, 1:]], 1))
            n = rows.shape[1]
        out = base(*args, **kwargs)
        if not self.cuts:
            return out
        y = first_output(out)
        shorter = torch.cat([y[:, :1], y[:, 1 + n :]], 1)
        return shorter if y is out else replace_output(out, shorter)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, attention: Attention) -> Tensor:
        # what a prompt itself becomes is thrown away behind a block, so that only what others see of it counts
        norm, *sites = self._windows
        p = norm(self.rows(k.shape[0]).to(k.dtype))
        more = []
        for site, t in zip(sites, (k, v), strict=True):
            flat = projected(p.flatten(0, 1), site, t.shape[1])[0]  # [heads, batch n, d_head]
            rows = flat.unflatten(1, p.shape[:2]).transpose(0, 1)
            more.append(torch.cat([rows.expand(k.shape[0], -1, -1, -1), t], 2))
        return attention(q, more[0], more[1], mask)

    def overrides(self, function: str) -> bool:
        if function in ("around", "attend"):
            return bool(self._windows) == (function == "attend")
        return super().overrides(function)
