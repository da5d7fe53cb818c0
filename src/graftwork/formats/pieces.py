"""The correspondence between an adapter and a foreign file: which tensor of the one is which key of the other.

It is stated once, and used in both directions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..core.adapter import Adapter
from ..core.errors import GraftError
from ..core.method import Method
from ..core.site import Site
from ..store.keys import SHARED
from ..store.read import StoredMethod

SHOWN = 20  # keys that an error lists of each kind
View = Callable[[Tensor], Tensor]


def same(t: Tensor) -> Tensor:
    """The tensor as it is."""
    return t


@dataclass(frozen=True)
class Slot:
    """One tensor: `key` in the file, `name` of the delta at `site` here (None: shared by the sites of the method).

    here, there: from the file's layout to the delta's, and back.
    """

    key: str
    site: Site | None
    name: str
    here: View = same
    there: View = same


def shaped(key: str, site: Site | None, name: str, here: tuple[int, ...], there: tuple[int, ...]) -> Slot:
    """A slot whose two layouts hold the same numbers in the same order, in these shapes."""

    def checked(t: Tensor) -> Tensor:
        if tuple(t.shape) != there:
            raise ValueError(f"its shape is {list(t.shape)}, expected {list(there)}")
        return t.reshape(here)

    return Slot(key, site, name, checked, lambda t: t.reshape(there))


@dataclass(frozen=True)
class Piece:
    """One method, and the tensors of all its sites."""

    method: Method
    slots: tuple[Slot, ...]

    @property
    def sites(self) -> list[Site]:
        """Each once, in order."""
        return list({slot.site.key: slot.site for slot in self.slots if slot.site is not None}.values())


def grouped(made: Iterable[tuple[Method, Sequence[Slot]]]) -> list[Piece]:
    """One piece for each different method, in the order of their first sites: an adapter whose ranks differ is several methods."""
    groups: dict[Method, list[Slot]] = {}
    for method, slots in made:
        groups.setdefault(method, []).extend(slots)
    return [Piece(_placed(method, slots), tuple(slots)) for method, slots in groups.items()]


def _placed(method: Method, slots: Sequence[Slot]) -> Method:
    """The method with `at` saying the roles of its sites."""
    roles = dict.fromkeys(slot.site.role for slot in slots if slot.site is not None)
    return dataclasses.replace(method, at=", ".join(roles))


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
    broken = {slot.site for slot in piece.slots if slot.key not in tensors}
    if None in broken:
        return None
    left = tuple(slot for slot in piece.slots if slot.site not in broken)
    return Piece(piece.method, left) if any(slot.site is not None for slot in left) else None


def _taken(piece: Piece, tensors: Mapping[str, Tensor], asked: str) -> dict[str, dict[str, Tensor]]:
    out: dict[str, dict[str, Tensor]] = {site.key: {} for site in piece.sites}
    for slot in piece.slots:
        place = out.setdefault(SHARED if slot.site is None else slot.site.key, {})
        try:
            place[slot.name] = slot.here(tensors[slot.key])
        except (ValueError, RuntimeError, IndexError) as error:
            do = "the file was made by other hyper-parameters or for another backbone"
            raise GraftError(f"{asked}: the tensor {slot.key!r}", str(error), do) from error
    return out


Held = dict[tuple[str, str], tuple[Method, dict[str, Tensor]]]


def held(adapter: Adapter) -> list[tuple[Method, dict[tuple[str, str] | None, dict[str, Tensor]]]]:
    """What an adapter stores: its folded methods, each with its tensors by (module path, parameter), None for shared ones."""
    out = []
    for part in adapter.parts:
        method, per_site, shared = part.method.fold(part)
        tensors: dict[tuple[str, str] | None, dict[str, Tensor]] = {None: shared} if shared else {}
        for site in part.sites:
            tensors[site.path, site.param] = per_site[site.key]
        out.append((method, tensors))
    return out
