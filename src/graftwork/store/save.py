"""Saving an adapter."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .. import __version__
from ..core.adapter import Adapter
from ..core.errors import GraftError
from ..grafting.graft import find
from . import keys
from .atomic import write_adapter
from .card import card
from .digest import Digest
from .fingerprint import fingerprint
from .finite import finite
from .tensors import NAMES, written

FORMAT = 1  # of one adapter; 2 is a recipe


def save(model: nn.Module, name: str, folder: str | Path, resume: bool = False, called: str | None = None) -> Path:
    """Write the adapter `name` of `model` into `folder`: its tensors, adapter.json and README.md. Returns the folder.

    folder: made where it is missing; an adapter in it is replaced, other files stay.
    resume: keep all that training needs to go on (the unfolded form, the state of schedules), not only what is used.
    called: its name in the file, None: the one that it has.
    Atomic: until the new files are whole on the disk, the old ones stay; after any failure they still do.
    Raises GraftError for an unknown adapter, values that are not finite or not here (meta device, sharded), metadata
    that JSON cannot hold, and a folder that cannot be written.
    """
    adapter = find(model, name)
    folder = Path(folder).expanduser()
    if folder.exists() and not folder.is_dir():
        raise GraftError(f"save into {str(folder)!r}", "a file of that name", "choose a folder")
    methods, tensors = _stored(adapter, resume)
    stored, aliases = _once(tensors)
    data = written(stored)
    hashed = Digest(data)
    description = {
        "format": FORMAT,
        "name": called or adapter.name,
        "methods": methods,
        "parameters": adapter.num_parameters,
        "labels": None if adapter.labels is None else list(adapter.labels),
        "resume": resume,
        "sha256": "",  # still being taken
        "aliases": aliases,
        "backbone": fingerprint(model).to_json(),
        "versions": versions(),
        "metadata": _plain(adapter.metadata, "metadata"),
    }

    def described(digest: str) -> str:
        return json.dumps(description | {"sha256": digest}, indent=1, ensure_ascii=False) + "\n"

    write_adapter(folder, data, hashed, described, card(adapter, description))
    return folder


def _stored(adapter: Adapter, resume: bool) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """The methods as JSON and every tensor by its name on disk."""
    methods, tensors = [], {}
    for i, part in enumerate(adapter.parts):
        if resume:
            method, per_site = part.method, {k: dict(d.state_dict()) for k, d in part.deltas.items()}
            shared = dict(part.shared_modules.state_dict())
        else:
            method, per_site, shared = part.method.fold(part)
        methods.append({"method": method.to_json(), "sites": [s.key for s in part.sites if s.key in per_site]})
        for site, named in [(keys.SHARED, shared), *per_site.items()]:
            for name, value in named.items():
                tensors[keys.key(i, site, name)] = checked(adapter, f"{site}/{name}", value)
    return methods, tensors


def checked(adapter: Adapter, name: str, value: Any) -> Tensor:
    """A tensor that a file can hold. GraftError for one that is not here as a whole, or not finite."""
    asked = f"save the tensor {name!r} of {adapter.name!r}"
    if not isinstance(value, Tensor):
        raise GraftError(asked, f"{type(value).__name__}, no tensor", "a delta's state_dict must hold tensors only")
    if value.is_meta:
        raise GraftError(asked, "no values: it is on the meta device", "give the model its weights first")
    if hasattr(value, "to_local") or hasattr(value, "ds_id"):
        raise GraftError(asked, "only a part of it is in this process", "gather the adapter's parameters first")
    if value.dtype not in NAMES:
        raise GraftError(
            asked, f"numbers of the kind {value.dtype}", "keep them in one of " + ", ".join(NAMES.values())
        )
    value = value.detach()
    if not finite(value):
        raise GraftError(
            asked, "a number that is not finite: the training has diverged", "go back to an earlier state; lower lr"
        )
    return value


def _once(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What to write, each tensor once, and the names of the others that hold the same one."""
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, value in tensors.items():
        same = (value.data_ptr(), value.dtype, value.shape, value.stride()) if value.numel() else name
        if same in first:
            aliases[name] = first[same]
            continue
        first[same] = name
        stored[name] = value.cpu().contiguous()
    # views of the same numbers are several tensors on disk; those of a loaded adapter lie side by side in one buffer
    end = 0
    for name, value in sorted(stored.items(), key=lambda item: item[1].data_ptr()):
        if value.data_ptr() < end:
            stored[name] = value.clone()
        end = max(end, value.data_ptr() + value.nbytes)
    return stored, aliases


def versions() -> dict[str, str]:
    """Of what was at work when a file was written."""
    known = {"graftwork": __version__, "python": ".".join(map(str, sys.version_info[:3]))}
    for library in ("torch", "transformers", "safetensors"):
        if library in sys.modules:
            known[library] = str(getattr(sys.modules[library], "__version__", ""))
    return known


def _plain(value: Any, path: str) -> Any:
    """JSON's own types. GraftError names what has none; a number that is not finite becomes null."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): _plain(v, f"{path}[{k!r}]") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, f"{path}[{i}]") for i, v in enumerate(value)]
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return _plain(value.item(), path)
    raise GraftError(
        f"save {path}", f"{type(value).__name__}, which JSON cannot hold", "put texts, numbers, lists and dicts there"
    )
