"""Loading from a folder of any format, and saving into one of the formats by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

from ..core.adapter import Adapter
from ..core.body import uncollected
from ..core.errors import GraftError, nearest
from ..core.graft import find
from ..core.install import check_free
from ..core.root import body_of, root_of
from ..store import load as load_own
from ..store import save as save_own
from ..store.atomic import DESCRIPTION
from ..store.hub import locate
from ..store.load import install
from .format import Format
from .peft import Peft

OWN = "graftwork"
FORMATS: dict[str, Format] = {form.name: form for form in (Peft(),)}


@uncollected()
def load(
    model: nn.Module,
    folder: str | Path,
    name: str | None = None,
    trainable: bool = False,
    partial: bool = False,
) -> Adapter:
    """Load the adapter in `folder`, of any known format, onto `model` and activate it.

    folder: on this machine, or hub:NAME/REPO[@REVISION][:FOLDER], which is downloaded; metadata["hub"] then says from
        which commit, and so does what is saved of it.
    name: None takes the stored one, or the folder's name where the format stores none.
    trainable: its parameters receive gradients, so that training can go on (from a save with resume=True exactly).
    partial: leave out, with a warning that names them, what is missing or superfluous in a file of another library;
        otherwise that is an error. graftwork's own files are always read whole.
    Raises GraftError for a folder without an adapter, a damaged, altered or newer file, another backbone, an option
    that is not supported, a name that is taken, and a download that fails; the model is then as it was. Nothing is
    unpickled (a .bin is read by torch.load with weights_only=True), and no path is taken from a file.
    """
    place = locate(folder)
    form = recognise(place.path)
    if form is None:
        adapter = load_own(model, place.path, name, trainable)
    else:
        body = body_of(model)
        check_free(model, body)
        stored = form.read(place.path, body, partial)
        if stored.name == place.path.resolve().name:  # it has none of its own; that of a download's folder is a commit
            stored = replace(stored, name=place.name)
        adapter = install(model, body, stored, f"load {str(folder)!r}", name, trainable)
    if place.origin is not None:
        adapter.metadata["hub"] = str(place.origin)
    return adapter


def save(model: nn.Module, name: str, folder: str | Path, resume: bool = False, format: str = OWN) -> Path:
    """Write the adapter `name` of `model` into `folder`: by default its tensors, adapter.json and README.md. Returns the folder.

    folder: made where it is missing; an adapter in it is replaced, other files stay.
    resume: keep all that training needs to go on (the unfolded form, the state of schedules), not only what is used.
    format: "graftwork", or that of another library ("peft"), which must be able to hold exactly what the adapter computes.
    Atomic: until the new files are whole on the disk, the old ones stay; after any failure they still do.
    Raises GraftError for an unknown adapter or format, values that are not finite or not here (meta device, sharded),
    metadata that JSON cannot hold, an adapter that the format cannot hold, and a folder that cannot be written.
    """
    if format == OWN:
        return save_own(model, name, folder, resume)
    form, adapter, place = by_name(format), find(model, name), Path(folder).expanduser()
    if resume:
        asked = f"save {name!r} with resume=True as {format!r}"
        raise GraftError(asked, "only graftwork's own files hold the state of a training", "leave one of both out")
    if (merged := root_of(model).merged) is not None:
        raise GraftError(
            f"save {name!r} as {format!r}", f"{merged} is merged into the weights", "call gw.unmerge first"
        )
    if (place / DESCRIPTION).exists():
        asked = f"save {name!r} as {format!r} into {str(folder)!r}"
        raise GraftError(asked, "an adapter of graftwork is there, which would be read first", "choose another folder")
    form.write(adapter, body_of(model), place)
    return place


def recognise(folder: Path) -> Format | None:
    """The format of the adapter in this folder; None for graftwork's own, and where no other claims it."""
    if not folder.is_dir() or (folder / DESCRIPTION).is_file():
        return None
    return next((form for form in FORMATS.values() if form.recognises(folder)), None)


def by_name(name: str) -> Format:
    """The format of this name. GraftError for an unknown one."""
    if name not in FORMATS:
        known = [OWN, *FORMATS]
        raise GraftError(f"the format {name!r}", f"unknown{nearest(name, known)}", f"choose one of {', '.join(known)}")
    return FORMATS[name]
