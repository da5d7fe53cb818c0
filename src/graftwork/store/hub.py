"""Adapters on the Hugging Face hub: an address is a place as a folder is, and a folder becomes a repository.

`hub:NAME/REPO[@REVISION][:INSIDE]`; REVISION is a branch, a tag or a commit, INSIDE a folder or file of the repository.
What was downloaded says by its commit where it came from, so that the same bytes can be had again.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..core.errors import GraftError
from .atomic import CARD, DESCRIPTION, TENSORS
from .card import for_hub
from .read import read
from .recipe import recipe_in, told_in
from .refusals import told

SCHEME, DEFAULT = "hub:", "main"
FORM = re.compile(r"hub:(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[^:@\s]+))?(?::(?P<inside>[^:]+))?")
# what adapters are made of, in whatever format; and whole models and states of a training, which often lie beside them
WANTED = ("adapter*.json", "*config.json", "*.safetensors", CARD)
PICKLED = ("*.bin",)
LEFT = (
    "model.safetensors",
    "model-*.safetensors",
    "pytorch_model.bin",
    "pytorch_model-*.bin",
    "consolidated*",
    "training_args.bin",
    "optimizer.*",
    "scheduler.*",
)


@dataclass(frozen=True)
class Address:
    """One place on the hub. inside: a folder or file of the repository; the empty text is the repository itself."""

    repo: str
    revision: str = DEFAULT
    inside: str = ""

    def __str__(self) -> str:
        at = "" if self.revision == DEFAULT else f"@{self.revision}"
        return f"{SCHEME}{self.repo}{at}{':' if self.inside else ''}{self.inside}"


@dataclass(frozen=True)
class Place:
    """Where an adapter's files are. origin: the address with its commit; None for what was not downloaded."""

    path: Path
    origin: Address | None = None

    def __str__(self) -> str:
        return str(self.path if self.origin is None else self.origin)

    @property
    def name(self) -> str:
        """What a person calls it: the last word of the path, or of the address."""
        if self.origin is None:
            return self.path.resolve().name
        return (self.origin.inside or self.origin.repo).rpartition("/")[2]


def address(text: str) -> Address:
    """The address that `hub:NAME/REPO[@REVISION][:INSIDE]` says. GraftError for anything else."""
    found = FORM.fullmatch(text)
    inside = (found["inside"] or "").strip("/") if found else ""
    if found is None or ".." in inside.split("/") or any(c in inside for c in "*?[\\"):
        raise GraftError(f"the address {text!r}", "not of the form hub:NAME/REPO@REVISION:FOLDER", "write it so")
    return Address(found["repo"], found["revision"] or DEFAULT, inside)


def locate(where: str | Path) -> Place:
    """The folder or file on this machine; one of the hub is downloaded first, or found where it was put before.

    Only what adapters are made of is downloaded, and pickles only from a folder that has no safetensors.
    Raises GraftError for a malformed address, and where the hub has no such repository, revision or folder, or none
    that may be read, cannot be reached, or must not be asked (HF_HUB_OFFLINE) for what was not downloaded before.
    """
    if not str(where).startswith(SCHEME):
        return Place(Path(where).expanduser())
    asked = address(str(where))
    snapshot = _download(asked, WANTED)
    path, pin = snapshot / asked.inside, replace(asked, revision=snapshot.name)
    recipe = told_in(path)
    for name in () if recipe is None else recipe.names:
        _download(replace(pin, inside=f"{asked.inside}/{name}".lstrip("/")), WANTED)
    if recipe is None and path.is_dir() and not any(path.glob("*.safetensors")):
        _download(pin, PICKLED)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        what = repr(asked.inside) if asked.inside else "files of an adapter"
        raise GraftError(f"download {asked}", f"no {what} in the repository", "look at its files on the hub")
    return Place(path, pin)


def pinned(where: str | Path) -> str:
    """The same place, so that every later look finds the same files: an address gets its commit, a folder stays."""
    return str(locate(where))


def _download(at: Address, patterns: tuple[str, ...]) -> Path:
    """The snapshot of a repository with the files of these patterns that lie in the address's folder itself."""
    from huggingface_hub import snapshot_download

    above = f"{at.inside}/" if at.inside else ""
    wanted = [at.inside] if fnmatch(at.inside, "*.safetensors") else [above + pattern for pattern in patterns]
    unwanted = [f"{above}*/*", *(above + pattern for pattern in LEFT)]
    try:
        found = snapshot_download(at.repo, revision=at.revision, allow_patterns=wanted, ignore_patterns=unwanted)
    except Exception as error:  # of whatever class the library of the hub or that of its protocol chooses
        raise told(error, f"download {at}", at.repo, at.revision) from error
    return Path(found)


def push(
    folder: str | Path,
    repo: str,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    token: str | None = None,
) -> str:
    """Upload the adapter in `folder` as one commit to the repository `repo` ("NAME/REPO"), made where it is missing.

    private: only those whom the owner allows can see a repository that is made now; one that is public is refused.
    revision: the branch to commit to, made where it is missing; None is the main one.  message: that of the commit.
    token: as huggingface_hub takes it; None is the one of the login.
    Only the adapter's own files are uploaded, no pickles, and an adapter of graftwork's is read whole before; of a recipe
    each of its adapters.
    Returns the address with its commit, which gw.load takes.
    Raises GraftError for a folder without an adapter, or a damaged one, and where the hub cannot be reached or refuses;
    the repository is then as it was, at most made and empty.
    """
    asked = f"push {str(folder)!r} to {repo!r}"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise GraftError(asked, "no name of a repository", "write it as NAME/REPO")
    files = _files(Path(folder).expanduser(), asked)
    at = Address(repo, revision or DEFAULT)
    if CARD in files:
        files[CARD] = for_hub(files[CARD].decode("utf-8", "replace"), str(at)).encode()
    try:
        commit = _commit(at, files, private, message or f"Adapter {Path(folder).resolve().name}", token)
    except GraftError:
        raise
    except Exception as error:
        raise told(error, asked, repo, at.revision) from error
    return str(replace(at, revision=commit))


def _files(folder: Path, asked: str) -> dict[str, bytes]:
    """The files to upload by name. GraftError where they are no whole adapter."""
    if (recipe := recipe_in(folder)) is not None:
        for name in recipe.names:
            read(folder / name)
        inside = [f"{name}/{file}" for name in recipe.names for file in (DESCRIPTION, TENSORS, CARD)]
        names = [DESCRIPTION, CARD, *inside]
    elif (folder / DESCRIPTION).is_file():
        read(folder)
        names = [DESCRIPTION, TENSORS, CARD]
    else:
        here = sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
        names = [n for n in here if any(fnmatch(n, p) for p in WANTED) and not any(fnmatch(n, p) for p in LEFT)]
        kinds = {Path(name).suffix for name in names}
        if not {".json", ".safetensors"} <= kinds:
            found = f"no adapter there; it holds {', '.join(here[:8]) or 'nothing'}"
            raise GraftError(asked, found, "give a folder with an adapter as safetensors")
    try:
        return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    except OSError as error:
        raise GraftError(asked, f"{error.strerror or error}", "make its files readable") from error


def _commit(at: Address, files: dict[str, bytes], private: bool, message: str, token: str | None) -> str:
    """The commit that holds the files."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api: Any = HfApi(token=token, library_name="graftwork")
    api.create_repo(at.repo, private=private or None, exist_ok=True)
    if private and not api.repo_info(at.repo).private:
        asked, found = f"push to {at.repo!r} as a private repository", "it is there already, and public"
        raise GraftError(asked, found, "choose another name, or make it private on the hub")
    if at.revision != DEFAULT:
        api.create_branch(at.repo, branch=at.revision, exist_ok=True)
    added = [CommitOperationAdd(name, data) for name, data in files.items()]
    made = api.create_commit(at.repo, added, commit_message=message, revision=at.revision)
    return str(made.oid)
