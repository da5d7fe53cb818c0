"""Reading the files of an adapter, trusting nothing in them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.errors import GraftError
from ..core.method import Method
from ..core.method import from_json as method_from_json
from . import fingerprint, keys
from .atomic import DESCRIPTION, TENSORS
from .tensors import reading

RECIPE = 2  # the format of a folder with an expression and several adapters (see `recipe`)
PICKLE = "a pickle, which can run any code when it is opened"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


@dataclass(frozen=True)
class StoredMethod:
    """A method and the keys of its sites."""

    method: Method
    sites: tuple[str, ...]


@dataclass(frozen=True)
class Stored:
    """What the files hold, checked by itself. tensors: for each method, site key (or "shared") -> name -> tensor.

    backbone: None where the format does not say.  warnings: what a person should know once it is loaded.
    """

    name: str
    methods: tuple[StoredMethod, ...]
    tensors: tuple[dict[str, dict[str, Tensor]], ...]
    labels: tuple[str, ...] | None
    backbone: fingerprint.Fingerprint | None
    metadata: dict[str, Any]
    warnings: tuple[str, ...] = ()


def read(folder: Path) -> Stored:
    """The adapter in this folder. GraftError for anything that is not a whole, unaltered adapter of a known format."""
    with read_ahead(folder) as stored:
        return stored


@contextmanager
def read_ahead(folder: Path) -> Iterator[Stored]:
    """`read`, whose result can be looked at while the hash of its file is still being taken.

    That it is unaltered is known, and refused before anything else, at the end of the block: nothing may write into the
    tensors, or change what is to stay, within it.
    """
    asked = f"load {str(folder)!r}"
    _refuse_others(folder, asked)
    data = description(folder, asked)
    if data["format"] == RECIPE:
        found = f"a recipe, {data.get('expression')}, and not one adapter"
        raise GraftError(asked, found, "load it with gw.load, or make one adapter of it with graftwork compose")
    try:
        methods = tuple(_method(entry) for entry in data["methods"])
        labels = data["labels"]
        if labels is not None and not (isinstance(labels, list) and all(isinstance(label, str) for label in labels)):
            raise ValueError("the labels are no texts")
        if not (isinstance(data["name"], str) and isinstance(data["metadata"], dict) and methods):
            raise ValueError("name, metadata or methods")
        digest, aliases = data["sha256"], dict(data["aliases"])
        if not re.fullmatch("[0-9a-f]{64}", digest):
            raise ValueError("sha256 is no hash")
        backbone = fingerprint.from_json(data["backbone"])
    except GraftError as error:
        raise GraftError(
            f"{asked}: {DESCRIPTION}", str(error), "it was made by another version of graftwork, or altered"
        ) from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        found = f"damaged: {type(error).__name__}: {error}"
        raise GraftError(f"{asked}: {DESCRIPTION}", found, "restore the file") from error
    labels = None if labels is None else tuple(labels)
    with reading(folder, digest, asked) as named:
        tensors = _sorted(named, aliases, len(methods), asked)
        yield Stored(data["name"], methods, tensors, labels, backbone, data["metadata"])


def _refuse_others(folder: Path, asked: str) -> None:
    if folder.suffix.lower() in PICKLES and not folder.is_dir():
        raise GraftError(asked, f"{folder.name!r}, {PICKLE}", "get the adapter as safetensors")
    if not folder.is_dir():
        found = f"a file; an adapter is a folder with {DESCRIPTION}" if folder.exists() else "no such folder"
        raise GraftError(asked, found, "give the folder that gw.save wrote")
    if not (folder / DESCRIPTION).is_file():
        names = sorted(path.name for path in folder.iterdir())
        pickles = [name for name in names if Path(name).suffix.lower() in PICKLES]
        if "adapter_config.json" in names:
            found, do = (
                "adapter_config.json, and no adapter that graftwork knows",
                "see docs/formats.md for what it reads",
            )
        elif pickles:
            found, do = f"{pickles[0]!r}, {PICKLE}", "get the adapter as safetensors"
        else:
            found, do = f"no {DESCRIPTION}; it holds {', '.join(names[:8]) or 'nothing'}", "give a folder of gw.save"
        raise GraftError(asked, found, do)


def description(folder: Path, asked: str) -> dict[str, Any]:
    """What adapter.json says, of a format that is known. GraftError where there is none such."""
    asked = f"{asked}: {DESCRIPTION}"
    try:
        data = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    except OSError as error:
        raise GraftError(asked, f"{error.strerror}", "make it readable") from error
    except (ValueError, RecursionError) as error:
        raise GraftError(asked, f"damaged: {error}", "restore the file") from error
    version = data.get("format") if isinstance(data, dict) else None
    if not isinstance(version, int) or isinstance(version, bool):
        raise GraftError(asked, "no format version: it is no adapter of graftwork", "give a folder of gw.save")
    if version > RECIPE:
        raise GraftError(asked, f"format {version}; this version reads up to {RECIPE}", "install a newer graftwork")
    if version < 1:
        raise GraftError(asked, f"format {version}", "restore the file")
    return data


def _method(entry: Mapping[str, Any]) -> StoredMethod:
    sites = entry["sites"]
    texts = isinstance(sites, list) and all(isinstance(site, str) for site in sites)
    if not texts or not sites or len(set(sites)) < len(sites):
        raise ValueError("the sites of a method")
    return StoredMethod(method_from_json(entry["method"]), tuple(sites))


def _sorted(
    tensors: dict[str, Tensor], aliases: dict[str, Any], methods: int, asked: str
) -> tuple[dict[str, dict[str, Tensor]], ...]:
    """The tensors by method, site and name."""
    for name, same in aliases.items():
        if name in tensors or same not in tensors:
            raise GraftError(f"{asked}: {DESCRIPTION}", f"the alias {name!r} of {same!r}", "restore the file")
    out: tuple[dict[str, dict[str, Tensor]], ...] = tuple({} for _ in range(methods))
    for text, value in [*tensors.items(), *((name, tensors[same].clone()) for name, same in aliases.items())]:
        try:
            index, site, name = keys.split(text)
            place = out[index].setdefault(site, {}) if index >= 0 else None
        except (ValueError, IndexError):
            place = None
        if place is None:
            raise GraftError(f"{asked}: {TENSORS}", f"the tensor {text!r} belongs to no method", "restore the file")
        place[name] = value
    return out
