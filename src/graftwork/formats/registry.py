"""Loading from a folder of any format, and saving into one of the formats by name."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

from torch import nn

from ..core.adapter import Adapter
from ..core.errors import GraftError, nearest
from ..expressions.algebra import A, Expr, as_expr
from ..grafting.graft import active_adapters, adapters, find
from ..grafting.install import check_free
from ..grafting.root import body_of, root_of
from ..store import load as load_own
from ..store import save as save_own
from ..store.atomic import DESCRIPTION
from ..store.hub import locate
from ..store.load import install
from ..store.recipe import load_recipe, recipe_in, save_recipe
from .adapterhub import AdapterHub
from .diffusion import Diffusers, Kohya
from .format import Format
from .peft import Peft
from .plain import in_words, plain_lora
from .pyreft import Pyreft

OWN = "graftwork"
FORMATS: dict[str, Format] = {form.name: form for form in (Peft(), AdapterHub(), Kohya(), Diffusers(), Pyreft())}


def load(
    model: nn.Module,
    folder: str | Path,
    name: str | None = None,
    trainable: bool = False,
    partial: bool = False,
) -> Adapter:
    """Load the adapter in `folder`, of any known format, onto `model` and activate it.

    Of a recipe, an expression that was saved with its adapters, all are loaded, the expression is activated, and the last
    adapter that it names is returned.

    folder: on this machine, or the path of a .safetensors file where the format is one file (kohya, diffusers), or
        hub:NAME/REPO[@REVISION][:FOLDER], which is downloaded; metadata["hub"] then says from which commit, and so does
        what is saved of it.
    name: None takes the stored one, or the folder's name where the format stores none. Of a recipe what stands in front of
        its adapters' names, NAME/a.
    trainable: its parameters receive gradients, so that training can go on (from a save with resume=True exactly).
    partial: leave out, with a warning that names them, what is missing or superfluous in a file of another library;
        otherwise that is an error. graftwork's own files are always read whole.
    Raises GraftError for a folder without an adapter, a damaged, altered or newer file, another backbone, an option
    that is not supported, a name that is taken, and a download that fails; the model is then as it was. Nothing is
    unpickled (a .bin is read by torch.load with weights_only=True), and no path is taken from a file.
    """
    place = locate(folder)
    form = recognise(place.path)
    recipe = recipe_in(place.path) if form is None else None
    if recipe is not None:
        adapter = load_recipe(model, recipe, name, trainable)
    elif form is None:
        adapter = load_own(model, place.path, name, trainable)
    else:
        body = body_of(model)
        check_free(model, body)
        stored = form.read(place.path, body, partial)
        if stored.name == place.path.resolve().name:  # it has none of its own; that of a download's folder is a commit
            stored = replace(stored, name=place.name)
        adapter = install(model, body, stored, f"load {str(folder)!r}", name, trainable)
    for one in active_adapters(model) if place.origin is not None else ():
        one.metadata["hub"] = str(place.origin)
    return adapter


def save(
    model: nn.Module,
    name: str | Expr,
    folder: str | Path,
    resume: bool = False,
    format: str = OWN,
    as_lora: bool = False,
    rank: int | None = None,
    energy: float | None = None,
) -> Path:
    """Write the adapter `name` of `model` into `folder`: by default its tensors, adapter.json and README.md. Returns the folder.

    name: or an expression over adapters, as gw.activate takes it, which is written as a recipe: the expression and each of
        its adapters in a folder of its own; gw.save(model, gw.active(model), folder). That folder must be new or empty.
    folder: made where it is missing; an adapter in it is replaced, other files stay. Of a format that is one file
        (kohya, diffusers) it may be the path of that file, NAME.safetensors.
    resume: keep all that training needs to go on (the unfolded form, the state of schedules), not only what is used.
    format: "graftwork", or that of another library (the keys of `FORMATS`), which must be able to hold exactly what the adapter
        computes.
    as_lora: write the updates of the weights as plain LoRA, whatever the method: exact where they are of low rank, else the
        best of a `rank`, or the best that keeps the share `energy` of their squared norm, with a warning of what is lost.
    Atomic: until the new files are whole on the disk, the old ones stay; after any failure they still do.
    Raises GraftError for an unknown adapter or format, values that are not finite or not here (meta device, sharded),
    metadata that JSON cannot hold, an adapter that the format cannot hold, and a folder that cannot be written.
    """
    e = name if isinstance(name, str) and name in adapters(model) else as_expr(name)
    name = e.name if isinstance(e, A) else str(e)
    if not as_lora and (rank is not None or energy is not None):
        raise GraftError(f"save {name!r} with rank={rank}, energy={energy}", "as_lora is not set", "set as_lora=True")
    if isinstance(e, Expr) and not isinstance(e, A):
        if format != OWN or as_lora:
            do = "make one adapter of it first, gw.combine, and save that"
            raise GraftError(
                f"save {name} as {format!r}", "several adapters, of which graftwork's own files hold a recipe", do
            )
        return save_recipe(model, e, folder, resume)
    if format == OWN and not as_lora:
        return save_own(model, name, folder, resume)
    asked = f"save {name!r} as {format!r}"
    if format == OWN:
        found = "graftwork's own files hold every method as it is"
        raise GraftError(f"{asked} with as_lora=True", found, "leave as_lora out, or name another format")
    if resume:
        found = "only graftwork's own files hold the state of a training"
        raise GraftError(f"{asked} with resume=True", found, "leave one of both out")
    by_name(format)
    adapter = find(model, name)
    if as_lora:
        adapter, rows = plain_lora(model, name, rank, energy)
        if lost := in_words(rows):
            warnings.warn(f"{asked}: {lost}", stacklevel=2)
    return write(model, adapter, folder, format)


def write(model: nn.Module, adapter: Adapter, folder: str | Path, format: str) -> Path:
    """Write an adapter of this model's backbone, grafted on it or not, in the format of another library. Returns the folder."""
    form, place = by_name(format), Path(folder).expanduser()
    if (merged := root_of(model).merged) is not None:
        asked = f"save {adapter.name!r} as {format!r}"
        raise GraftError(asked, f"{merged} is merged into the weights", "call gw.unmerge first")
    if (place / DESCRIPTION).exists():
        asked = f"save {adapter.name!r} as {format!r} into {str(folder)!r}"
        raise GraftError(asked, "an adapter of graftwork is there, which would be read first", "choose another folder")
    form.write(adapter, body_of(model), place)
    return place


def recognise(folder: Path) -> Format | None:
    """The format of the adapter in this folder or file; None for graftwork's own, and where no other claims it."""
    if not folder.exists() or (folder / DESCRIPTION).is_file():
        return None
    return next((form for form in FORMATS.values() if form.recognises(folder)), None)


def by_name(name: str) -> Format:
    """The format of this name. GraftError for an unknown one."""
    if name not in FORMATS:
        known = [OWN, *FORMATS]
        raise GraftError(f"the format {name!r}", f"unknown{nearest(name, known)}", f"choose one of {', '.join(known)}")
    return FORMATS[name]
