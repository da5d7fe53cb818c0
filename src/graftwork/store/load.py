"""Loading an adapter: everything is read and checked before the model is touched."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter, Part
from ..core.body import Body, uncollected
from ..core.delta import Delta
from ..core.errors import GraftError, nearest
from ..core.graft import attach, build, check_name
from ..core.initial import LATER, adopt
from ..core.install import check_free
from ..core.root import body_of
from . import keys
from .fingerprint import of_body
from .finite import finite
from .read import Stored, StoredMethod, read


@uncollected()
def load(model: nn.Module, folder: str | Path, name: str | None = None, trainable: bool = False) -> Adapter:
    """Load the adapter in `folder` onto `model` and activate it. name: None takes the stored one.

    trainable: its parameters receive gradients, so that training can go on (from a save with resume=True exactly).
    Raises GraftError for a folder without an adapter, a damaged, altered or newer file, another backbone, a name
    that is taken; the model is then as it was. Nothing is unpickled, and no path is taken from a file.
    """
    stored = read(Path(folder).expanduser())
    return install(model, body_of(model), stored, f"load {str(folder)!r}", name, trainable)


def install(
    model: nn.Module, body: Body, stored: Stored, asked: str, name: str | None = None, trainable: bool = False
) -> Adapter:
    """Hang what was read, from files of any format, onto `model`: everything is checked before the model is touched.

    asked: what to say in an error.  name, trainable: as in `load`.
    """
    name = stored.name if name is None else name
    check_free(model, body)
    check_name(model, name)
    if stored.backbone is not None and (different := stored.backbone.differs(here := body.once(of_body))):
        raise GraftError(
            f"{asked} onto {type(model).__name__}",
            f"{different}\n    made for: {stored.backbone}\n    this one: {here}",
            "load the backbone that it was made for",
        )
    adapter = Adapter(name, [_part(i, method, stored, body, asked) for i, method in enumerate(stored.methods)])
    adapter.trainable, adapter.labels, adapter.metadata = trainable, stored.labels, stored.metadata
    for warning in stored.warnings:
        warnings.warn(f"{asked}: {warning}", stacklevel=3)
    attach(model, adapter, body)
    return adapter


def _part(index: int, method: StoredMethod, stored: Stored, body: Body, asked: str) -> Part:
    """The deltas of one stored method with their stored values; attached to nothing yet."""
    sites, found = body.sites, body.anatomy
    missing = [key for key in method.sites if key not in sites]
    if missing:
        first = f"{found.name} has no site {missing[0]!r}{nearest(missing[0], sites)}"
        raise GraftError(
            asked,
            f"{first}; {len(missing)} of {len(method.sites)} are missing",
            "load the backbone that it was made for, with the same head",
        )
    part = build(method.method, [sites[key] for key in method.sites], found, LATER)
    lost = set(method.sites) - set(part.deltas)
    if lost:
        found_there = f"{method.method} has nothing to do at {sorted(lost)[0]}"
        raise GraftError(asked, found_there, "the file was made for another backbone")
    for site in stored.tensors[index]:
        if site != keys.SHARED and site not in part.deltas:
            raise GraftError(asked, f"tensors of the site {site!r}, which is not among its sites", "restore the file")
    for site, delta in part.deltas.items():
        _restore(delta, stored.tensors[index].get(site, {}), f"{asked}: {site}")
    shared = stored.tensors[index].get(keys.SHARED, {})
    _restore_shared(part.shared_modules, shared, f"{asked}: shared by the sites of {method.method}")
    return part


def _restore(delta: Delta, tensors: dict[str, Tensor], asked: str) -> None:
    own = delta.state_dict(keep_vars=True)
    _check_kinds(own, tensors, asked)
    _materialise(delta, own)
    delta.restore(tensors)
    _check_values(delta, tensors, asked)


def _restore_shared(modules: nn.ModuleDict, tensors: dict[str, Tensor], asked: str) -> None:
    own = modules.state_dict(keep_vars=True)
    _check_kinds(own, tensors, asked)
    for name in sorted(own.keys() | tensors.keys()):
        there, here = tensors.get(name), own.get(name)
        if there is None or here is None or there.shape != here.shape:
            text = [("nothing" if t is None else str(list(t.shape))) for t in (there, here)]
            raise GraftError(
                f"{asked}: {name!r}",
                f"stored {text[0]}, expected {text[1]}",
                "the file was made by other hyper-parameters",
            )
    _materialise(modules, own)
    adopt(modules, tensors)
    _check_values(modules, tensors, asked)


def _check_kinds(own: dict[str, Tensor], tensors: dict[str, Tensor], asked: str) -> None:
    """GraftError where integers are stored for real numbers, or the other way round.

    Real numbers take the precision of the backbone.
    """
    for name, value in tensors.items():
        here = own.get(name, value)
        if here.dtype != value.dtype and not (here.is_floating_point() and value.is_floating_point()):
            raise GraftError(f"{asked}/{name}", f"stored as {value.dtype}, expected {here.dtype}", "restore the file")


def _materialise(module: nn.Module, own: dict[str, Any]) -> None:
    """Give what was built for a backbone on the meta device room for its stored values."""
    for name, value in own.items():
        if value.is_meta:
            holder, _, leaf = name.rpartition(".")
            home, room = module.get_submodule(holder), torch.empty_like(value, device="cpu")
            if isinstance(value, nn.Parameter):
                home._parameters[leaf] = nn.Parameter(room, value.requires_grad)
            else:
                home._buffers[leaf] = room


def _check_values(module: nn.Module, tensors: dict[str, Tensor], asked: str) -> None:
    """GraftError for a number that does not fit the backbone's precision, or what no file holds and is not here."""
    for name, value in _named(module):
        if value.is_meta:
            raise GraftError(f"{asked}/{name}", "the backbone is on the meta device", "give it its weights first")
        if name in tensors and tensors[name].dtype != value.dtype and not finite(value):
            raise GraftError(f"{asked}/{name}", f"a number too large for {value.dtype}", "use float32 or bfloat16")


def _named(module: nn.Module, above: str = "") -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, not only those that are stored."""
    for name, value in [*module._parameters.items(), *module._buffers.items()]:
        if value is not None:
            yield above + name, value
    for name, child in module._modules.items():
        if child is not None:
            yield from _named(child, f"{above}{name}.")
