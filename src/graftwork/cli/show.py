"""What an adapter is: methods, sites, parameters, backbone, scores, and how it was trained. The backbone is not loaded.

graftwork show adapters/sst2 [--json]
"""

from __future__ import annotations

import argparse
from typing import Any


def add(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("adapter", help="a folder with adapter.json, or hub:NAME/REPO")
    parser.add_argument("--json", action="store_true", help="print adapter.json as it is")


def run(parsed: argparse.Namespace) -> int:
    """Do what the options ask for. Returns the exit code."""
    from ..store.hub import pinned
    from ..train.described import describe, metadata_of
    from .console import lines, pairs, table

    place = pinned(parsed.adapter)
    data = metadata_of(place)
    if parsed.json:
        lines([data])
        return 0
    import graftwork.combinators
    import graftwork.methods  # noqa: F401  (both register the names in the file)

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
