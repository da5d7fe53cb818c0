"""Read an adapter of another library and write it as one of graftwork's own.

graftwork import peft/sst2 --out adapters/sst2

The format is recognised by itself. gw.load and graftwork export take such folders as they are, too.
"""

from __future__ import annotations

import argparse
import warnings


def add(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("folder", help="what the other library wrote, or hub:NAME/REPO")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where to write; an adapter there is replaced")
    parser.add_argument(
        "--backbone", metavar="NAME|FOLDER", help="the backbone, where it is not what the adapter's file says"
    )
    parser.add_argument(
        "--partial", action="store_true", help="leave out, and name, tensors that are missing or belong nowhere"
    )


def run(parsed: argparse.Namespace) -> int:
    """Do what the options ask for. Returns the exit code."""
    from ..formats import load, save
    from ..store.hub import locate, pinned
    from ..store.recipe import refuse_recipe
    from ..train.origin import open_backbone
    from .console import console, quiet

    quiet()
    place = pinned(parsed.folder)
    refuse_recipe(locate(place).path, f"import {place!r}")
    model, name = open_backbone(place, parsed.backbone)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        adapter = load(model, place, partial=parsed.partial)
    for warning in said:
        console.print(f"note: {warning.message}", markup=False)
    adapter.metadata["backbone"] = name
    save(model, adapter.name, parsed.out)
    made_of = " + ".join(map(str, adapter.methods))
    console.print(f"{made_of}: {adapter.num_parameters:,} parameters written to {parsed.out}", markup=False)
    return 0
