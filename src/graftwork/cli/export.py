"""Write an adapter in the format of another library, which then reads it without graftwork.

graftwork export adapters/sst2 --format peft --out peft/sst2
graftwork export adapters/sst2 --format peft --as-lora --rank 16 --out peft/sst2

Refused where that library cannot compute exactly the same; docs/formats.md says what each format can hold. With --as-lora the
updates of the weights are written as plain LoRA: exactly where they are of low rank, else with the error that is shown.
"""

from __future__ import annotations

import argparse


def add(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("adapter", help="a folder with an adapter, of any format, or hub:NAME/REPO")
    parser.add_argument("--format", required=True, metavar="NAME", help="peft, adapterhub, kohya, diffusers or pyreft")
    parser.add_argument(
        "--out", required=True, metavar="FOLDER", help="where to write (or FILE.safetensors: kohya, diffusers)"
    )
    parser.add_argument(
        "--backbone", metavar="NAME|FOLDER", help="the backbone, where it is not what the adapter's file says"
    )
    parser.add_argument("--as-lora", action="store_true", help="as plain LoRA, whatever the method of the weights is")
    parser.add_argument("--rank", type=int, metavar="R", help="with --as-lora: at most this rank")
    parser.add_argument(
        "--energy", type=float, metavar="SHARE", help="with --as-lora: keep this share of every update's squared norm"
    )


def run(parsed: argparse.Namespace) -> int:
    """Do what the options ask for. Returns the exit code."""
    from ..core.errors import GraftError
    from ..formats import by_name, load, plain_lora, write
    from ..store.hub import locate, pinned
    from ..store.recipe import refuse_recipe

    by_name(parsed.format)  # a wrong name is said before anything is loaded
    if not parsed.as_lora and (parsed.rank is not None or parsed.energy is not None):
        raise GraftError("--rank or --energy", "--as-lora is not given", "add it")
    from ..train.origin import open_backbone
    from .console import console, quiet, table

    quiet()
    place = pinned(parsed.adapter)
    refuse_recipe(locate(place).path, f"export {place!r}")
    model, _ = open_backbone(place, parsed.backbone)
    adapter = load(model, place)
    if parsed.as_lora:
        adapter, rows = plain_lora(model, adapter.name, parsed.rank, parsed.energy)
        shown = [(row.site, f"{row.shape[0]} x {row.shape[1]}", row.needed, row.kept, row.error) for row in rows]
        table(("site", "out x in", "rank", "kept", "relative error"), shown)
    write(model, adapter, parsed.out, parsed.format)
    console.print(f"{adapter.name}: {adapter.num_parameters:,} parameters written to {parsed.out}", markup=False)
    return 0
