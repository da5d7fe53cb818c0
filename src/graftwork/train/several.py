"""Several saved adapters on one model, each under a name, and expressions over these names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from ..core.adapter import Adapter
from ..core.algebra import A, Beside, Expr, Rows, as_expr
from ..core.errors import GraftError
from ..core.graft import active
from ..core.grammar import parse
from ..core.substitute import substitute
from ..formats import load


def load_named(model: nn.Module, folders: Mapping[str, str | Path], e: Expr) -> tuple[Expr, dict[str, Adapter]]:
    """Load the adapter in each folder under its name; a recipe's adapters as NAME/a.

    Returns e with each recipe's expression in the place of its name, and the adapters, of a recipe the one that speaks for it.
    GraftError where e has not one output for every row.
    """
    stands: dict[str, Expr] = {}
    loaded = {}
    for name, folder in folders.items():
        loaded[name] = load(model, folder, name)
        stands[name] = as_expr(active(model) or "")
    whole = substitute(e, stands)
    if isinstance(whole, Rows | Beside):
        do = "give one expression for all rows; rows and branches are for Python (gw.rows, a | b)"
        raise GraftError(f"the adapter {str(e)!r}", "one for each row or output", do)
    return whole, loaded


def over(text: str, names: Mapping[str, object]) -> Expr:
    """The expression of a text; a name may hold characters that an expression would quote."""
    return A(text) if text in names else parse(text)
