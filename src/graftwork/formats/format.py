"""What a format is: one object that recognises a folder, reads it for a backbone, and writes an adapter into one."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from ..core.adapter import Adapter
from ..sites.body import Body
from ..store.read import Stored


class Format(Protocol):
    """One way to keep adapters on disk: in a folder, or, of a format that is one file, also by the path of that file.

    Module paths in a file are matched to sites by the backbone's own paths (see `places.py`). What changes the mathematics
    and is not supported is refused by name, never ignored.
    """

    name: str

    def recognises(self, folder: Path) -> bool:
        """Whether the folder, by the names of its files, holds an adapter of this format. Reads as little as it can."""

    def read(self, folder: Path, body: Body, partial: bool = False) -> Stored:
        """The adapter in the folder, as methods with their sites on this backbone and tensors by site.

        partial: leave out the sites whose tensors are not all there, and tensors that belong nowhere, with a warning.
        Raises GraftError for whatever cannot be read whole and exactly. The backbone is not touched.
        """

    def backbone(self, folder: Path) -> tuple[str | None, str | None]:
        """(name or folder of the backbone, transformers' name of its class), each None where the files do not say."""

    def write(self, adapter: Adapter, body: Body, folder: Path) -> None:
        """Write the adapter. GraftError, and nothing written, where the format cannot hold exactly what it computes."""
