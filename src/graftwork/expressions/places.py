"""Places: what the deltas of an expression change, at which module, and which terms of a sum or members of a mixture meet there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from ..core.adapter import Part
from ..core.delta import Delta, WeightDelta
from ..core.errors import GraftError
from ..core.plan import read_path
from ..core.site import Site
from .algebra import Expr
from .mixed import MixedWeight
from .sums import Term

Pieces = tuple[tuple[Site, Delta], ...]
ORDER = ("weight", "enter", "amend", "attend", "forward")
Place = tuple[str, str]  # what is changed there, and the path of the module


@dataclass(frozen=True)
class Move:
    """One step of an expression: what one method of one adapter does everywhere, or one sum.

    label: of the method, so that like ones of several rows are run together;  text: for messages;  parts: all that it is made of;
    headless: the adapters whose own heads take no part.
    """

    label: str
    text: str
    pieces: Pieces
    parts: tuple[Part, ...]
    headless: tuple[str, ...] = field(default=())


def deltas_of(moves: Iterable[Move]) -> list[tuple[Site, Delta]]:
    """All their deltas, in order."""
    return [piece for move in moves for piece in move.pieces]


def by_place(e: Expr, terms: Iterable[tuple[float, Iterable[Move]]]) -> list[tuple[Place, list[Term]]]:
    """What each of the terms (c, its moves) does at each place, in the order in which places are adapted."""
    places: dict[Place, list[Term]] = {}
    for c, moves in terms:
        check(e, moves)
        here: dict[Place, list[tuple[Site, Delta]]] = {}
        for site, delta in deltas_of(moves):
            for place in places_at(site, delta):
                here.setdefault(place, []).append((site, delta))
        for place, found in here.items():
            places.setdefault(place, []).append(Term(c, tuple(found)))
    return sorted(places.items(), key=lambda item: ORDER.index(item[0][0]))


def places_at(site: Site, delta: Delta) -> Iterator[Place]:
    """What a delta changes: (kind, path of the module)."""
    if delta.overrides("product") or (isinstance(delta, WeightDelta) and delta.names()):
        yield "weight", site.path
    if delta.overrides("enter"):
        yield "enter", read_path(site, delta)
    if delta.overrides("amend"):
        yield "amend", site.path
    if delta.overrides("attend"):
        yield "attend", site.path
    if delta.overrides("forward"):
        yield "forward", site.path if site.exit is None else site.exit


def check(e: Expr, moves: Iterable[Move]) -> None:
    """GraftError for a method whose change cannot be added to that of others."""
    for move in moves:
        for site, delta in move.pieces:
            if delta.overrides("around"):
                found = f"{move.text} at {site.key} changes the whole pass of a module, which has no sum"
                do = "stack it (a >> b), give each row its own adapter with rows(...), or activate it alone"
                raise GraftError(f"activate {e}", found, do)


def placed(group: Sequence[Term], delta: Delta) -> tuple[Site, Delta]:
    """A sum at the site of its first member."""
    site, first = group[0].pieces[0]
    delta.join(first.runtime)  # those inside are placed and joined where they stand
    if isinstance(delta, WeightDelta):
        assert isinstance(first, WeightDelta)
        delta.place(site.key, first.view)
    else:
        delta.key = site.key
    return site, delta


def sliced(group: Sequence[Term]) -> list[list[Term]]:
    """The terms at each slice of a weight, or all together where slices overlap."""
    slices: dict[tuple[str, Span], list[Term]] = {}
    for term in group:
        for key in dict.fromkeys(map(slice_of, term.deltas)):
            mine = tuple(piece for piece in term.pieces if slice_of(piece[1]) == key)
            slices.setdefault(key, []).append(Term(term.c, mine))
    return list(slices.values()) if _apart(slices) else [list(group)]


Span = tuple[int, int] | None  # rows of a dense weight, None for all


def slice_of(delta: Delta) -> tuple[str, Span]:
    """The parameter and the rows of it that a delta changes."""
    if isinstance(delta, MixedWeight):
        return delta.changed[0], delta.rows
    assert isinstance(delta, WeightDelta)
    return delta.view.name, delta.view.rows


def _apart(slices: Mapping[tuple[str, Span], Sequence[Term]]) -> bool:
    """Whether no parameter's row belongs to two of the slices."""
    spans: dict[str, list[Span]] = {}
    for (_, rows), terms in slices.items():
        for name in {name for term in terms for d in term.deltas for name in d.names()}:  # type: ignore[operator]
            spans.setdefault(name, []).append(rows)
    return all(len(found) == 1 or _separate(found) for found in spans.values())


def _separate(spans: Sequence[Span]) -> bool:
    rows = sorted(span for span in spans if span is not None)
    return len(rows) == len(spans) and all(a[1] <= b[0] for a, b in pairwise(rows))
