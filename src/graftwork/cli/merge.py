"""Write backbone and adapter as one plain transformers folder, which needs no graftwork.

graftwork merge adapters/sst2 --out merged/
"""

from __future__ import annotations

import argparse

from .options import add_expression


def add(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("adapter", help="the folder that graftwork train wrote, or hub:NAME/REPO")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="a new or empty folder")
    parser.add_argument(
        "--backbone", metavar="NAME|FOLDER", help="the backbone, where it is not what the adapter's file says"
    )
    parser.add_argument("--of-task", metavar="NAME", help="the task, where the adapter learnt something for each")
    add_expression(parser)


def run(parsed: argparse.Namespace) -> int:
    """Do what the options ask for. Returns the exit code."""
    from ..store.atomic import new_folder, place_folder

    out = new_folder(parsed.out)
    from ..train.trained import open_trained
    from .console import console, quiet

    quiet()
    trained = open_trained(parsed.adapter, parsed.backbone, parsed.more, parsed.expression)
    place_folder(out, lambda folder: trained.write_merged(folder, parsed.of_task))
    console.print(f"{type(trained.model).__name__} written to {out}", markup=False)
    return 0
