"""Reading the files of an adapter, trusting nothing in them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import GraftError
from ..core.method import Method
from ..core.method import from_json as method_from_json
from . import fingerprint, keys
from .atomic import DESCRIPTION, TENSORS, hidden_tensors
from .finite import finite
from .save import FORMAT

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "BOOL": torch.bool,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
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
    asked = f"load {str(folder)!r}"
    _refuse_others(folder, asked)
    description = _description(folder, asked)
    try:
        methods = tuple(_method(entry) for entry in description["methods"])
        labels = description["labels"]
        if labels is not None and not (isinstance(labels, list) and all(isinstance(label, str) for label in labels)):
            raise ValueError("the labels are no texts")
        if not (isinstance(description["name"], str) and isinstance(description["metadata"], dict) and methods):
            raise ValueError("name, metadata or methods")
        digest, aliases = description["sha256"], dict(description["aliases"])
        if not re.fullmatch("[0-9a-f]{64}", digest):
            raise ValueError("sha256 is no hash")
        backbone = fingerprint.from_json(description["backbone"])
    except GraftError as error:
        raise GraftError(
            f"{asked}: {DESCRIPTION}", str(error), "it was made by another version of graftwork, or altered"
        ) from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        found = f"damaged: {type(error).__name__}: {error}"
        raise GraftError(f"{asked}: {DESCRIPTION}", found, "restore the file") from error
    tensors = _sorted(_tensors(folder, digest, asked), aliases, len(methods), asked)
    labels = None if labels is None else tuple(labels)
    return Stored(description["name"], methods, tensors, labels, backbone, description["metadata"])


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


def _description(folder: Path, asked: str) -> dict[str, Any]:
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
    if version > FORMAT:
        raise GraftError(asked, f"format {version}; this version reads up to {FORMAT}", "install a newer graftwork")
    if version < 1:
        raise GraftError(asked, f"format {version}", "restore the file")
    return data


def _method(entry: Mapping[str, Any]) -> StoredMethod:
    sites = entry["sites"]
    texts = isinstance(sites, list) and all(isinstance(site, str) for site in sites)
    if not texts or not sites or len(set(sites)) < len(sites):
        raise ValueError("the sites of a method")
    return StoredMethod(method_from_json(entry["method"]), tuple(sites))


def _tensors(folder: Path, digest: str, asked: str) -> dict[str, Tensor]:
    """The tensors whose bytes have this hash: read once, so that what is checked is what is used."""
    found: bytearray | None = None
    why = "missing"
    for path in (
        folder / TENSORS,
        hidden_tensors(folder, digest),
    ):  # the second: a save was cut off between its renames
        try:
            data = _bytes(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise GraftError(f"{asked}: {path.name}", f"{error.strerror}", "make it readable") from error
        if hashlib.sha256(data).hexdigest() == digest:
            found = data
            break
        why = _cut(data) or "altered: its bytes are not those that adapter.json was written with"
    if found is None:
        raise GraftError(f"{asked}: {TENSORS}", why, "restore the file")
    if broken := _cut(found):
        raise GraftError(f"{asked}: {TENSORS}", broken, "restore the file")
    try:
        tensors = _views(found)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise GraftError(f"{asked}: {TENSORS}", f"damaged: {error}", "restore the file") from error
    size = sum(value.nbytes for value in tensors.values())
    kinds = {value.dtype for value in tensors.values()}
    whole = torch.frombuffer(found, dtype=kinds.pop(), offset=len(found) - size) if len(kinds) == 1 and size else None
    for name, value in tensors.items() if whole is None or not finite(whole) else ():
        if not finite(value):
            raise GraftError(f"{asked}: the tensor {name!r}", "a number that is not finite", "train it again")
    return tensors


def _bytes(path: Path) -> bytearray:
    """The whole file in one buffer that stays: fresh memory costs more than reading, and there is no second copy."""
    with open(path, "rb", buffering=0) as file:
        data = bytearray(os.fstat(file.fileno()).st_size)
        room = memoryview(data)
        size = 0
        while size < len(data) and (read := file.readinto(room[size:])):
            size += read
        room.release()
    return data if size == len(data) else data[:size]


def _views(data: bytearray) -> dict[str, Tensor]:
    """The tensors of a safetensors file, as views of its bytes. ValueError where they do not tile it."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    out, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, stop = entry["data_offsets"]
        dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
        count = math.prod(shape)
        if begin != end or count * dtype.itemsize != stop - begin or any(type(n) is not int or n < 0 for n in shape):
            raise ValueError(f"the place of {name!r}")
        end = stop
        at = 8 + length + begin
        flat = torch.frombuffer(data, dtype=dtype, count=count, offset=at) if count else torch.empty(0, dtype=dtype)
        # numbers lie where the processor reads them
        out[name] = flat.view(shape).clone()
    return out


def _cut(data: bytes | bytearray) -> str:
    """What is wrong with the frame of a safetensors file: 8 bytes n, n bytes of JSON, the bytes it speaks of."""
    if len(data) < 8:
        return f"truncated: {len(data)} bytes"
    (length,) = struct.unpack("<Q", data[:8])
    if 8 + length > len(data):
        return f"truncated: its header needs {length:,} bytes, the file has {len(data):,}"
    try:
        header = json.loads(data[8 : 8 + length])
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return "damaged: its header cannot be read"
    size = len(data) - 8 - length
    kind = "truncated" if size < end else "longer than its header says"
    return "" if size == end else f"{kind}: {size:,} bytes of tensors, its header speaks of {end:,}"


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
