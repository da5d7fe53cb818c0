"""The methods: all of them as a table, or one with its equation, hyper-parameters, parameter formula and source.

graftwork methods
graftwork methods lora
graftwork methods --gallery docs/methods
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import sys
from pathlib import Path
from typing import Any

HEADINGS = ("method", "what it is", "sites", "merges", "starts as the backbone")


def add(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("name", nargs="?", metavar="NAME", help='a method, or a pattern such as "*lora*"')
    parser.add_argument("--markdown", action="store_true", help="print the table as markdown")
    parser.add_argument(
        "--gallery", metavar="FOLDER", help="write a page for each method, and an index, to this folder"
    )


def run(parsed: argparse.Namespace) -> int:
    """Do what the options ask for. Returns the exit code."""
    import graftwork.combinators
    import graftwork.methods  # noqa: F401  (both register theirs)

    from ..core.method import get, methods
    from .console import table

    name = parsed.name
    if parsed.gallery:
        from .gallery import write

        write(Path(parsed.gallery), methods(name or "*"))
        return 0
    if name and not any(c in name for c in "*?["):
        get(name)  # GraftError with the nearest name
        print(card(name))
        return 0
    rows = [row(n) for n in methods(name or "*")]
    if parsed.markdown:
        print(markdown(rows))
    else:
        table(HEADINGS, rows)
    return 0


def markdown(rows: list[tuple[Any, ...]]) -> str:
    """The table as the README holds it."""
    lines = [" | ".join(HEADINGS), " | ".join("---" for _ in HEADINGS)]
    for row in rows:
        cells = ["yes" if cell is True else "" if cell is False else str(cell).replace("|", "\\|") for cell in row]
        lines.append(" | ".join([f"`{cells[0]}`", *cells[1:]]))
    return "\n".join(f"| {line} |" for line in lines)


def card(name: str) -> str:
    """All that is known of one method or preset: its documentation, hyper-parameters with defaults, and its source."""
    from ..core.method import PRESETS, get

    made = get(name)
    parts = [name, "", inspect.cleandoc(inspect.getdoc(made) or "")]
    if name in PRESETS:
        parts += ["", f"  = {' + '.join(map(str, _kinds(name)))}"]
    rows = [f"  {option} = {default}" for option, default in defaults(made)]
    parts += ["", "hyper-parameters and their defaults:", *rows]
    source = (inspect.getdoc(sys.modules[made.__module__]) or "").strip()
    return "\n".join([*parts, "", source])


def _kinds(name: str) -> list[Any]:
    """The methods behind a name: a preset has one or several."""
    from ..core.method import PRESETS, REGISTRY

    return list(PRESETS[name]()) if name in PRESETS else [REGISTRY[name]]


def defaults(made: Any) -> list[tuple[str, str]]:
    """(hyper-parameter, default) of a method class or a preset."""
    if dataclasses.is_dataclass(made):
        fields = sorted(dataclasses.fields(made), key=lambda f: f.name in ("at", "layers"))  # own ones first
        return [(f.name, "(to be given)" if f.default is dataclasses.MISSING else repr(f.default)) for f in fields]
    given = inspect.signature(inspect.unwrap(made)).parameters.values()
    own = [(p.name, "(to be given)" if p.default is p.empty else repr(p.default)) for p in given]
    return [*own, ("at", repr(made()[0].at)), ("layers", "None")]


def row(name: str) -> tuple[Any, ...]:
    """A method's line in the table (see HEADINGS)."""
    from ..core.method import flatten, get

    made = get(name)
    paragraph = " ".join((inspect.getdoc(made) or "").split("\n\n")[0].split())
    first = re.split(r"(?<=[\w)\]|])[.;] ", paragraph + " ", maxsplit=1)[0].strip().removesuffix(".")
    kinds = flatten(made())
    at = ", ".join(dict.fromkeys(_sites(k) for k in kinds))
    return name, first, at, all(k.mergeable for k in kinds), all(k.identity for k in kinds)


def _sites(made: Any) -> str:
    """Where a method is grafted by default; a combinator stands where the method inside it does, a mixture where its adapters do."""
    return made.at or ("where its adapters are" if made.mixes else _sites(made.of))
