"""A recipe: an expression and the adapters that it names, in one folder, to be saved, shared, loaded and used as one adapter.

    adapter.json     {"format": 2, "expression": "0.5*a + 0.5*b", "versions": {...}, "metadata": {}}
    README.md
    a/, b/           the adapters, as gw.save writes them

Nothing but the names in the expression says which folders are read: each must be one plain word of a path.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..core.adapter import Adapter
from ..core.errors import GraftError
from ..expressions.algebra import A, Expr
from ..expressions.grammar import parse
from ..expressions.mixing import Fuse, Route, parts_of, resolved
from ..expressions.substitute import substitute
from ..grafting.graft import activate, active, adapters, check_name, find, remove
from .atomic import CARD, DESCRIPTION, TENSORS, new_folder, place_folder
from .card import of_recipe
from .load import load
from .read import RECIPE, description
from .save import save, versions

PLAIN = re.compile(r"\w[\w .+@-]*")
LONGEST = 100  # characters of a name: folders of 255 bytes are what all systems have


@dataclass(frozen=True)
class Recipe:
    """What a recipe's folder says. Its adapters lie in `folder / name`."""

    folder: Path
    expression: Expr

    @property
    def names(self) -> tuple[str, ...]:
        """Its adapters; the last one's head and task are those of the whole, as in a stack."""
        return self.expression.names()

    def __str__(self) -> str:
        return str(self.expression)


def recipe_in(folder: Path) -> Recipe | None:
    """The recipe in this folder; None where there is none. GraftError for one that is damaged, or whose names are no folders in it."""
    recipe = told_in(folder)
    for name in () if recipe is None else recipe.names:
        inside = folder / name
        if not inside.is_dir() or inside.resolve().parent != folder.resolve():
            raise GraftError(f"load {str(folder)!r}: the recipe {recipe}", f"no folder {name!r} in it", "restore it")
    return recipe


def told_in(folder: Path) -> Recipe | None:
    """As `recipe_in`, by adapter.json alone: whether the folders that it names are there is not looked at."""
    if not (folder / DESCRIPTION).is_file():
        return None
    asked = f"load {str(folder)!r}"
    data = description(folder, asked)
    if data["format"] != RECIPE:
        return None
    try:
        if not isinstance(data.get("expression"), str):
            raise ValueError("no expression")
        e = parse(data["expression"])
    except (GraftError, ValueError, RecursionError) as error:
        raise GraftError(f"{asked}: {DESCRIPTION}", f"damaged: {error}", "restore the file") from error
    for name in e.names():
        if not _plain(name):
            found = f"an adapter called {name!r}, which is no folder in it"
            raise GraftError(f"{asked}: the recipe {e}", found, "get it from a source that you trust")
    if not e.names():
        raise GraftError(f"{asked}: the recipe {e}", "no adapter", "restore the file")
    return Recipe(folder, e)


def leading(folder: Path) -> Path:
    """The folder of the adapter that speaks for this one: itself, or the last adapter of a recipe, whose head counts in a stack."""
    recipe = recipe_in(folder)
    return folder if recipe is None else folder / recipe.names[-1]


def refuse_recipe(folder: Path, asked: str) -> None:
    """GraftError where there is a recipe, for what takes one adapter."""
    if (recipe := recipe_in(folder)) is not None:
        do = "make one adapter of it first, graftwork compose or gw.combine, or take one of its folders"
        raise GraftError(asked, f"a recipe of several adapters, {recipe.expression}", do)


def load_recipe(model: nn.Module, recipe: Recipe, name: str | None = None, trainable: bool = False) -> Adapter:
    """Load the adapters of a recipe and activate its expression. Returns the last that it names.

    name: what stands in front of their names, NAME/a; None: they keep their own.  trainable: as in `load`.
    Raises GraftError as `load`; the model is then as it was.
    """
    called = {n: n if name is None else f"{name}/{n}" for n in recipe.names}
    _check_mixers(recipe.expression, called, f"load {str(recipe.folder)!r} as {name!r}")
    before = active(model)
    for new in called.values():
        check_name(model, new)
    try:
        for n, new in called.items():
            load(model, recipe.folder / n, new, trainable)
        activate(model, substitute(recipe.expression, {n: A(new) for n, new in called.items()}))
    except BaseException:
        there = [new for new in called.values() if new in adapters(model)]
        if there:
            activate(model, before)
        for new in there:
            remove(model, new)
        raise
    return find(model, called[recipe.names[-1]])


def save_recipe(model: nn.Module, e: Expr, folder: str | Path, resume: bool = False) -> Path:
    """Write an expression and the adapters of `model` that it names into a new or empty folder. Returns the folder.

    An adapter called x/a is called a in there.  resume: as in `save`.
    Raises GraftError as `save`, and for names that are no names of folders, or alike as such; nothing is written then.
    """
    for name in e.names():
        find(model, name)
    e = resolved(e, adapters(model))  # what mixes adapters is one of the names
    members = [find(model, name) for name in e.names()]
    place = new_folder(folder)
    called = {member.name: member.name.rpartition("/")[2] for member in members}
    asked = f"save {e} into {str(folder)!r}"
    _check_mixers(e, called, asked)
    for name, short in called.items():
        if not _plain(short):
            raise GraftError(asked, f"an adapter called {name!r}", "load it under a plain name, gw.load(..., name='a')")
    if len({short.casefold() for short in called.values()}) < len(called):
        raise GraftError(asked, f"names that are alike: {', '.join(called)}", "load each under a name of its own")
    shown = substitute(e, {name: A(short) for name, short in called.items()})
    data = {"format": RECIPE, "expression": str(shown), "versions": versions(), "metadata": {}}

    def write(into: Path) -> None:
        for member in members:
            save(model, member.name, into / called[member.name], resume, called[member.name])
        (into / CARD).write_text(of_recipe(str(shown), _rows(members, called)), encoding="utf-8")
        (into / DESCRIPTION).write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    place_folder(place, write)
    return place


def _check_mixers(e: Expr, called: dict[str, str], asked: str) -> None:
    """GraftError where adapters would be called otherwise than in the file of what mixes them."""
    if any(isinstance(t, Fuse | Route) for t in parts_of(e)) and any(old != new for old, new in called.items()):
        found = "a mixture of adapters, which knows them by their names"
        raise GraftError(asked, found, "keep their names: load them under plain ones, and the recipe without a name")


def _rows(members: Sequence[Adapter], called: dict[str, str]) -> list[tuple[Any, ...]]:
    return [(called[a.name], " + ".join(map(str, a.methods)), a.num_parameters) for a in members]


def _plain(name: str) -> bool:
    """Whether a name is one word of a path, on any system, and none of a recipe's own files."""
    own = name.casefold() in {word.casefold() for word in (DESCRIPTION, TENSORS, CARD)}
    return bool(PLAIN.fullmatch(name)) and name == name.strip(" .") and len(name) <= LONGEST and not own
