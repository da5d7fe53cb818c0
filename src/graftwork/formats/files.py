"""Reading and writing the files of other libraries, trusting nothing in them."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..core.errors import GraftError
from ..store.finite import finite

LONGEST_JSON = 64 * 2**20  # bytes; a config has a few thousand, the header of a file with 100,000 tensors 20 million
HIDDEN = ".graftwork-"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. GraftError for anything else, names that stand twice included."""
    asked = f"read {str(path)!r}"
    if not path.is_file():
        raise GraftError(asked, "no such file", "the folder is half-written: restore it")
    try:
        if path.stat().st_size > LONGEST_JSON:
            raise GraftError(asked, f"{path.stat().st_size:,} bytes", "a config has a few thousand: restore the file")
        return _object(path.read_bytes())
    except OSError as error:
        raise GraftError(asked, f"{error.strerror or error}", "make it readable") from error
    except (ValueError, RecursionError) as error:
        raise GraftError(asked, f"damaged: {error}", "restore the file") from error


def _object(data: bytes) -> dict[str, Any]:
    found = json.loads(data.decode("utf-8"), object_pairs_hook=_once, parse_constant=_refused)
    if not isinstance(found, dict):
        raise ValueError(f"{type(found).__name__}, not an object")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(n for n in names if names.count(n) > 1)!r} stands twice")
    return made


def _refused(word: str) -> Any:
    raise ValueError(f"{word} is no number of JSON")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or, by weights_only, of a torch file. GraftError for a damaged one, or numbers that are not finite."""
    tensors = tensors_of(path)
    for name, value in tensors.items():
        if not finite(value):
            found = "a number that is not finite"
            raise GraftError(f"read {str(path)!r}: the tensor {name!r}", found, "train it again")
    return tensors


def tensors_of(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, whatever numbers they hold. GraftError for a damaged one."""
    asked = f"read {str(path)!r}"
    try:
        return _safetensors(path) if path.suffix == ".safetensors" else _torch(path)
    except OSError as error:
        raise GraftError(asked, f"{error.strerror or error}", "make it readable") from error
    except GraftError:
        raise
    except Exception as error:  # of whatever class the two libraries choose for bytes that make no sense
        why = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise GraftError(asked, f"damaged, or no file of tensors: {why[0][:200]}", "restore the file") from error


def read_header(path: Path) -> dict[str, Any]:
    """The header of a .safetensors file: its tensors' names, and under __metadata__ texts by name. GraftError for a damaged one."""
    asked = f"read {str(path)!r}"
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
            if length > min(path.stat().st_size - 8, LONGEST_JSON):
                raise ValueError(f"truncated: its header needs {length:,} bytes, the file has {path.stat().st_size:,}")
            return _object(file.read(length))
    except OSError as error:
        raise GraftError(asked, f"{error.strerror or error}", "make it readable") from error
    except (ValueError, RecursionError) as error:
        raise GraftError(asked, f"damaged: {error}", "restore the file") from error


def _safetensors(path: Path) -> dict[str, Tensor]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8].ljust(8, b"\xff"))
    if length > min(len(data) - 8, LONGEST_JSON):
        raise ValueError(f"truncated: its header needs {length:,} bytes, the file has {len(data):,}")
    _object(data[8 : 8 + length])  # the library lets the last of two equal names win
    return safetensors.torch.load(data)


def _torch(path: Path) -> dict[str, Tensor]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("compressed: what torch.save writes is not")
    found = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{type(found).__name__}, not tensors by name")
    return {name: _plain(name, value) for name, value in found.items()}


def _plain(name: str, value: Any) -> Tensor:
    """A tensor of its own numbers. ValueError for other kinds, and for one that claims more numbers than were stored."""
    if type(value) not in (Tensor, torch.nn.Parameter) or value.layout != torch.strided or value.is_quantized:
        raise ValueError(f"{name!r} is {type(value).__name__}, no plain tensor")
    if value.device.type != "cpu" or value.nbytes > value.untyped_storage().nbytes():
        raise ValueError(f"{name!r} has other numbers than are stored")
    return value.detach().clone().contiguous()


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files of these names into the folder, made where it is missing: all whole under hidden names, then renamed.

    GraftError for a folder or disk that refuses; before the first rename, all is then as it was.
    """
    drafts = {folder / name: folder / f"{HIDDEN}{name}" for name in files}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for draft, data in zip(drafts.values(), files.values(), strict=True):
            with open(draft, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for place, draft in drafts.items():
            os.replace(draft, place)
    except OSError as error:
        found = f"{error.strerror or error}"
        raise GraftError(f"save into {str(folder)!r}", found, "free space there, or choose another folder") from error
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)
