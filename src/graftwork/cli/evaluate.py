"""Score a trained adapter on labelled data: the same measures as in training.

graftwork eval adapters/sst2 --data test.tsv
"""

from __future__ import annotations

import argparse

from .options import add_expression


def add(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("adapter", help="the folder that graftwork train wrote, or hub:NAME/REPO")
    text = (
        "labelled rows, in any form that graftwork train reads; of several splits, test comes before dev before train"
    )
    parser.add_argument("--data", required=True, metavar="PATH", help=text)
    for name in ("text", "pair", "label"):
        parser.add_argument(
            f"--{name}", metavar="COLUMN", help=f"the {name} column, where it is not called as in training"
        )
    parser.add_argument(
        "--backbone", metavar="NAME|FOLDER", help="the backbone, where it is not what the adapter's file says"
    )
    add_expression(parser)
    parser.add_argument("--batch", type=int, default=32, metavar="INT", help="rows at a time (default: 32)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")


def run(parsed: argparse.Namespace) -> int:
    """Do what the options ask for. Returns the exit code."""
    from ..train.run import chosen_split
    from ..train.trained import open_trained
    from .console import lines, pairs, quiet

    quiet()
    rows = chosen_split(parsed.data)
    trained = open_trained(parsed.adapter, parsed.backbone, parsed.more, parsed.expression).with_columns(
        parsed.text, parsed.pair, parsed.label
    )
    scores = trained.evaluate(rows, parsed.batch)
    if parsed.json:
        lines([{**scores, "rows": len(rows)}])
    else:
        pairs(scores, f"{trained.adapter.name} on {len(rows):,} rows of {parsed.data}")
    return 0
