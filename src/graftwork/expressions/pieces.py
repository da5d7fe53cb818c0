"""From an expression to the deltas that it makes active, each with its site, in the order in which they are applied.

Adapters of a stack follow one another. A sum becomes one delta for each place: at a weight, at an output, at the input of a norm, in
an attention (see `sums`). The weights of a place are added up before its output is edited. A mixture becomes one delta for each place,
too (see `mixed`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from torch import nn

from ..core.adapter import Adapter, Part
from ..core.delta import Delta, WeightDelta
from ..core.errors import GraftError
from ..core.method import Method
from ..core.mixer import Mixer
from ..core.plan import read_path, whole
from ..core.site import Site
from ..core.weight import NO_WEIGHT
from ..sites.where import in_layers
from .algebra import A, Drop, Expr, Stack, linear
from .mixed import MixedAttend, MixedEdit, MixedOutput, MixedWeight
from .mixers import Fixed, Ranges
from .mixing import Fuse, Route, Split, made_for, number, router
from .places import Move, Place, by_place, deltas_of, placed, places_at, slice_of, sliced
from .sums import AttendSum, EditSum, EnterSum, LowRankSum, OutputSum, Term, WeightSum

HEAD = "head"


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
    if isinstance(e, Fuse | Route | Split):
        return _mix(e, adapters, modules)
    terms = [(c, t, compiled(t, adapters, modules)) for c, t in linear(e)]
    if len(terms) == 1 and terms[0][0] == 1:
        return terms[0][2]
    return [_sum(e, terms, modules)] if terms else []


def _without(e: Drop, moves: Sequence[Move]) -> list[Move]:
    gone = {id(site) for site in in_layers([site for site, _ in deltas_of(moves)], e.layers)}
    for move in moves:
        for site, delta in move.pieces:
            if id(site) in gone and delta.overrides("around"):
                found = f"{move.text} changes the whole pass of a module, and its sites belong together"
                raise GraftError(f"activate {e}", found, "drop layers of other methods")
    return [replace(move, pieces=tuple(p for p in move.pieces if id(p[0]) not in gone)) for move in moves]


def _sum(e: Expr, terms: Sequence[tuple[float, Expr, list[Move]]], modules: Mapping[str, nn.Module]) -> Move:
    """One delta for each place where a term changes something."""
    out: list[tuple[Site, Delta]] = []
    for (kind, path), group in by_place(e, [(c, moves) for c, _, moves in terms]):
        if len(group) == 1 and group[0].c == 1 and all(len(list(places_at(*piece))) == 1 for piece in group[0].pieces):
            out += group[0].pieces
        elif kind == "weight":
            out += _weights(group, modules[path])
        elif kind == "enter":
            _once(e, group)
            out.append(placed(group, EnterSum(group)))
        elif kind == "amend":
            out.append(placed(group, EditSum(group)))
        else:
            out.append(placed(group, AttendSum(group) if kind == "attend" else OutputSum(group, read_path)))
    moves = [move for _, _, moves in terms for move in moves]
    parts = dict.fromkeys(part for move in moves for part in move.parts)
    headless = tuple(name for move in moves for name in move.headless)
    return Move("sum", f"the sum {e}", tuple(out), tuple(parts), headless)


def _mix(e: Fuse | Route | Split, adapters: Mapping[str, Adapter], modules: Mapping[str, nn.Module]) -> list[Move]:
    """One delta for each place where a member changes something, and then what else the adapter of the mixer does."""
    members = e.inner() if isinstance(e, Split) else e.of
    terms = [compiled(t, adapters, modules) for t in members]
    parts = dict.fromkeys(part for moves in terms for move in moves for part in move.parts)
    rest: list[Move] = []
    own: frozenset[str] = frozenset()
    if isinstance(e, Split):
        who, part = tuple(range(len(members))), None
        make: Callable[[Site], Mixer] = lambda site: Ranges([n for _, n in e.of], site.tower)  # noqa: E731
    else:
        method, part = router(e, adapters)
        who = tuple(range(len(members))) if part is None else number(e, method)
        alone = Part(method, (), next(iter(parts)).anatomy)
        make = lambda site: method.build(site, alone)  # type: ignore[assignment, return-value]  # noqa: E731
        if part is not None:
            assert e.by is not None
            rest = [move for move in compiled(A(e.by), adapters, modules) if part not in move.parts]
            own = frozenset(site.key for p in adapters[e.by].parts if p.method.replaces for site in p.sites)
            parts[part] = None
    out: list[tuple[Site, Delta]] = []
    for (kind, path), group in mixed_places(e, list(zip(who, terms, strict=True)), modules, own):
        site = group[0].pieces[0][0]
        if part is None:
            mixer = make(site)
            mixer.join(group[0].deltas[0].runtime)
            mixer.place(site.key, site.weight if kind == "weight" else NO_WEIGHT)
        else:
            keys = [s.key for term in group for s, _ in term.pieces if s.key in part.deltas]
            if not keys:
                continue  # the fusion was not made for this layer: its members do nothing there
            mixer = part.deltas[keys[0]]  # type: ignore[assignment]
        if kind == "weight":
            made: Delta = MixedWeight(group, modules[path], mixer)
        elif kind == "amend":
            made = MixedEdit(group, mixer)
        else:
            made = MixedAttend(group, mixer) if kind == "attend" else MixedOutput(group, read_path, mixer)
        out.append(placed(group, made))
        mixer.check(made.of)  # type: ignore[arg-type]
    names = dict.fromkeys(name for t in members for name in t.names())
    headless = tuple(n for n in names if any(s.role == HEAD for s in adapters[n].sites))
    return [Move("mixture", f"the mixture {e}", tuple(out), tuple(parts), headless), *rest]


def mixed_places(
    e: Expr,
    terms: Sequence[tuple[int, Sequence[Move]]],
    modules: Mapping[str, nn.Module],
    own: Collection[str] = (),
) -> list[tuple[Place, list[Term]]]:
    """The places where members (number, moves) are mixed; slices of one weight are each their own.

    own: sites whose values come with the mixture itself (a new pooler). These and heads are not mixed.
    """
    out: list[tuple[Place, list[Term]]] = []
    kinds: dict[str, str] = {}
    for (kind, path), group in by_place(e, terms):
        kept = [Term(t.c, tuple(p for p in t.pieces if p[0].role != HEAD and p[0].key not in own)) for t in group]
        group = [term for term in kept if term.pieces]
        if not group:
            continue
        site = group[0].pieces[0][0]
        if kind == "enter" or any(len(list(places_at(*piece))) > 1 for term in group for piece in term.pieces):
            found = f"an adapter edits an input and an output at {site.key} that belong together"
            raise GraftError(f"activate {e}", found, "mix adapters of other positions, such as 'residual' or 'after'")
        if kind == "weight" and not whole(modules[path], site):
            found = f"a weight inside {type(modules[path]).__name__} at {site.key}, which has no output of its own"
            raise GraftError(f"activate {e}", found, "mix adapters of modules that are called")
        if kinds.setdefault(site.key, kind) != kind:
            found = f"an edit of a weight and one of the output, both at {site.key}"
            raise GraftError(f"activate {e}", found, "mix adapters that act at different sites")
        out += [((kind, path), terms) for terms in (sliced(group) if kind == "weight" else [group])]
    return out


def mixed_sites(
    method: Method, adapters: Mapping[str, Adapter], modules: Mapping[str, nn.Module], own: Collection[str] = ()
) -> list[Site]:
    """Where a mixing method has its deltas: a site for each place that one of its members changes, but for those in `own`."""
    members = made_for(method)
    terms = [(i, compiled(t, adapters, modules)) for i, t in enumerate(members)]
    found = [group[0].pieces[0][0] for _, group in mixed_places(members[0], terms, modules, own)]
    return list({site.key: site for site in found}.values())


def _once(e: Expr, group: Sequence[Term]) -> None:
    """GraftError where a delta that carries a value from a norm's input to the output is in two terms: it has one such value."""
    deltas = [delta for term in group for delta in term.deltas]
    if len(set(deltas)) < len(deltas):
        found = f"one adapter in two terms edits the input of a norm at {deltas[0].key}"
        raise GraftError(f"activate {e}", found, "name it once in a sum, or use position='residual'")


def _weights(group: Sequence[Term], module: nn.Module) -> list[tuple[Site, Delta]]:
    """The sums at the weights of one module: one for each of its slices (q, k, v of a packed projection), if these are apart."""
    return [piece for terms in sliced(group) for piece in _one_weight(terms, module)]


def _one_weight(terms: Sequence[Term], module: nn.Module) -> list[tuple[Site, Delta]]:
    """A sum at one weight: low-rank updates, which do not depend on the weight, as one behind all others."""
    if any(delta.overrides("product") for term in terms for delta in term.deltas):
        mixer = Fixed([term.c for term in terms])
        mixer.join(terms[0].deltas[0].runtime)
        return [placed(terms, MixedWeight([replace(t, c=i) for i, t in enumerate(terms)], module, mixer))]
    ranks = [
        Term(term.c, (piece,))
        for term in terms
        if all(_additive(delta) and delta.overrides("factors") for delta in term.deltas)
        for piece in term.pieces
    ]
    if len({(d.dropout, slice_of(d)) for term in ranks for d in term.deltas}) > 1:  # type: ignore[arg-type]
        ranks = []
    taken = {piece for term in ranks for piece in term.pieces}
    rest = [term for term in terms if not taken.issuperset(term.pieces)]
    out = []
    if rest:
        total = WeightSum(rest, module)
        out.append(placed(rest, total))
        total.check()
    if ranks:
        out.append(placed(ranks, LowRankSum([(term.c, term.deltas[0]) for term in ranks])))  # type: ignore[misc]
    return out


def _additive(delta: Delta) -> bool:
    return isinstance(delta, WeightDelta) and delta.additive


def check_heads(e: Expr | None, moves: Sequence[Move]) -> None:
    """GraftError where adapters with heads of their own are mixed, which leaves these out, and no other head is there."""
    headless = [name for move in moves for name in move.headless]
    if headless and not any(site.role == HEAD for site, _ in deltas_of(moves)):
        found = f"{headless[0]!r} has a task head of its own, and heads are not mixed"
        do = "train a head with the mixture (gw.graft adds it to a gw.Fusion), or stack an adapter with a head behind: ... >> name"
        raise GraftError(f"activate {e}", found, do)
