"""Loading an adapter: everything is read and checked before the model is touched."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter, Part
from ..core.delta import Delta
from ..core.errors import GraftError, nearest
from ..core.initial import Later, adopt
from ..grafting.graft import attach, build, check_name
from ..grafting.install import check_free
from ..grafting.root import body_of
from ..sites.body import Body
from . import keys
from .fingerprint import of_body
from .finite import finite
from .read import Stored, StoredMethod, read_ahead


def load(model: nn.Module, folder: str | Path, name: str | None = None, trainable: bool = False) -> Adapter:
    """Load the adapter in `folder` onto `model` and activate it. name: None takes the stored one.

    trainable: its parameters receive gradients, so that training can go on (from a save with resume=True exactly).
    Raises GraftError for a folder without an adapter, a damaged, altered or newer file, another backbone, a name
    that is taken; the model is then as it was. Nothing is unpickled, and no path is taken from a file.
    """
    asked = f"load {str(folder)!r}"
    with read_ahead(Path(folder).expanduser()) as stored:
        body = body_of(model)
        named, parts = _built(model, body, stored, asked, name)
    return _hung(model, body, stored, asked, named, parts, trainable)


def install(
    model: nn.Module, body: Body, stored: Stored, asked: str, name: str | None = None, trainable: bool = False
) -> Adapter:
    """Hang what was read, from files of any format, onto `model`: everything is checked before the model is touched.

    asked: what to say in an error.  name, trainable: as in `load`.
    """
    named, parts = _built(model, body, stored, asked, name)
    return _hung(model, body, stored, asked, named, parts, trainable)


def _built(model: nn.Module, body: Body, stored: Stored, asked: str, name: str | None) -> tuple[str, list[Part]]:
    """The adapter's name and its parts, without values yet."""
    name = stored.name if name is None else name
    check_free(model, body)
    check_name(model, name)
    if stored.backbone is not None and (different := stored.backbone.differs(here := body.once(of_body))):
        raise GraftError(
            f"{asked} onto {type(model).__name__}",
            f"{different}\n    made for: {stored.backbone}\n    this one: {here}",
            "load the backbone that it was made for",
        )
    return name, [_part(method, body, asked) for method in stored.methods]


def _hung(
    model: nn.Module, body: Body, stored: Stored, asked: str, name: str, parts: list[Part], trainable: bool
) -> Adapter:
    """The adapter with its values, on the model."""
    for part, tensors in zip(parts, stored.tensors, strict=True):
        _fill(part, tensors, asked)
    adapter = Adapter(name, parts)
    adapter.trainable, adapter.labels, adapter.metadata = trainable, stored.labels, stored.metadata
    for warning in stored.warnings:
        warnings.warn(f"{asked}: {warning}", stacklevel=4)
    attach(model, adapter, body)
    return adapter


def _part(method: StoredMethod, body: Body, asked: str) -> Part:
    """The deltas of one stored method, without values; attached to nothing yet."""
    sites, found = body.sites, body.anatomy
    missing = [key for key in method.sites if key not in sites]
    if missing:
        first = f"{found.name} has no site {missing[0]!r}{nearest(missing[0], sites)}"
        raise GraftError(
            asked,
            f"{first}; {len(missing)} of {len(method.sites)} are missing",
            "load the backbone that it was made for, with the same head",
        )
    part = build(method.method, [sites[key] for key in method.sites], found, Later())
    lost = set(method.sites) - set(part.deltas)
    if lost:
        found_there = f"{method.method} has nothing to do at {sorted(lost)[0]}"
        raise GraftError(asked, found_there, "the file was made for another backbone")
    return part


def _fill(part: Part, tensors: dict[str, dict[str, Tensor]], asked: str) -> None:
    """Give the deltas their stored values, by site key, and what they share its own."""
    for site in tensors:
        if site != keys.SHARED and site not in part.deltas:
            raise GraftError(asked, f"tensors of the site {site!r}, which is not among its sites", "restore the file")
    for site, delta in part.deltas.items():
        _restore(delta, tensors.get(site, {}), f"{asked}: {site}")
    shared = tensors.get(keys.SHARED, {})
    _restore_shared(part.shared_modules, shared, f"{asked}: shared by the sites of {part.method}")


def _restore(delta: Delta, tensors: dict[str, Tensor], asked: str) -> None:
    _prepare(delta, tensors, asked)
    delta.restore(tensors)
    _check_values(delta, tensors, asked)


def _restore_shared(modules: nn.ModuleDict, tensors: dict[str, Tensor], asked: str) -> None:
    own = modules.state_dict(keep_vars=True)
    for name in sorted(own.keys() | tensors.keys()):
        there, here = tensors.get(name), own.get(name)
        if there is None or here is None or there.shape != here.shape:
            text = [("nothing" if t is None else str(list(t.shape))) for t in (there, here)]
            raise GraftError(
                f"{asked}: {name!r}",
                f"stored {text[0]}, expected {text[1]}",
                "the file was made by other hyper-parameters",
            )
    _prepare(modules, tensors, asked)
    adopt(modules, tensors)
    _check_values(modules, tensors, asked)


def _prepare(module: nn.Module, tensors: dict[str, Tensor], asked: str) -> None:
    """Give the module room for these values where it has none (meta device).

    GraftError where integers are stored for real numbers, or the other way round. Real numbers take the precision of the
    backbone.
    """
    own = dict(_named(module))  # a fraction of the time of a state_dict
    for name, value in tensors.items():
        here = own.get(name, value)
        if here.dtype != value.dtype and not (here.is_floating_point() and value.is_floating_point()):
            raise GraftError(f"{asked}/{name}", f"stored as {value.dtype}, expected {here.dtype}", "restore the file")
    if not any(value.is_meta for value in own.values()):
        return
    for name, value in module.state_dict(keep_vars=True).items():
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
