"""The adapters of a folder that are most like one, by their numbers and by their words. No backbone is loaded.

graftwork similar adapters/sst2 adapters/
"""

from __future__ import annotations

import argparse


def add(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("adapter", help="the folder of an adapter")
    parser.add_argument("folder", help="a folder of adapter folders")
    parser.add_argument("--top", type=int, default=10, metavar="INT", help="how many to show (default: 10)")
    parser.add_argument("--json", action="store_true", help="print lines of JSON")


def run(parsed: argparse.Namespace) -> int:
    """Do what the options ask for. Returns the exit code."""
    import graftwork.combinators
    import graftwork.methods  # noqa: F401  (both register the names in the files)

    from ..values.neighbours import neighbours
    from .console import lines, table

    found = neighbours(parsed.adapter, parsed.folder)[: parsed.top]
    if parsed.json:
        lines(
            {"folder": str(n.folder), "name": n.name, "method": n.method, "cosine": n.cosine, "text": n.text}
            for n in found
        )
        return 0
    rows = [(str(n.folder), n.method, "-" if n.cosine is None else f"{n.cosine:+.3f}", f"{n.text:.3f}") for n in found]
    table(("adapter", "method", "by numbers", "by words"), rows)
    return 0
