"""Writing a folder of files so that a reader finds the old adapter or the new one, whole, whatever happens meanwhile.

adapter.json names its tensors by their SHA-256. A save writes everything under hidden names first and then renames; at
every moment the tensors that adapter.json speaks of are there, under their own name or under a hidden one made of the
hash, where a reader looks next. A failure renames the old files back; after a kill the folder reads as one of both.
README.md is not waited for: after a power cut that follows a save it may be empty, which no reader asks about.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from ..core.errors import GraftError
from .digest import Digest

TENSORS, DESCRIPTION, CARD = "adapter.safetensors", "adapter.json", "README.md"
HIDDEN = ".graftwork-"


def hidden_tensors(folder: Path, digest: str) -> Path:
    """Where the tensors of this hash are while a save is under way."""
    return folder / f"{HIDDEN}{digest[:16]}.safetensors"


def write_adapter(folder: Path, tensors: bytes, hashed: Digest, described: Callable[[str], str], card: str) -> None:
    """Write or replace the three files. GraftError for a folder or disk that refuses; all is then as it was.

    hashed: of the tensors, which are written while it is taken;  described(hash): the text of adapter.json.
    """
    made: list[Path] = []
    try:
        for path in reversed([p for p in (folder, *folder.parents) if not p.exists()]):
            path.mkdir(exist_ok=True)
            made.append(path)
        _replace(folder, tensors, hashed, described, card)
    except BaseException as error:
        for path in reversed(made):  # innermost first; one that others have written into meanwhile stays
            with contextlib.suppress(OSError):
                path.rmdir()
        if isinstance(error, OSError):
            raise GraftError(
                f"save into {str(folder)!r}",
                f"{error.strerror or error}",
                "free space there, or choose a folder that can be written",
            ) from error
        raise


def new_folder(out: str | Path) -> Path:
    """The folder. GraftError where something is there, except for an empty folder."""
    folder = Path(out).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise GraftError(f"write to {str(out)!r}", "something is there", "give a new or empty folder")
    return folder


def place_folder(out: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a folder beside `out`, which is new or empty, then give it that name. GraftError, with nothing left
    behind, where that fails."""
    above = out.resolve().parent
    try:
        above.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=above))
        try:
            write(temporary)
            temporary.chmod(0o755)
            os.replace(temporary, out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        do = "free space there, or choose a folder that can be written"
        raise GraftError(f"write to {str(out)!r}", f"{error.strerror or error}", do) from error


def _replace(folder: Path, tensors: bytes, hashed: Digest, described: Callable[[str], str], card: str) -> None:
    drafts = {DESCRIPTION: folder / f"{HIDDEN}json", TENSORS: folder / f"{HIDDEN}draft", CARD: folder / f"{HIDDEN}md"}
    settled = True
    try:
        _write(drafts[TENSORS], tensors)
        digest = hashed.hex()
        drafts[TENSORS] = drafts[TENSORS].replace(hidden_tensors(folder, digest))
        _write(drafts[DESCRIPTION], described(digest).encode())
        _write(drafts[CARD], card.encode(), flush=False)
        before = {folder / name: _second_name(folder, name, drafts.values()) for name in drafts}
        _sync(folder)
        settled = False
        try:
            for name, draft in drafts.items():
                os.replace(draft, folder / name)
            _sync(folder)
        except BaseException:
            for place, old in before.items():
                if old is not None and old.exists():
                    os.replace(old, place)
                elif old is None:
                    place.unlink(missing_ok=True)
            settled = True
            raise
        settled = True
    finally:
        if settled:  # otherwise a hidden file may be the one that adapter.json speaks of
            for path in folder.glob(f"{HIDDEN}*"):
                with contextlib.suppress(OSError):
                    path.unlink()


def _second_name(folder: Path, name: str, taken: Iterable[Path]) -> Path | None:
    """Give an old file a hidden name beside its own; None where there is no old file."""
    place, second = folder / name, folder / f"{HIDDEN}old-{name}"
    if not place.exists():
        return None
    if name == TENSORS and (old := _digest(folder)):
        second = hidden_tensors(folder, old)
        if second in taken:  # the new tensors are the same
            return second
    second.unlink(missing_ok=True)
    try:
        os.link(place, second)
    except OSError:  # a file system without links
        shutil.copyfile(place, second)
    return second


def _digest(folder: Path) -> str:
    """The hash that the old adapter.json gives; the empty text where it gives none."""
    try:
        text = (folder / DESCRIPTION).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
    found = re.search(r'"sha256": "([0-9a-f]{64})"', text)
    return found[1] if found else ""


def _write(path: Path, data: bytes, flush: bool = True) -> None:
    """Write one new file, and flush it."""
    with open(path, "wb") as file:
        file.write(data)
        if flush:
            file.flush()
            os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Flush a folder's entries, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
