"""A new adapter out of one that is there, in which the parts of one method have become another method's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter, Part
from ..core.errors import GraftError
from ..core.method import Method
from ..grafting.graft import attach, build, check_name, find
from ..grafting.install import check_free
from ..grafting.root import body_of
from ..sites.where import select
from .hold import inherit


@dataclass(frozen=True)
class Turn:
    """What becomes of the parts whose method is a `kind`; without one, the adapter has no `parts`.

    method: of the new part, at the sites of the old one unless its `at` is another;  values(old, new): tensors for a new delta from the old
    one at its site, for which there may be none (the new one then stays as it was built);  shared(old, new): fills the shared modules.
    """

    kind: type[Method]
    parts: str
    method: Callable[[Any], Method]
    values: Callable[[Any, Any], dict[str, Tensor]]
    shared: Callable[[nn.ModuleDict, nn.ModuleDict], None] = lambda old, new: None


@torch.no_grad()
def turned(model: nn.Module, name: str, of: str, asked: str, turn: Turn, seed: int) -> Adapter:
    """The adapter `of` under a new name, active and trainable, with these parts turned and copies of all others. `of` stays as it is.

    GraftError(asked), with the model as it was, where there is nothing to turn.
    """
    body = body_of(model)
    check_free(model, body)
    check_name(model, name)
    source, generator = find(model, of), torch.Generator().manual_seed(seed)
    if not any(isinstance(m, turn.kind) for m in source.methods):
        raise GraftError(asked, f"{source!r} has no {turn.parts}", f"name an adapter of gw.{turn.kind.__name__}")
    parts: list[Part] = []
    for old in source.parts:
        turns = isinstance(old.method, turn.kind)
        made = turn.method(old.method) if turns else old.method
        same = made.at == old.method.at
        sites = [body.sites[site.key] for site in old.sites] if same else select(body.anatomy, made.at, made.layers)
        new = build(made, sites, body.anatomy, generator)
        if turns:
            turn.shared(old.shared_modules, new.shared_modules)
        else:
            new.shared_modules.load_state_dict(old.shared_modules.state_dict())
        for key, delta in new.deltas.items():
            if key in old.deltas:
                was = old.deltas[key]
                tensors = turn.values(was, delta) if turns else dict(was.state_dict())
                delta.restore({n: t.detach().clone() for n, t in tensors.items()})
        parts.append(new)
    adapter = Adapter(name, parts)
    inherit(adapter, [source])
    adapter.metadata["composed"] = {"of": of, "how": asked}
    attach(model, adapter, body)
    return adapter
