"""The parts of a backbone: what "q, v", "mlp" or any other role of --method's `at` would match. Nothing but the
config is loaded.

graftwork anatomy roberta-base
graftwork anatomy llama --at "q, v"          # a model type with its default sizes works too
"""

from __future__ import annotations

import argparse


def add(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("backbone", help="a folder, a name on the hub, or a model type of transformers")
    parser.add_argument(
        "--at", metavar="SITES", help='list the sites that this matches, e.g. "q, v" or "/attention.*dense/"'
    )
    parser.add_argument("--layers", metavar="LAYERS", help='of these layers only, e.g. "0-5,-1"')


def run(parsed: argparse.Namespace) -> int:
    """Do what the options ask for. Returns the exit code."""
    from ..sites.anatomy import anatomy
    from ..sites.where import select
    from ..train.backbone import on_meta
    from .console import console, quiet, table

    quiet()
    model = on_meta(parsed.backbone)
    found = anatomy(model)
    size = sum(p.numel() for p in model.parameters())
    console.print(f"{found.name}, {size:,} parameters", markup=False)
    if parsed.at:
        sites = select(found, parsed.at, parsed.layers)
        chosen = [
            (s.path + ("" if s.param == "weight" else f".{s.param}"), s.role, s.layer if s.layer is not None else "")
            for s in sites
        ]
        table(("module", "role", "layer"), chosen, f"{len(chosen)} sites at {parsed.at!r}")
        return 0
    rows = [
        (r["role"], r["tower"], "yes" if r["cross"] else "", r["sites"], r["layers"], r["example"])
        for r in found.rows()
    ]
    table(("role", "tower", "cross", "sites", "layers", "first of them"), rows)
    return 0
