"""From an expression to the deltas that it makes active, each with its site, in the order in which they are applied.

Adapters of a stack follow one another. A sum becomes one delta for each place: at a weight, at an output, at the input of a norm, in
an attention (see `sums`). The weights of a place are added up before its output is edited.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from .adapter import Adapter, Part
from .algebra import A, Drop, Expr, Stack, linear
from .delta import Delta, WeightDelta
from .errors import GraftError
from .install import read_path
from .site import Site
from .sums import AttendSum, EnterSum, LowRankSum, OutputSum, Term, WeightSum, dropout
from .where import in_layers

Pieces = tuple[tuple[Site, Delta], ...]
ORDER = ("weight", "enter", "attend", "forward")


@dataclass(frozen=True)
class Move:
    """One step of an expression: what one method of one adapter does everywhere, or one sum.

    label: of the method, so that like ones of several rows are run together;  text: for messages;  parts: all that it is made of.
    """

    label: str
    text: str
    pieces: Pieces
    parts: tuple[Part, ...]


def compiled(e: Expr, adapters: Mapping[str, Adapter], modules: Mapping[str, nn.Module]) -> list[Move]:
    """The steps of an expression without rows. GraftError where a method has no sum, or a stack holds an adapter twice."""
    if isinstance(e, A):
        return [
            Move(
                part.method.name,
                f"{part.method.name} of {e.name!r}",
                tuple((site, part.deltas[site.key]) for site in part.sites),
                (part,),
            )
            for part in adapters[e.name].parts
        ]
    if isinstance(e, Stack):
        names = [name for t in e.of for name in t.names()]
        if len(set(names)) < len(names):
            raise GraftError(f"activate {e}", "an adapter stands in a stack twice", "name each adapter of a stack once")
        return [move for t in e.of for move in compiled(t, adapters, modules)]
    if isinstance(e, Drop):
        return _without(e, compiled(e.of, adapters, modules))
    terms = [(c, t, compiled(t, adapters, modules)) for c, t in linear(e)]
    if len(terms) == 1 and terms[0][0] == 1:
        return terms[0][2]
    return [_sum(e, terms, modules)] if terms else []


def deltas_of(moves: Iterable[Move]) -> list[tuple[Site, Delta]]:
    """All their deltas, in order."""
    return [piece for move in moves for piece in move.pieces]


def _without(e: Drop, moves: Sequence[Move]) -> list[Move]:
    gone = {id(site) for site in in_layers([site for site, _ in deltas_of(moves)], e.layers)}
    for move in moves:
        for site, delta in move.pieces:
            if id(site) in gone and delta.overrides("around"):
                found = f"{move.text} changes the whole pass of a module, and its sites belong together"
                raise GraftError(f"activate {e}", found, "drop layers of other methods")
    return [
        Move(move.label, move.text, tuple(p for p in move.pieces if id(p[0]) not in gone), move.parts) for move in moves
    ]


def _sum(e: Expr, terms: Sequence[tuple[float, Expr, list[Move]]], modules: Mapping[str, nn.Module]) -> Move:
    """One delta for each place where a term changes something."""
    places: dict[tuple[str, str], list[Term]] = {}
    for c, _, moves in terms:
        _check(e, moves)
        here: dict[tuple[str, str], list[tuple[Site, Delta]]] = {}
        for site, delta in deltas_of(moves):
            for place in _places(site, delta):
                here.setdefault(place, []).append((site, delta))
        for place, found in here.items():
            places.setdefault(place, []).append(Term(c, tuple(found)))
    out: list[tuple[Site, Delta]] = []
    for (kind, path), group in sorted(places.items(), key=lambda item: ORDER.index(item[0][0])):
        if len(group) == 1 and group[0].c == 1 and all(len(list(_places(*piece))) == 1 for piece in group[0].pieces):
            out += group[0].pieces
        elif kind == "weight":
            out += _weights(group, modules[path])
        elif kind == "enter":
            _once(e, group)
            out.append(_placed(group, EnterSum(group)))
        else:
            out.append(_placed(group, AttendSum(group) if kind == "attend" else OutputSum(group, read_path)))
    parts = dict.fromkeys(part for _, _, moves in terms for move in moves for part in move.parts)
    return Move("sum", f"the sum {e}", tuple(out), tuple(parts))


def _places(site: Site, delta: Delta) -> Iterator[tuple[str, str]]:
    """What a delta changes: (kind, path of the module)."""
    if isinstance(delta, WeightDelta) and delta.names():
        yield "weight", site.path
    if delta.overrides("enter"):
        yield "enter", read_path(site, delta)
    if delta.overrides("attend"):
        yield "attend", site.path
    if delta.overrides("forward"):
        yield "forward", site.path if site.exit is None else site.exit


def _check(e: Expr, moves: Iterable[Move]) -> None:
    """GraftError for a method whose change cannot be added to that of others."""
    for move in moves:
        for site, delta in move.pieces:
            if delta.overrides("around"):
                found = f"{move.text} at {site.key} changes the whole pass of a module, which has no sum"
                do = "stack it (a >> b), give each row its own adapter with rows(...), or activate it alone"
                raise GraftError(f"activate {e}", found, do)


def _once(e: Expr, group: Sequence[Term]) -> None:
    """GraftError where a delta that carries a value from a norm's input to the output is in two terms: it has one such value."""
    deltas = [delta for term in group for delta in term.deltas]
    if len(set(deltas)) < len(deltas):
        found = f"one adapter in two terms edits the input of a norm at {deltas[0].key}"
        raise GraftError(f"activate {e}", found, "name it once in a sum, or use position='residual'")


def _placed(group: Sequence[Term], delta: Delta) -> tuple[Site, Delta]:
    """A sum at the site of its first member."""
    site, first = group[0].pieces[0]
    delta.join(first.runtime)
    if isinstance(delta, WeightDelta):
        assert isinstance(first, WeightDelta)
        delta.place(site.key, first.view)
    else:
        delta.key = site.key
    return site, delta


def _weights(group: Sequence[Term], module: nn.Module) -> list[tuple[Site, Delta]]:
    """The sums at the weights of one module: one for each of its slices (q, k, v of a packed projection), if these are apart."""
    slices: dict[tuple[str, Span], list[Term]] = {}
    for term in group:
        for key in dict.fromkeys(map(_slice, term.deltas)):
            mine = tuple(piece for piece in term.pieces if _slice(piece[1]) == key)
            slices.setdefault(key, []).append(Term(term.c, mine))
    out = []
    for terms in slices.values() if _apart(slices) else [list(group)]:
        out += _one_weight(terms, module)
    return out


Span = tuple[int, int] | None  # rows of a dense weight, None for all


def _slice(delta: Delta) -> tuple[str, Span]:
    assert isinstance(delta, WeightDelta)
    return delta.view.name, delta.view.rows


def _apart(slices: Mapping[tuple[str, Span], Sequence[Term]]) -> bool:
    """Whether no parameter's row belongs to two of the slices."""
    spans: dict[str, list[Span]] = {}
    for (_, rows), terms in slices.items():
        deltas = [d for term in terms for d in term.deltas if isinstance(d, WeightDelta)]
        for name in {name for d in deltas for name in d.names()}:
            spans.setdefault(name, []).append(rows)
    return all(len(found) == 1 or _separate(found) for found in spans.values())


def _separate(spans: Sequence[Span]) -> bool:
    rows = sorted(span for span in spans if span is not None)
    return len(rows) == len(spans) and all(a[1] <= b[0] for a, b in pairwise(rows))


def _one_weight(terms: Sequence[Term], module: nn.Module) -> list[tuple[Site, Delta]]:
    """A sum at one weight: low-rank updates, which do not depend on the weight, as one behind all others."""
    ranks = [
        Term(term.c, (piece,))
        for term in terms
        if all(_additive(delta) and delta.overrides("factors") for delta in term.deltas)
        for piece in term.pieces
    ]
    if len({(dropout(d), _slice(d)) for term in ranks for d in term.deltas}) > 1:  # type: ignore[arg-type]
        ranks = []
    taken = {piece for term in ranks for piece in term.pieces}
    rest = [term for term in terms if not taken.issuperset(term.pieces)]
    out = []
    if rest:
        total = WeightSum(rest, module)
        out.append(_placed(rest, total))
        total.check()
    if ranks:
        out.append(_placed(ranks, LowRankSum([(term.c, term.deltas[0]) for term in ranks])))  # type: ignore[misc]
    return out


def _additive(delta: Delta) -> bool:
    return isinstance(delta, WeightDelta) and delta.additive
