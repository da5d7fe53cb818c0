"""Several saved adapters on one backbone, and a new one written beside them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from ..core.adapter import Adapter
    from ..expressions.algebra import Expr
    from ..values.hold import Composed


def open_adapters(e: Expr, name: str | None = None) -> tuple[nn.Module, Expr]:
    """The backbone of the first adapter that e names, in evaluation mode, with all of them, each under the text that was
    given for its folder; and e with each recipe's expression in the place of its folder.

    name: the backbone's folder or hub name, where it is not what the first file says.
    """
    from ..train.origin import open_backbone
    from ..train.several import load_named, whole

    model, _ = open_backbone(e.names()[0], name)
    named = load_named(model, {folder: folder for folder in e.names()})
    return model.eval(), whole(e, named)


def save_composed(model: nn.Module, made: Composed | Adapter, out: Path, as_json: bool, saying: str) -> None:
    """Write the adapter that an operation of `values` made, and print how well it holds each site."""
    from ..store import save
    from ..values.hold import Composed
    from .console import console, lines, table

    adapter, fits, left = (made.adapter, made.sites, made.left) if isinstance(made, Composed) else (made, (), {})
    save(model, adapter.name, out)
    if as_json:
        sites = [{"site": f.site, "shape": f.shape, "r": f.r, "error": f.error} for f in fits]
        lines([{"out": str(out), "parameters": adapter.num_parameters, "sites": sites, "left": dict(left)}])
        return
    if fits:
        table(("site", "shape", "rank", "error"), [(f.site, " x ".join(map(str, f.shape)), f.r, f.error) for f in fits])
    for n, change in left.items():
        console.print(f"left out: {n}, which changed by {change:.1%}", markup=False)
    console.print(f"{saying} written to {out}: {adapter.num_parameters:,} parameters", markup=False)
    if fits:
        console.print(f"largest error of a site: {max(f.error for f in fits):.2g}", markup=False)
