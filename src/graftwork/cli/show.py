"""What an adapter is: methods, sites, parameters, backbone, scores, and how it was trained; of a recipe its expression and
its adapters. The backbone is not loaded.

graftwork show adapters/sst2 [--json]
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..store.recipe import Recipe


def add(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("adapter", help="a folder with adapter.json, or hub:NAME/REPO")
    parser.add_argument("--json", action="store_true", help="print adapter.json as it is")


def run(parsed: argparse.Namespace) -> int:
    """Do what the options ask for. Returns the exit code."""
    from ..store.hub import locate, pinned
    from ..store.read import description
    from ..store.recipe import recipe_in
    from ..train.described import describe, metadata_of
    from .console import lines, pairs, table

    place = pinned(parsed.adapter)
    recipe = recipe_in(locate(place).path)
    data = metadata_of(place) if recipe is None else description(recipe.folder, f"show {place!r}")
    if parsed.json:
        lines([data])
        return 0
    import graftwork.combinators
    import graftwork.methods  # noqa: F401  (both register the names in the file)

    if recipe is not None:
        _show_recipe(recipe)
        return 0
    described = describe(data, place)
    pairs(described.facts, described.name)
    table(("method", "at", "sites"), described.parts)
    sections: dict[str, dict[str, Any]] = {
        "scores": described.scores,
        "data": described.data,
        "training": described.training,
    }
    for title, values in sections.items():
        if values:
            pairs(values, title)
    return 0


def _show_recipe(recipe: Recipe) -> None:
    from ..train.described import describe, metadata_of
    from .console import pairs, table

    members = [describe(metadata_of(recipe.folder / name), recipe.folder / name) for name in recipe.names]
    pairs({"expression": str(recipe.expression), "backbone": members[-1].facts["backbone"]}, recipe.folder.name)
    rows = [
        (
            name,
            " + ".join(method for method, _, _ in d.parts),
            *(d.facts[k] for k in ("parameters", "on disk", "labels")),
        )
        for name, d in zip(recipe.names, members, strict=True)
    ]
    table(("adapter", "methods", "parameters", "on disk", "labels"), rows)
