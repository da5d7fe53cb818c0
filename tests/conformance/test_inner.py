"""Deltas inside deltas: each has the site and the runtime of the one around it, whatever happens to the model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graftwork as gw
from graftwork.core.delta import Delta, WeightDelta
from graftwork.grafting.install import root_of

from .cases import first, grafted, leave_init
from .hosts import BY_NAME, fresh, output
from .settings import Case

NESTED = {
    "sparse(of=bottleneck(d=4))": 2,
    "generated(of=bottleneck(d=4))": 2,
    "mixture(of=lora(r=2), experts=3)": 4,
    "mixture(of=bottleneck(d=4), experts=2)": 3,
    "sparse(of=sparse(of=lora(r=4)))": 3,
    "sparse(of=mixture(of=lora(r=4), experts=2))": 4,
    "mixture(of=sparse(of=lora(r=4)), experts=2)": 5,
    "mixture(of=sparse(of=bottleneck(d=4)), experts=2)": 5,
    "mixture(of=generated(of=bottleneck(d=4)), experts=2)": 5,
    "mixture(of=mixture(of=lora(r=2), experts=2), experts=2)": 7,
    "generated(of=mixture(of=lora(r=2), experts=2))": 4,
    "gated(of=lora(r=2))": 2,
    "moa_hetero(of=[lora(r=2, at='q'), gated(of=lora(r=2), at='v')])": 3,
    "adapter_drop(of=lora(r=2))": 2,
    "adapter_drop(of=gated(of=bottleneck(d=4)))": 2,
    "adapter_drop(of=sparse(of=lora(r=4)))": 3,
    "gated(of=bottleneck(d=4))": 1,
    "keyed(of=sparse(of=lora(r=4)))": 3,
    "keyed(of=bottleneck(d=4), names=('a',))": 2,
    "gated(of=sparse(of=lora(r=4)))": 3,
    "mixture(of=gated(of=lora(r=2)), experts=2)": 5,
}


def deltas_in(value: Any, seen: set[int]) -> Iterator[Delta]:
    """Every delta that can be reached from a value, however it is held."""
    if isinstance(value, Delta) and id(value) not in seen:
        yield value
    if isinstance(value, nn.Module) and id(value) not in seen:
        seen.add(id(value))
        held = {k: v for k, v in value.__dict__.items() if k not in ("runtime", "key", "view")}
        yield from deltas_in(held, seen)
    elif isinstance(value, dict):
        for v in value.values():
            yield from deltas_in(v, seen)
    elif isinstance(value, tuple | list | set):
        for v in value:
            yield from deltas_in(v, seen)


def check(model: nn.Module) -> int:
    """All deltas of the model are where they belong; the most that one site's delta holds, itself included."""
    root, most = root_of(model), 0
    for adapter in gw.adapters(model).values():
        for part in adapter.parts:
            for key, outer in part.deltas.items():
                others = {id(delta) for delta in part.deltas.values()} - {
                    id(outer)
                }  # whose values it may share (tied weights)
                found = list(deltas_in(outer, others))
                most = max(most, len(found))
                for delta in found:
                    assert delta.__dict__["runtime"] is root.runtime
                    assert delta.__dict__["key"] == key
                    if isinstance(delta, WeightDelta) and isinstance(outer, WeightDelta):
                        assert delta.__dict__["view"] == outer.__dict__["view"]
    return most


def everywhere(model: nn.Module, folder: Path) -> Iterator[nn.Module]:
    """The model after each thing that can happen to it."""
    yield model
    gw.activate(model, None)
    yield model
    gw.activate(model, "a")
    yield model
    yield copy.deepcopy(model)
    yield pickle.loads(pickle.dumps(model))
    gw.save(model, "a", folder / "a")
    gw.load(model, folder / "a", name="b")
    yield model
    gw.activate(model, "a >> b")
    yield model
    other = copy.deepcopy(model)
    gw.remove(other, "a")
    yield other


@first
def test_every_method(case: Case, tmp_path: Path) -> None:
    model, _ = grafted(case)
    for state in everywhere(model, tmp_path):
        assert check(state) > 0


@pytest.mark.parametrize("method", NESTED)
def test_nested(method: str, tmp_path: Path) -> None:
    model = fresh(BY_NAME["bert"])
    leave_init(gw.graft(model, method, "a", head=False, seed=0))
    for state in everywhere(model, tmp_path):
        assert check(state) == NESTED[method]
    gw.activate(model, "a")
    want = output(model, BY_NAME["bert"].inputs())
    gw.activate(model, "b")
    assert torch.equal(output(model, BY_NAME["bert"].inputs()), want)
    assert torch.equal(output(copy.deepcopy(model), BY_NAME["bert"].inputs()), want)
