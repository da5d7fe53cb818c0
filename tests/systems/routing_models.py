"""Adapters to mix, on the backbones of `adapter_models`: where AdapterFusion's peers have theirs, random, and what a pass says of them."""

from __future__ import annotations

import torch
from adapter_models import ids
from torch import Tensor, nn
from value_models import randomly

import graftwork as gw
from graftwork.grafting.root import root_of

NORMS = r"/encoder\.layer\.\d+\.output\.LayerNorm$/"  # behind the feed-forward layers of BERT: AdapterHub's Pfeiffer adapter


def pfeiffer(d: int = 4) -> gw.Method:
    """norm(z + A(norm(z))), z the input of the norm behind a feed-forward layer."""
    return gw.Bottleneck(d=d, act="relu", position="sum", at=NORMS)


def members(model: nn.Module, methods, names: str = "ab", std: float = 0.3) -> nn.Module:
    """Random adapters of one kind, one for each letter."""
    for seed, name in enumerate(names, 1):
        randomly(model, methods, name, seed, std)
    return model


def states(model: nn.Module, expression: str | gw.A | None, x: Tensor | None = None, **more) -> Tensor:
    """The last hidden states under an expression."""
    with torch.no_grad(), gw.using(model, expression):
        return model(ids() if x is None else x, output_hidden_states=True, **more).hidden_states[-1]


def shares(model: nn.Module, expression: str, x: Tensor | None = None) -> dict[str, Tensor]:
    """The weights [batch, seq, n] that the members have at each place in one pass."""
    seen: dict[str, Tensor] = {}
    runtime = root_of(model).runtime
    runtime.watching = lambda key, who, w: seen.__setitem__(key, w)
    try:
        states(model, expression, x)
    finally:
        runtime.watching = None
    return seen


def set_value(adapter: gw.Adapter, value) -> None:
    """V = value(d) at every place of a fusion."""
    for delta in adapter.deltas():
        delta.value.data = value(len(delta.value))
