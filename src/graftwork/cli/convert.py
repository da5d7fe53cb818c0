"""Any adapter of weights as plain LoRA: exact where its updates have the rank, otherwise nearest, with the error per site.

graftwork convert adapters/dora --to "lora(r=16)" --out adapters/plain
"""

from __future__ import annotations

import argparse

from ..core.errors import GraftError
from ..expressions.algebra import A


def add(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("adapter", help="the folder of an adapter that changes weights")
    parser.add_argument(
        "--to", required=True, metavar="METHOD", help='lora with the rank to keep at most, "lora(r=16)"'
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="a new or empty folder")
    parser.add_argument("--backbone", metavar="NAME|FOLDER", help="the backbone, where it is not what the file says")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")


def run(parsed: argparse.Namespace) -> int:
    """Do what the options ask for. Returns the exit code."""
    from ..store.atomic import new_folder
    from .opening import open_adapters, save_composed

    out = new_folder(parsed.out)
    import graftwork.methods  # noqa: F401  (it registers the names)

    from ..core.text import parse_methods
    from ..methods.weight.lora import LoRA

    asked = parse_methods(parsed.to)
    if len(asked) != 1 or not isinstance(asked[0], LoRA) or asked[0] != LoRA(r=asked[0].r):
        do = 'only the rank can be chosen: --to "lora(r=16)"; alpha is r, the sites are the adapter\'s'
        raise GraftError(f"convert to {parsed.to!r}", "not lora with a rank and nothing else", do)
    from ..values.combine import combine
    from .console import quiet

    quiet()
    model, e = open_adapters(A(parsed.adapter), parsed.backbone)
    made = combine(model, out.name, e, "svd", r=asked[0].r)
    save_composed(model, made, out, parsed.json, parsed.adapter)
    return 0
