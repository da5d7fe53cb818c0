"""Make one new adapter out of several: any expression over them that is one change of each weight.

graftwork compose "0.5*adapters/a + 0.5*adapters/b" --out adapters/c
graftwork compose "adapters/de >> adapters/ner" --out adapters/de-ner
graftwork compose "mean(a, b) - 0.5*toxic" --out better --how svd --rank 16
graftwork compose "prefix >> bottleneck" --out both --recipe      # kept as an expression, for any method

The names are folders; one with blanks or other signs stands in double quotes. Without --how the result is exact, or
refused with what a cut at rank 16 would lose.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import GraftError
from ..expressions.algebra import A, Expr, linear

if TYPE_CHECKING:
    from torch import nn

    from ..core.adapter import Adapter
    from ..values.hold import Composed

OF_PARAMETERS = ("average", "arithmetic")


def add(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    from ..values.options import RULES

    parser.add_argument("expression", help='over folders: "0.5*a + 0.5*b", "mean(a, b)", "a >> b"')
    parser.add_argument("--out", required=True, metavar="FOLDER", help="a new or empty folder")
    choices = (*RULES, *OF_PARAMETERS)
    text = (
        "cat is the exact sum of what they do (default), svd the same at a smaller rank; average and arithmetic work on "
        "the parameters of like adapters of any method"
    )
    parser.add_argument("--how", "--method", choices=choices, default="cat", help=text)
    text = "write the expression and its adapters as they are, for any method; the folder is used as one adapter"
    parser.add_argument("--recipe", action="store_true", help=text)
    parser.add_argument("--rank", type=int, metavar="INT", help="cut the result at this rank")
    parser.add_argument("--energy", type=float, metavar="FLOAT", help="keep this share of the result")
    parser.add_argument("--density", type=float, metavar="FLOAT", help="the share of entries that stays")
    parser.add_argument("--seed", type=int, metavar="INT", help="of what is dropped at random (dare)")
    parser.add_argument("--head", metavar="FOLDER", help="the adapter whose own task head is kept")
    parser.add_argument("--backbone", metavar="NAME|FOLDER", help="the backbone, where it is not what the file says")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")


def run(parsed: argparse.Namespace) -> int:
    """Do what the options ask for. Returns the exit code."""
    from ..expressions.grammar import parse
    from ..store.atomic import new_folder
    from .opening import open_adapters, save_composed

    e, how = parse(parsed.expression), parsed.how
    out = new_folder(parsed.out)
    options = {"r": parsed.rank, "energy": parsed.energy, "density": parsed.density, "seed": parsed.seed}
    given = [f"--{'rank' if k == 'r' else k}" for k, v in options.items() if v is not None]
    given += ["--head"] if parsed.head else []
    given += ["--how"] if parsed.recipe and how != "cat" else []
    if given and (how in OF_PARAMETERS or parsed.recipe):
        asked = "compose a recipe" if parsed.recipe else f"compose by {how}"
        raise GraftError(asked, f"{given[0]}, which has no effect on it", "leave it out")
    from ..values.combine import combine
    from ..values.parameters import arithmetic, average
    from .console import quiet

    quiet()
    model, e = open_adapters(e, parsed.backbone)
    if parsed.recipe:
        return _keep(model, e, out, parsed.json)
    made: Composed | Adapter
    if how in OF_PARAMETERS:
        made = (average if how == "average" else arithmetic)(model, out.name, _by_name(e, how))
    else:
        made = combine(model, out.name, e, how, **options, head=parsed.head)
    save_composed(model, made, out, parsed.json, parsed.expression)
    return 0


def _keep(model: nn.Module, e: Expr, out: Path, as_json: bool) -> int:
    """Write e and its adapters as they are, once they have been tried together."""
    from ..formats import save
    from ..grafting.graft import activate
    from .console import console, lines

    if isinstance(e, A):
        raise GraftError(f"compose a recipe of {e}", "one adapter", "it is a folder by itself: copy that")
    activate(model, e)
    save(model, e, out)
    names = e.names()
    if as_json:
        lines([{"out": str(out), "expression": str(e), "adapters": list(names)}])
    else:
        console.print(f"{e} written to {out}: a recipe of {len(names)} adapters", markup=False)
    return 0


def _by_name(e: Expr, how: str) -> dict[str, float]:
    """The weights of the adapters that e adds up."""
    weights = {t.name: c for c, t in linear(e) if isinstance(t, A)}
    if not weights or len(weights) < len(linear(e)):
        raise GraftError(f"compose {e} by {how}", "no weighted sum of adapters", "write it as in '0.5*a + 0.5*b'")
    return weights
