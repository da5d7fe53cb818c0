"""Write an adapter in the format of another library, which then reads it without graftwork.

graftwork export adapters/sst2 --format peft --out peft/sst2

Refused where that library cannot compute exactly the same; docs/formats.md says what each format can hold.
"""

from __future__ import annotations

import argparse


def add(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("adapter", help="a folder with an adapter, of any format, or hub:NAME/REPO")
    parser.add_argument("--format", required=True, metavar="NAME", help="peft, adapterhub, kohya, diffusers or pyreft")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where to write; other files there stay")
    parser.add_argument(
        "--backbone", metavar="NAME|FOLDER", help="the backbone, where it is not what the adapter's file says"
    )


def run(parsed: argparse.Namespace) -> int:
    """Do what the options ask for. Returns the exit code."""
    from ..formats import by_name, load, save
    from ..store.hub import pinned

    by_name(parsed.format)  # a wrong name is said before anything is loaded
    from ..train.origin import open_backbone
    from .console import console, quiet

    quiet()
    place = pinned(parsed.adapter)
    model, _ = open_backbone(place, parsed.backbone)
    adapter = load(model, place)
    save(model, adapter.name, parsed.out, format=parsed.format)
    console.print(f"{adapter.name}: {adapter.num_parameters:,} parameters written to {parsed.out}", markup=False)
    return 0
