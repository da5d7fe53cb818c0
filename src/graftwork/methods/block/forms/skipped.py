"""The delta of a block that may be left out (see `das`)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from graftwork.core.delta import Delta
from graftwork.core.errors import GraftError
from graftwork.core.passes import Runtime
from graftwork.core.plan import first_tensor
from graftwork.core.site import Site

from ...side.forms.inputs import CARRIED
from .search import Search, block_name


class Skipped(Delta):
    """instead = S_i, an edit of the block's input;  gate = g_i, which no gradient reaches."""

    gate: Tensor

    def __init__(self, instead: Delta, search: Search, site: Site) -> None:
        super().__init__()
        self.instead, self._search = instead, (search,)  # the search is shared by all blocks, and no child of one
        self.name, self.path, self.layer = block_name(site), site.path, site.layer
        self.register_buffer("gate", torch.zeros((), device="cpu"))
        self._seen = 0  # writes to the gate
        self.names = list(inspect.signature(site.module.forward).parameters)

    def inner(self) -> list[Delta]:
        return [self.instead]

    def join(self, runtime: Runtime) -> None:
        super().join(runtime)
        self._search[0].refresh()  # it has the stored gates now, if there are any

    def around(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        search = self._search[0]
        if not torch.compiler.is_compiling() and self.gate._version != self._seen:
            self._seen = self.gate._version
            search.refresh()
        if not search.skips(self.name, self.training):
            out = base(*args, **kwargs)
            search.returns = _returned(out, self.key)
            return out
        if search.returns is None:
            with torch.no_grad():  # once: what does a block return?
                bare = {name: _uncached(value) for name, value in kwargs.items()}
                search.returns = _returned(base(*map(_uncached, args), **bare), self.key)
        if not torch.compiler.is_compiling():
            self.runtime.left_out.add(self.path)
        x = first_tensor(args, kwargs)
        z, given = self.instead(x, x), dict(zip(self.names, args, strict=False)) | kwargs
        cache = given.get("past_key_values")
        if self.layer is not None and hasattr(cache, "get_seq_length"):
            _hold_place(cache, self.layer, x)
        if not search.returns:
            return z
        carried = [given.get(name) for name in CARRIED] + [None] * search.returns
        return (z, *carried[: search.returns - 1])


def _hold_place(cache: Any, layer: int, x: Tensor) -> None:
    """As many keys as there are tokens, each of one number: a cache's length is that of its first layer, and some models read all."""
    room = x.new_zeros(x.shape[0], 1, x.shape[1], 1)
    getattr(cache, "self_attention_cache", cache).update(room, room, layer)
    cross = getattr(cache, "cross_attention_cache", None)
    if cross is not None and not cache.is_updated.get(layer):
        cross.update(room, room, layer)
        cache.is_updated[layer] = True


def _returned(out: Any, key: str) -> int:
    """How many values: 0 for a tensor, otherwise the length of the tuple."""
    if isinstance(out, Tensor):
        return 0
    if not isinstance(out, tuple) or not isinstance(out[0], Tensor):
        raise GraftError(f"leave out {key}", f"a block that returns {type(out).__name__}", "use another method")
    return len(out)


def _uncached(value: Any) -> Any:
    """An argument of a block, without the key-value cache."""
    return None if hasattr(value, "get_seq_length") else value
