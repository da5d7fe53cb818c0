"""Attention masks and biases [.., queries, keys]: that of a causal model, and one for more keys, or for some tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import GraftError


@dataclass(frozen=True)
class Tokens:
    """Some tokens of each row: places [batch, n] of the queries and, where only some of these are seen either, of the keys."""

    queries: Tensor
    keys: Tensor | None = None


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """[queries, keys], True where a query may look, counted from the first query and key as `is_causal` does."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril()


def extend(mask: Any, extra: int, keys: int) -> Any:
    """The mask or bias over `keys` columns with `extra` visible ones in front. GraftError for one that is no tensor."""
    if mask is None or not extra:
        return mask
    _check(mask)
    if mask.shape[-1] != keys:  # a mask that is broadcast over the keys
        mask = mask.expand(*mask.shape[:-1], keys)
    return F.pad(mask, (extra, 0), value=True if mask.dtype == torch.bool else (0 if mask.is_floating_point() else 1))


def cut(mask: Any, tokens: Tokens) -> Any:
    """The mask or bias of all tokens, at most [batch, heads, queries, keys], for some of them. GraftError for one that is no tensor."""
    if mask is None:
        return None
    _check(mask)
    mask = mask[(None,) * (4 - mask.dim())]
    mask = mask.expand(tokens.queries.shape[0], *mask.shape[1:])
    for axis, places in ((2, tokens.queries), (3, tokens.keys)):
        if places is not None and mask.shape[axis] > 1:
            at = places[:, None, :, None] if axis == 2 else places[:, None, None, :]
            shape = list(mask.shape)
            shape[axis] = places.shape[1]
            mask = mask.gather(axis, at.expand(shape))
    return mask


def _check(mask: Any) -> None:
    if not isinstance(mask, Tensor):
        raise GraftError(
            "other keys or queries than the backbone has",
            f"an attention mask of type {type(mask).__name__}",
            "use attn_implementation='sdpa'",
        )
