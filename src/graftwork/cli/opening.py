"""Several saved adapters on one backbone, and a new one written beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import GraftError

if TYPE_CHECKING:
    from torch import nn

    from ..core.adapter import Adapter
    from ..values.hold import Composed


def check_out(out: str) -> Path:
    """GraftError unless this is a new or empty folder."""
    folder = Path(out).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise GraftError(f"write to {out!r}", "something is there", "give a new or empty folder")
    return folder


def open_adapters(folders: Sequence[str], name: str | None = None) -> nn.Module:
    """The backbone of the first, in evaluation mode, with all of them, each under the text that was given for its folder.

    name: the backbone's folder or hub name, where it is not what the first file says.
    """
    from .. import combinators, methods  # noqa: F401  (they register the names that a file uses)
    from ..store import load
    from ..train import backbone, tasks
    from ..train.described import metadata_of

    described = metadata_of(folders[0])
    metadata, stored = described["metadata"], described["backbone"]
    source = name or metadata.get("backbone") or stored["name"]
    if not source:
        raise GraftError(f"the backbone of {folders[0]!r}", "no name in its file", "name it with --backbone")
    if "task" in metadata:
        model = backbone.load(source, tasks.from_json(metadata["task"])).model
    else:
        model = backbone.of_class(source, stored["class"])
    for folder in folders:
        load(model, folder, name=folder)
    return model.eval()


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
