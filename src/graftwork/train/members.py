"""Trained adapters beside the one that a command is about: what it mixes, or what an expression names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from ..core.adapter import Adapter
from ..core.errors import GraftError
from ..core.mixing import mixing
from ..formats import load
from ..store.hub import Place, locate


def placed(folders: Sequence[str | Path], own: str | None = None) -> list[Place]:
    """The folders, each found. GraftError where two of them, or one and the name `own`, are called the same."""
    places = [locate(folder) for folder in folders]
    names = [place.name for place in places] + ([] if own is None else [own])
    if len(set(names)) < len(names):
        raise GraftError("several adapters", f"folders of one name: {', '.join(names)}", "call each folder otherwise")
    return places


def load_frozen(model: nn.Module, places: Sequence[Place]) -> None:
    """The adapters of these folders, each called as its folder; they are not trained."""
    for place in places:
        load(model, str(place), place.name)


def check_mixed(adapter: Adapter, places: Sequence[Place]) -> None:
    """GraftError where an adapter that is to be trained does not mix those beside it, or would train them without keeping them."""
    part = mixing(adapter)
    asked = f"train {' + '.join(map(str, adapter.methods))}"
    if part is None and places:
        do = f'leave --with out, or mix them: --method "fusion(of={[place.name for place in places]})"'
        raise GraftError(asked, f"it does not use {places[0].name}", do)
    if part is not None and part.method.joint:  # type: ignore[attr-defined]
        do = "leave joint out, or train them together in Python, and save each"
        raise GraftError(asked, "joint trains the adapters that it mixes, and only the mixture is written", do)
