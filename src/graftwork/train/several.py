"""Several saved adapters on one model, each under a name, and expressions over these names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..core.adapter import Adapter
from ..core.errors import GraftError, nearest
from ..expressions.algebra import A, Beside, Expr, Rows, as_expr
from ..expressions.grammar import parse
from ..expressions.mixing import mixing
from ..expressions.substitute import substitute
from ..formats import load
from ..grafting.graft import active
from ..store.hub import Place


@dataclass(frozen=True)
class Named:
    """What was loaded under a name. adapter: of a recipe the one that speaks for it;  expression: what the name stands for."""

    adapter: Adapter
    expression: Expr


def load_named(model: nn.Module, folders: Mapping[str, str | Path]) -> dict[str, Named]:
    """Load the adapter in each folder under its name, the first one last: it may mix the others. A recipe's adapters are NAME/a."""
    made = {n: Named(load(model, folders[n], n), as_expr(active(model) or "")) for n in reversed(list(folders))}
    return {name: made[name] for name in folders}


def whole(e: Expr, named: Mapping[str, Named]) -> Expr:
    """e with each recipe's expression in the place of its name. GraftError where that has not one output for every row."""
    there = substitute(e, {name: one.expression for name, one in named.items()})
    if isinstance(there, Rows | Beside):
        do = "give one expression for all rows; rows and branches are for Python (gw.rows, a | b)"
        raise GraftError(f"the adapter {str(e)!r}", "one for each row or output", do)
    return there


def by_name(places: Sequence[Place], own: str | None = None) -> dict[str, str]:
    """The folders by what a person calls them. GraftError where two, or one and the name `own`, are called alike."""
    folders = {place.name: str(place) for place in places}
    if len(folders) < len(places) or own in folders:
        names = ", ".join([*(place.name for place in places), *([] if own is None else [own])])
        raise GraftError("several adapters", f"folders of one name: {names}", "call each folder otherwise")
    return folders


def over(text: str, names: Mapping[str, object]) -> Expr:
    """The expression of a text over these names, which may hold characters that it would quote. GraftError for other names."""
    e = A(text) if text in names else parse(text)
    for name in e.names():
        if name not in names:
            found = f"no such folder, and adapters called {', '.join(names)}{nearest(name, names)}"
            raise GraftError(f"the adapter {name!r} of {text!r}", found, "give its folder: --with FOLDER")
    return e


def check_mixed(adapter: Adapter, members: Sequence[str]) -> None:
    """GraftError where an adapter that is to be trained does not mix those beside it, or would train them without keeping them."""
    part = mixing(adapter)
    asked = f"train {' + '.join(map(str, adapter.methods))}"
    if part is None and members:
        do = f'leave --with out, or mix them: --method "fusion(of={list(members)})"'
        raise GraftError(asked, f"it does not use {members[0]}", do)
    if part is not None and part.method.joint:  # type: ignore[attr-defined]
        do = "leave joint out, or train them together in Python, and save each"
        raise GraftError(asked, "joint trains the adapters that it mixes, and only the mixture is written", do)
