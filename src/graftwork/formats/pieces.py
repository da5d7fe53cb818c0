"""The correspondence between an adapter and a foreign file: which tensor of the one is which key of the other.

It is stated once, and used in both directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..core.adapter import Adapter
from ..core.errors import GraftError
from ..core.method import Method
from ..core.site import Site
from ..store.keys import SHARED
from ..store.read import StoredMethod
from ..store.save import checked

SHOWN = 20  # keys that an error lists of each kind
View = Callable[[Tensor], Tensor]


Place = tuple[Site | None, str]
Here = Callable[[Tensor], Sequence[Tensor]]
There = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Slot:
    """One tensor of a file, and what it is here: the tensors of these names at these sites (None: shared by the sites).

    here, there: from the file's layout to the deltas', and back.
    """

    key: str
    places: tuple[Place, ...]
    here: Here
    there: There


def one(key: str, site: Site | None, name: str, here: View | None = None, there: View | None = None) -> Slot:
    """A slot for one tensor; by default it is the same in the file."""
    to, back = here or (lambda t: t), there or (lambda t: t)
    return Slot(key, ((site, name),), lambda t: [to(t)], lambda ts: back(ts[0]))


def shaped(key: str, site: Site | None, name: str, here: tuple[int, ...], there: tuple[int, ...]) -> Slot:
    """A slot whose two layouts hold the same numbers in the same order, in these shapes."""
    return one(key, site, name, lambda t: expect(t, there).reshape(here), lambda t: t.reshape(there))


def expect(t: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor. ValueError for another shape."""
    if tuple(t.shape) != shape:
        raise ValueError(f"its shape is {list(t.shape)}, expected {list(shape)}")
    return t


@dataclass(frozen=True)
class Piece:
    """One method, and the tensors of all its sites.

    given: shared tensors that are in no file.  bare: sites without a tensor of their own.
    """

    method: Method
    slots: tuple[Slot, ...]
    given: Mapping[str, Tensor] = field(default_factory=dict)
    bare: tuple[Site, ...] = ()

    @property
    def sites(self) -> list[Site]:
        """Each once, in order."""
        own = (site for slot in self.slots for site, _ in slot.places if site is not None)
        return list({site.key: site for site in (*own, *self.bare)}.values())


def grouped(made: Iterable[tuple[Method, Sequence[Slot]]]) -> list[Piece]:
    """One piece for each different method, in the order of their first sites: an adapter whose ranks differ is several methods."""
    groups: dict[Method, list[Slot]] = {}
    for method, slots in made:
        groups.setdefault(method, []).extend(slots)
    return [Piece(_placed(method, slots), tuple(slots)) for method, slots in groups.items()]


def _placed(method: Method, slots: Sequence[Slot]) -> Method:
    """The method with `at` saying the roles of its sites."""
    roles = dict.fromkeys(site.role for slot in slots for site, _ in slot.places if site is not None)
    return replace(method, at=", ".join(roles))


Tensors = tuple[dict[str, dict[str, Tensor]], ...]


def gather(
    pieces: Sequence[Piece], tensors: Mapping[str, Tensor], asked: str, partial: bool = False
) -> tuple[tuple[StoredMethod, ...], Tensors, tuple[str, ...]]:
    """(methods with their sites, tensors by site, warnings) from the tensors of a file.

    GraftError names every key that is missing or belongs nowhere; with `partial`, its site or itself is left out instead.
    """
    wanted = {slot.key for piece in pieces for slot in piece.slots}
    lacking, surplus = sorted(wanted - tensors.keys()), sorted(tensors.keys() - wanted)
    found = "; ".join(
        f"{len(names)} {what}: {', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''}"
        for what, names in (("missing", lacking), ("that belong nowhere", surplus))
        if names
    )
    if found and not partial:
        do = "load the backbone that it was made for, with the same head, or leave them out with partial=True (--partial)"
        raise GraftError(f"{asked}: the tensors of the file", found, do)
    methods, by_site = [], []
    for piece in pieces:
        kept = _whole(piece, tensors)
        if kept:
            methods.append(StoredMethod(piece.method, tuple(site.key for site in kept.sites)))
            by_site.append(_taken(kept, tensors, asked))
    if not methods:
        raise GraftError(f"{asked}: the tensors of the file", found or "none", "no site of this backbone is left")
    return tuple(methods), tuple(by_site), (f"left out: {found}",) if found else ()


def _whole(piece: Piece, tensors: Mapping[str, Tensor]) -> Piece | None:
    """The piece without the sites that lack a tensor; None where nothing is left."""
    broken = {site for slot in piece.slots if slot.key not in tensors for site, _ in slot.places}
    if None in broken:
        return None
    left = tuple(slot for slot in piece.slots if not any(site in broken for site, _ in slot.places))
    kept = replace(piece, slots=left)
    return kept if len(kept.sites) > len(piece.bare) else None


def _taken(piece: Piece, tensors: Mapping[str, Tensor], asked: str) -> dict[str, dict[str, Tensor]]:
    out: dict[str, dict[str, Tensor]] = {site.key: {} for site in piece.sites}
    if piece.given:
        out[SHARED] = dict(piece.given)
    for slot in piece.slots:
        try:
            values = slot.here(tensors[slot.key])
        except (ValueError, RuntimeError, IndexError) as error:
            do = "the file was made by other hyper-parameters or for another backbone"
            raise GraftError(f"{asked}: the tensor {slot.key!r}", str(error), do) from error
        for (site, name), value in zip(slot.places, values, strict=True):
            out.setdefault(SHARED if site is None else site.key, {})[name] = value.contiguous()
    return out


Spot = tuple[str, str] | None  # (module path, parameter); None for what the sites share
Part = tuple[Method, dict[Spot, dict[str, Tensor]]]
Held = Sequence[tuple[Method, Mapping[Spot, Mapping[str, Tensor]]]]


def held(adapter: Adapter) -> list[Part]:
    """What an adapter stores: its folded methods, each with its tensors by spot. GraftError for what no file can hold."""
    out = []
    for part in adapter.parts:
        method, per_site, shared = part.method.fold(part)
        tensors: dict[Spot, dict[str, Tensor]] = {None: _checked(adapter, shared)} if shared else {}
        for site in part.sites:
            if site.rows is not None:
                found = f"{method} at {site.key}, a slice of a packed weight"
                raise GraftError(f"write {adapter.name!r} for another library", found, "graft the whole weight (qkv)")
            tensors[site.path, site.param] = _checked(adapter, per_site[site.key])
        out.append((method, tensors))
    return out


def _checked(adapter: Adapter, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: checked(adapter, name, value) for name, value in tensors.items()}


def spread(pieces: Sequence[Piece], parts: Held, asked: str) -> dict[str, Tensor]:
    """The tensors of a file from those of an adapter. GraftError where what would be read from it is not the same."""
    values = {(m.name, spot): tensors for m, by_spot in parts for spot, tensors in by_spot.items()}
    out = {}
    for piece in pieces:
        for slot in piece.slots:
            spots = [(None if s is None else (s.path, s.param), name) for s, name in slot.places]
            own = [values[piece.method.name, spot][name].detach().cpu() for spot, name in spots]
            try:
                out[slot.key] = slot.there(own).contiguous()
                again = slot.here(out[slot.key])
            except (ValueError, RuntimeError) as error:
                raise GraftError(f"{asked}: {slot.key!r}", str(error), "keep it in graftwork's own format") from error
            if not all(torch.equal(a, b) for a, b in zip(own, again, strict=True)):
                found = "the format shares among layers what differs among them here"
                raise GraftError(f"{asked}: {slot.key!r}", found, "keep it in graftwork's own format")
    return {key: value.clone() for key, value in out.items()}
