"""The backbone that an adapter's folder, of any format, was made for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from .. import combinators, methods  # noqa: F401  (they register the names that a file uses)
from ..core.errors import GraftError
from ..formats import recognise
from ..store.hub import locate
from . import backbone, tasks
from .described import metadata_of


def open_backbone(folder: str | Path, name: str | None = None) -> tuple[nn.Module, str]:
    """(the backbone with the head that the adapter was made for, its name), with its weights.

    name: the backbone's folder or hub name, where it is not what the file says.
    Raises GraftError where neither says which it is, or it cannot be loaded.
    """
    place = locate(folder).path
    form = recognise(place)
    kind: str | None
    if form is not None:
        said, kind = form.backbone(place)
    else:
        data = metadata_of(folder)
        known: dict[str, Any] = data["metadata"]
        if "task" in known:
            source = name or known["backbone"]
            return backbone.load(source, tasks.from_json(known["task"])).model, source
        said, kind = known.get("backbone") or data["backbone"]["name"], data["backbone"]["class"]
    source = name or said or ""
    if not source:
        raise GraftError(f"the backbone of {str(folder)!r}", "the file does not name it", "name it with --backbone")
    return _open(source, kind), source


def _open(name: str, kind: str | None) -> nn.Module:
    config = backbone.config_of(name)
    wanted = [kind, *(getattr(config, "architectures", None) or ()), "AutoModel"]
    cls: Any = next(found for k in wanted if k and (found := getattr(transformers, k, None)) is not None)
    if not hasattr(cls, "from_pretrained"):
        raise GraftError(f"the backbone {name!r}", f"{kind} is no model of transformers", "use gw.load in Python")
    with backbone.quiet(), torch.random.fork_rng():
        torch.manual_seed(0)  # a head that the checkpoint does not bring starts the same every time
        try:
            model: nn.Module = cls.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise GraftError(f"load {name!r}", str(error).splitlines()[0], "name another with --backbone") from error
    return model.eval()
