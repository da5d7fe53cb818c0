"""What graftwork's own files say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ...core.errors import GraftError
from ...store.atomic import DESCRIPTION, TENSORS
from ...store.read import read
from ..files import read_json
from .report import Said

FILES = ((TENSORS,),)


def said(folder: Path, tensors: Mapping[str, Tensor]) -> Said:
    """The methods with their sites; the whole reading, hashes included, decides what is wrong."""
    made = Said()
    try:
        stored = read(folder)
    except GraftError as error:
        made.problems.append(error.found)
        return made
    made.methods = [f"{m.method} at {len(m.sites)} sites" for m in stored.methods]
    made.of = stored.backbone.parameters if stored.backbone is not None else None
    if origin := stored.metadata.get("hub"):
        made.notes.append(f"made from {origin}")
    return made


def backbone(folder: Path) -> tuple[str | None, str | None]:
    """(name, class) of the backbone, each None where adapter.json does not say."""
    try:
        found = read_json(folder / DESCRIPTION).get("backbone")
    except GraftError:
        return None, None
    about = found if isinstance(found, dict) else {}
    name, kind = (about.get(key) for key in ("name", "class"))
    return (name if isinstance(name, str) and name else None), (kind if isinstance(kind, str) else None)
