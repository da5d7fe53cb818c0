"""The one file: a path to it, or the only one of its kind in a folder."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor

from ...core.errors import GraftError
from ..files import read_header, write_files

ENDING = ".safetensors"
OTHERS = ("adapter_config.json", "config.json", "model_index.json")  # of folders whose tensors are something else

Claims = Callable[[Collection[str]], bool]


def holds(path: Path, claims: Claims, older: str = "") -> bool:
    """Whether the path is a file, or a folder with files, whose tensors' names are claimed. Reads headers only.

    older: a torch file that is claimed by its own name.
    """
    if path.is_file():
        return path.name == older or (path.suffix == ENDING and claims(_names(path)))
    return bool(_inside(path, claims, older))


def the_file(path: Path, claims: Claims, asked: str, older: str = "") -> Path:
    """The file that is meant. GraftError where a folder holds several."""
    if path.is_file():
        return path
    found = _inside(path, claims, older)
    if len(found) != 1:
        names = ", ".join(file.name for file in found)
        raise GraftError(asked, f"{len(found)} files of LoRA: {names}", "name the file instead of the folder")
    return found[0]


def stored_name(path: Path) -> str:
    """What an adapter is called that stands in this file or folder."""
    return path.resolve().stem if path.is_file() else path.resolve().name


def metadata(file: Path) -> Mapping[str, str]:
    """The texts in the header of the file; none for a torch file."""
    return read_header(file).get("__metadata__") or {} if file.suffix == ENDING else {}


def write(path: Path, standard: str, tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> None:
    """Write the tensors to the path where it is that of a file, or under a standard name into the folder."""
    folder, name = (path.parent, path.name) if path.suffix == ENDING else (path, standard + ENDING)
    if (path.suffix == ENDING and path.is_dir()) or (path.suffix != ENDING and path.is_file()):
        raise GraftError(
            f"save into {str(path)!r}", "a folder or file of that name", f"choose a folder, or NAME{ENDING}"
        )
    write_files(folder, {name: safetensors.torch.save(dict(tensors), {"format": "pt", **texts})})


def _inside(folder: Path, claims: Claims, older: str) -> list[Path]:
    if any((folder / name).is_file() for name in OTHERS):
        return []
    found = [file for file in sorted(folder.glob(f"*{ENDING}")) if not file.name.startswith(".")]
    found = [file for file in found if claims(_names(file))]
    return found or ([folder / older] if older and (folder / older).is_file() else [])


def _names(file: Path) -> list[str]:
    return [name for name in read_header(file) if name != "__metadata__"]
