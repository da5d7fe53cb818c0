"""Positions behind a prefix: a prefix as the cache of tokens that came before."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from graftwork.core.delta import Delta
from graftwork.core.errors import GraftError
from graftwork.core.site import Site


class Shift(Delta):
    """No parameters: the position ids of a module where tokens enter start at `length`."""

    def __init__(self, length: int, site: Site) -> None:
        super().__init__()
        self.length, self.names = length, list(inspect.signature(site.module.forward).parameters)
        counted = any(
            isinstance(m, nn.Embedding) and m.padding_idx is not None and n != site.exit for n, m in _inside(site)
        )
        if "position_ids" not in self.names or counted:
            raise GraftError(
                f"positions behind a prefix at {site.key}", "it numbers its tokens itself", "use at='attn'"
            )

    def around(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self.names, args, strict=False)) | kwargs
        positions = given.get("position_ids")
        if positions is None:
            x = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
            past = given.get("past_key_values")
            seen = past.get_seq_length() if past is not None else 0
            positions = torch.arange(x.shape[1], device=x.device)[None] + seen
        given["position_ids"] = positions + self.length
        return base(**given)


def _inside(site: Site) -> list[tuple[str, nn.Module]]:
    return [(".".join(filter(None, (site.path, name))), m) for name, m in site.module.named_modules()]
