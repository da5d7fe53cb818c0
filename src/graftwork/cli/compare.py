"""Several adapters side by side on labelled data: scores, sizes, time, and how alike they are to the first.

graftwork compare adapters/a adapters/b adapters/c --data test.tsv
graftwork compare adapters/a "0.5*a + 0.5*b" recipes/r --with adapters/b --data test.tsv --picture compared.png

Each is a folder, or an expression over what the folders are called. They must have one task and one backbone, which
is loaded once. Time is that of forward passes, measured in turns; cosine is that of what two change of the weights,
"-" where one changes activations; agrees is the share of labels that are the same.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER", help="folders, hub:NAME/REPO, or expressions")
    parser.add_argument("--data", required=True, metavar="PATH", help="labelled rows, as for graftwork eval")
    text = "one more adapter, for expressions only; may be given several times"
    parser.add_argument("--with", dest="more", action="append", default=[], metavar="FOLDER", help=text)
    for name in ("text", "pair", "label"):
        text = f"the {name} column, where it is not called as in training"
        parser.add_argument(f"--{name}", metavar="COLUMN", help=text)
    parser.add_argument("--backbone", metavar="NAME|FOLDER", help="the backbone, where it is not what the files say")
    parser.add_argument("--batch", type=int, default=32, metavar="INT", help="rows at a time (default: 32)")
    parser.add_argument("--picture", metavar="FILE", help="draw scores and times into this .png, .svg or .pdf")
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each")


def run(parsed: argparse.Namespace) -> int:
    """Do what the options ask for. Returns the exit code."""
    from dataclasses import asdict

    from ..train.compare import compare
    from ..train.picture import check_picture, draw
    from ..train.run import chosen_split
    from .console import console, lines, quiet, table

    picture = Path(parsed.picture).expanduser() if parsed.picture else None
    if picture is not None:
        check_picture(picture)
    quiet()
    rows = chosen_split(parsed.data)
    columns = {"text": parsed.text, "pair": parsed.pair, "label": parsed.label}
    task, compared = compare(parsed.adapters, rows, parsed.more, parsed.backbone, parsed.batch, columns)
    if parsed.json:
        lines({**asdict(one), "rows": len(rows)} for one in compared)
    else:
        scores, first = list(compared[0].scores), compared[0].name
        table(
            ("adapter", *scores),
            [(one.name, *map(one.scores.__getitem__, scores)) for one in compared],
            f"{task.name} on {len(rows):,} rows of {parsed.data}",
        )
        body = [
            (one.name, one.parameters, one.bytes / 1e6, one.seconds, *map(_share, (one.cosine, one.agreement)))
            for one in compared
        ]
        table(
            ("adapter", "parameters", "MB", "s / 1000 rows", "cosine", "agrees"), body, f"cost, and likeness to {first}"
        )
    if picture is not None:
        draw(task, compared, picture, f"{len(rows):,} rows of {Path(parsed.data).name}")
        if not parsed.json:
            console.print(f"drawn in {picture}", markup=False)
    return 0


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
