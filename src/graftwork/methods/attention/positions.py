"""Positions behind a prefix, and prefixes from real words: a prefix as the cache of tokens that came before."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from graftwork.core.adapter import Adapter
from graftwork.core.attention import Attention
from graftwork.core.delta import Delta
from graftwork.core.errors import GraftError
from graftwork.core.graft import find, using
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


def from_words(model: nn.Module, name: str, **inputs: Any) -> None:
    """Start the flat prefixes of adapter `name` as the keys and values that the frozen model gives to real words.

    inputs: what the model is called with; one row of as many tokens as the prefix is long. Li and Liang 2021,
    section 7.4.
    """
    adapter: Adapter = find(model, name)
    prefixes: list[Any] = [d for d in adapter.deltas() if "keys" in d._parameters and "values" in d._parameters]
    if not prefixes:
        raise GraftError(
            f"the prefixes of {name!r} from words", "it has no flat prefix", "graft prefix(reparam='flat')"
        )
    taken: list[tuple[Tensor, Tensor]] = []

    def note(delta: Any) -> Callable[..., Tensor]:
        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, attention: Attention) -> Tensor:
            for stored, t in ((delta.keys, k), (delta.values, v)):
                rows = t[0].transpose(0, 1).flatten(1)[:, : stored.shape[1]]
                if rows.shape != stored.shape:
                    raise GraftError(
                        f"a prefix of {list(stored.shape)} from words", f"{list(rows.shape)}", "give `length` tokens"
                    )
                taken.append((stored, rows.clone()))
            return attention(q, k, v, mask)

        return attend

    shifts = [d for d in adapter.deltas() if isinstance(d, Shift)]
    lengths = [d.length for d in shifts]
    try:
        for shift in shifts:
            shift.length = 0  # the words themselves stand at the start
        for delta in prefixes:
            delta.attend = note(delta)
        with torch.no_grad(), using(model, name):
            model(**inputs)
            for stored, rows in taken:
                stored.copy_(rows)
    finally:
        for shift, length in zip(shifts, lengths, strict=True):
            shift.length = length
        for delta in prefixes:
            delta.__dict__.pop("attend", None)
