"""Which saved adapters are alike: by their numbers and by what is written about them. No backbone is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.errors import GraftError
from ..methods.weight.full import Full
from ..methods.weight.lora import LoRA
from ..store.atomic import DESCRIPTION
from ..store.read import Stored, read
from ..store.recipe import recipe_in
from .change import Change


@dataclass(frozen=True)
class Neighbour:
    """A saved adapter beside another.  cosine: of their numbers, None where they have none in common (another backbone,
    other methods);  text: of their words, in [0, 1]."""

    folder: Path
    name: str
    method: str
    cosine: float | None
    text: float


def neighbours(folder: str | Path, among: str | Path) -> list[Neighbour]:
    """The adapters in the folders directly below `among`, most alike first; `folder` itself is left out,
    and so are recipes.

    By numbers: LoRAs of one backbone by their changes dW, whatever their ranks; others by their tensors, where method,
    sites and shapes are the same. Heads are left out. By words: tf-idf over names, labels and metadata.
    Raises GraftError for a folder without adapters, and for a damaged one.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    own, below = Path(folder).expanduser(), Path(among).expanduser()
    if not below.is_dir():
        raise GraftError(
            f"adapters like {str(folder)!r} in {str(among)!r}", "no such folder", "give a folder of adapters"
        )
    folders = sorted(p.parent for p in below.glob(f"*/{DESCRIPTION}") if p.parent.resolve() != own.resolve())
    others = [folder for folder in folders if recipe_in(folder) is None]
    if not others:
        raise GraftError(f"adapters like {str(folder)!r} in {str(among)!r}", "none", "give a folder of adapter folders")
    stored = [read(path) for path in (own, *others)]
    words = TfidfVectorizer(token_pattern=r"[^\W_]+").fit_transform([_words(one) for one in stored])
    texts = (words[1:] @ words[0].T).toarray()[:, 0].tolist()
    found = [
        Neighbour(path, one.name, " + ".join(m.method.name for m in one.methods), _cosine(stored[0], one), text)
        for path, one, text in zip(others, stored[1:], texts, strict=True)
    ]
    return sorted(found, key=lambda n: (2.0 if n.cosine is None else -n.cosine, -n.text))


def _cosine(one: Stored, other: Stored) -> float | None:
    if one.backbone is None or other.backbone is None or one.backbone.differs(other.backbone):
        return None
    here, there = _features(one), _features(other)
    common = [key for key in here if key in there and here[key].shape == there[key].shape]
    if not common:
        return None
    sizes = [sum(f.change.inner(f.change) for f in features.values()) for features in (here, there)]
    inner = sum(here[key].change.inner(there[key].change) for key in common)
    size = math.sqrt(sizes[0] * sizes[1])
    return inner / size if size else 0.0


@dataclass(frozen=True)
class _Feature:
    shape: tuple[int, ...]
    change: Change


def _features(stored: Stored) -> dict[str, _Feature]:
    """A LoRA's dW by site; of other methods each tensor by its name."""
    out = {}
    for i, entry in enumerate(stored.methods):
        if isinstance(entry.method, Full):
            continue
        for site, tensors in stored.tensors[i].items():
            real = {n: t.double() for n, t in tensors.items() if t.is_floating_point()}
            if isinstance(entry.method, LoRA) and real.keys() == {"down", "up"}:
                down, up = real["down"], entry.method.scale * real["up"]
                out[site] = _Feature((*down.shape[:-2], up.shape[-2], down.shape[-1]), Change(down, up))
            else:
                key = f"{entry.method.name}/{site}"
                out |= {f"{key}/{n}": _Feature(tuple(t.shape), _flat(t)) for n, t in real.items()}
    return out


def _flat(t: Tensor) -> Change:
    return Change(matrix=t.reshape(1, -1))


def _words(stored: Stored) -> str:
    methods = " ".join(m.method.name for m in stored.methods)
    return " ".join([stored.name, methods, *(stored.labels or ()), *_texts(stored.metadata)])


def _texts(value: Any) -> Iterator[str]:
    """Every text in nested lists and dictionaries."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, Sequence):
        for inner in value:
            yield from _texts(inner)
