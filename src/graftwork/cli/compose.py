"""Make one new adapter out of several: a weighted sum of what they do, or of their parameters.

graftwork compose "0.5*adapters/a + 0.5*adapters/b" --out adapters/c
graftwork compose "helpful - 0.5*toxic" --out better --how svd --rank 16

The names are folders; one with blanks or other signs stands in double quotes. Without --how the sum is exact, or
refused with what a cut at rank 16 would lose.
"""

from __future__ import annotations

import argparse
import json
import re

from ..core.errors import GraftError

OF_PARAMETERS = ("average", "arithmetic")
TERM = re.compile(
    r"\s*(?P<sign>[+-](?=\s|\d|\"|\w))?\s*(?:(?P<weight>\d+(?:\.\d*)?|\.\d+)\s*\*\s*)?"
    r"(?:(?P<name>[\w./~][\w./~-]*)|(?P<quoted>\"(?:[^\"\\]|\\.)*\"))\s*"
)


def add(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    from ..values.options import RULES

    parser.add_argument("expression", help='folders with weights, "0.5*a + 0.5*b"')
    parser.add_argument("--out", required=True, metavar="FOLDER", help="a new or empty folder")
    choices = (*RULES, *OF_PARAMETERS)
    text = (
        "cat is the exact sum of what they do (default), svd the same at a smaller rank; average and arithmetic work on "
        "the parameters of like adapters of any method"
    )
    parser.add_argument("--how", choices=choices, default="cat", help=text)
    parser.add_argument("--rank", type=int, metavar="INT", help="cut the result at this rank")
    parser.add_argument("--energy", type=float, metavar="FLOAT", help="keep this share of the result")
    parser.add_argument("--density", type=float, metavar="FLOAT", help="the share of entries that stays")
    parser.add_argument("--seed", type=int, metavar="INT", help="of what is dropped at random (dare)")
    parser.add_argument("--head", metavar="FOLDER", help="the adapter whose own task head is kept")
    parser.add_argument("--backbone", metavar="NAME|FOLDER", help="the backbone, where it is not what the file says")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")


def run(parsed: argparse.Namespace) -> int:
    """Do what the options ask for. Returns the exit code."""
    from .opening import check_out, open_adapters, save_composed

    weights = weights_of(parsed.expression)
    out = check_out(parsed.out)
    options = {"r": parsed.rank, "energy": parsed.energy, "density": parsed.density, "seed": parsed.seed}
    given = [f"--{'rank' if k == 'r' else k}" for k, v in options.items() if v is not None]
    given += ["--head"] if parsed.head else []
    if given and parsed.how in OF_PARAMETERS:
        raise GraftError(f"compose by {parsed.how}", f"{given[0]}, which has no effect on it", "leave it out")
    from ..values.combine import combine
    from ..values.parameters import arithmetic, average
    from .console import quiet

    quiet()
    model = open_adapters(list(weights), parsed.backbone)
    name, how = out.name, parsed.how
    if how in OF_PARAMETERS:
        made = (average if how == "average" else arithmetic)(model, name, weights)
        save_composed(model, made, out, parsed.json, parsed.expression)
    else:
        composed = combine(model, name, weights, how, **options, head=parsed.head)
        save_composed(model, composed, out, parsed.json, parsed.expression)
    return 0


def weights_of(text: str) -> dict[str, float]:
    """{folder: weight} of a weighted sum. GraftError, pointing at the character, for anything else."""
    weights: dict[str, float] = {}
    at = 0
    while at < len(text) or not weights:
        found = TERM.match(text, at)
        if not found or (weights and not found["sign"]):
            at += len(text[at:]) - len(text[at:].lstrip())
            what = "expected + or -" if found else "expected an adapter's folder, with or without a weight"
            raise GraftError(f"the sum\n    {text}\n    {' ' * at}^", what, "write it as in '0.5*a + 0.5*b'")
        name = json.loads(found["quoted"]) if found["quoted"] else found["name"]
        if name in weights:
            raise GraftError(f"the sum {text!r}", f"{name!r} stands in it twice", "give it one weight")
        weights[name] = float(found["weight"] or 1) * (-1 if found["sign"] == "-" else 1)
        at = found.end()
    return weights
