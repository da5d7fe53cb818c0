"""Prefixes that start as the keys and values of real words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.attention import Attention
from ..core.errors import GraftError
from ..grafting.graft import find, using
from ..methods.attention.forms.positions import Shift


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
