"""Adapters for the checks of merging: random ones of unequal ranks and scales, and what they do to a weight, by hand."""

from __future__ import annotations

import torch
from adapter_models import bert
from torch import Tensor, nn
from weight_models import dense

import graftwork as gw


def randomly(model: nn.Module, methods, name: str, seed: int, std: float = 0.3, around: bool = False) -> gw.Adapter:
    """An adapter with random values; around: added to the initial ones."""
    adapter = gw.graft(model, methods, name, head=False)
    generator = torch.Generator().manual_seed(seed)
    for p in adapter.parameters():
        noise = (std * torch.randn(p.shape, generator=generator)).to(p.dtype)
        p.data = p.data + noise if around else noise
    return adapter


def three(model: nn.Module | None = None) -> nn.Module:
    """a, b, c: LoRAs of unequal ranks and scales, one of them rank-stabilised, one on fewer sites."""
    model = bert() if model is None else model
    randomly(model, gw.LoRA(r=2, alpha=3.0, at="q, v, up"), "a", 1)
    randomly(model, gw.LoRA(r=5, alpha=7.0, rslora=True, at="q, v, up"), "b", 2)
    randomly(model, gw.LoRA(r=3, alpha=1.0, at="q, up"), "c", 3)
    gw.activate(model, None)
    return model


def change(model: nn.Module, name: str | None, key: str) -> Tensor:
    """W' - W of one site, by merging the adapter for real, in float64."""
    before = dense(model, key).detach().double().clone()
    active = gw.active(model)
    gw.activate(model, name)
    gw.merge(model)
    after = dense(model, key).detach().double().clone()
    gw.unmerge(model)
    gw.activate(model, active)
    return after - before


def by_formula(model: nn.Module, name: str, key: str) -> Tensor:
    """s B A of a LoRA at one site in float64; zero where it has none."""
    (part,) = gw.adapters(model)[name].parts
    delta = part.deltas.get(key)
    if delta is None:
        site = next(s for s in gw.anatomy(model).sites if s.key == key)
        return torch.zeros(site.weight.shape, dtype=torch.float64)
    return delta.scale * (delta.up.detach().double() @ delta.down.detach().double())


def keys(model: nn.Module, *names: str) -> list[str]:
    """The sites where these adapters act."""
    return list(dict.fromkeys(site.key for n in names for site in gw.adapters(model)[n].sites))


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "graft" not in n}


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())
