"""Extract a LoRA from a checkpoint that was tuned as a whole, by the difference to the one it was tuned from.

graftwork extract --base bert-base --tuned my-tuned-bert --rank 16 --out adapters/mine
"""

from __future__ import annotations

import argparse


def add(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--base", required=True, metavar="NAME|FOLDER", help="the checkpoint before tuning")
    parser.add_argument("--tuned", required=True, metavar="NAME|FOLDER", help="the tuned one, of the same architecture")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="a new or empty folder")
    parser.add_argument("--rank", type=int, default=64, metavar="INT", help="at most this rank (default: 64)")
    text = "the smallest rank that keeps this share of the squared difference, site by site"
    parser.add_argument("--energy", type=float, metavar="FLOAT", help=text)
    text = "keep biases, norms and embeddings that changed, too; otherwise they are listed"
    parser.add_argument("--rest", action="store_true", help=text)
    parser.add_argument("--json", action="store_true", help="print one line of JSON")


def run(parsed: argparse.Namespace) -> int:
    """Do what the options ask for. Returns the exit code."""
    from ..store.atomic import new_folder
    from .opening import save_composed

    out = new_folder(parsed.out)
    from pathlib import Path

    from ..train import backbone
    from ..values.extract import extract
    from .console import quiet

    quiet()
    tuned = backbone.of_class(parsed.tuned)
    base = backbone.of_class(parsed.base, type(tuned).__name__, like=tuned)
    made = extract(base, tuned, out.name, r=parsed.rank, energy=parsed.energy, rest=parsed.rest)
    local = Path(parsed.base).expanduser()
    made.adapter.metadata["backbone"] = str(local.resolve()) if local.is_dir() else parsed.base
    if any(site.role == "head" for site in made.adapter.sites):
        made.adapter.labels = tuple(tuned.config.id2label.values())  # type: ignore[union-attr,operator]
    save_composed(base, made, out, parsed.json, f"{parsed.tuned} - {parsed.base}")
    return 0
