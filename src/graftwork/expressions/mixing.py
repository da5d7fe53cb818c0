"""The words of the algebra that mix: at every place each adapter gives its own value, and something says how much of each is taken.

`fuse` and `route` take weights from a mixing method (an attention over the adapters, prototypes, a learned vector), `split` from where
a token stands. What a mixing method computes is in `mixer`, where it does so in `mixed`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..core.adapter import Adapter, Part
from ..core.errors import GraftError
from ..core.method import Method, flatten
from .algebra import A, Drop, Expr, as_expr, rebuilt, whole


@dataclass(frozen=True)
class Fuse(Expr):
    """Adapters, mixed by an adapter of a trained mixing method (AdapterFusion). Made by `fuse`.

    by: the name of that adapter; None is the one whose method was made for these.
    """

    of: tuple[Expr, ...]
    by: str | None = None

    def inner(self) -> tuple[Expr, ...]:
        return self.of if self.by is None else (*self.of, A(self.by))

    def __str__(self) -> str:
        return f"fuse({', '.join(map(str, self.of))}{'' if self.by is None else f', by={A(self.by)}'})"


@dataclass(frozen=True)
class Route(Expr):
    """Adapters, mixed as `by` says: the name of an adapter of a mixing method, or the text of one that trains nothing. Made by `route`."""

    of: tuple[Expr, ...]
    by: str

    def inner(self) -> tuple[Expr, ...]:
        return self.of

    def __str__(self) -> str:
        return f"route({', '.join(map(str, self.of))}, by={A(self.by)})"


@dataclass(frozen=True)
class Split(Expr):
    """Token ranges: pairs of an expression and its number of tokens, one after the other; -1 is all that are left. Made by `split`."""

    of: tuple[tuple[Expr, int], ...]

    def inner(self) -> tuple[Expr, ...]:
        return tuple(e for e, _ in self.of)

    def __str__(self) -> str:
        return f"split({', '.join(f'{e}={n}' for e, n in self.of)})"


def fuse(*of: Expr | str, by: str | None = None) -> Fuse:
    """Each of the adapters on the same input, mixed for every token by a trained attention over them.

    by: the name of the adapter that holds the attention, made by gw.graft(model, gw.Fusion(of=["a", "b"]), "f"); None finds the one
        that was made for these adapters.
    Their own task heads take no part: the head comes with the fusion, or from what is stacked behind.
    """
    return Fuse(_members("fuse", of), by)


def route(*of: Expr | str, by: str | Method) -> Route:
    """Each of the adapters on the same input, mixed as a router says.

    by: a mixing method that trains nothing, e.g. gw.Arrow(top_k=2) or its text "arrow(top_k=2)", or the name of an adapter of one that
        was trained.
    Their own task heads take no part: the head comes with the router's adapter, or from what is stacked behind.
    """
    by = str(by) if isinstance(by, Method) else by
    if not isinstance(by, str) or not by:
        raise GraftError(f"route(by={by!r})", "no router", "give a name or a method, route('a', 'b', by='arrow')")
    return Route(_members("route", of), by)


def split(*of: tuple[Expr | str, int], **named: int) -> Split:
    """Ranges of tokens: split(a=16, b=-1) sends the first 16 tokens of every row through a, and all others through b.

    of: pairs (expression, number of tokens), for names that are no words of Python;  named: the same by name, behind them.
    -1, for the last one only, is all that are left; where there is none, what is left has the bare backbone. Tokens are counted from
    the first that the padding mask does not hide.
    """
    pairs = [*of, *named.items()]
    if not pairs:
        raise GraftError("split()", "no adapter", "say how many tokens each gets, gw.split(a=16, b=-1)")
    for i, (e, n) in enumerate(pairs):
        if isinstance(n, bool) or not isinstance(n, int) or not (n > 0 or (n == -1 and i == len(pairs) - 1)):
            found = "-1 stands for all that are left, behind the others" if n == -1 else "not a number of tokens"
            raise GraftError(f"split({e}={n!r})", found, "write it as in gw.split(a=16, b=-1)")
    return Split(tuple((whole("split", as_expr(e)), n) for e, n in pairs))


def _members(word: str, of: tuple[Expr | str, ...]) -> tuple[Expr, ...]:
    if not of:
        raise GraftError(f"{word}()", "no adapter", f"give at least one, gw.{word}('a', 'b', ...)")
    members = tuple(whole(word, as_expr(e)) for e in of)
    known = [bare(e) for e in members]
    if len(set(known)) < len(known):
        twice = next(e for e in known if known.count(e) > 1)
        raise GraftError(f"{word}({', '.join(map(str, members))})", f"{twice} stands there twice", "name each once")
    return members


def mixing(adapter: Adapter) -> Part | None:
    """The part of an adapter that mixes others, or None."""
    return next((part for part in adapter.parts if part.method.mixes), None)


def made_for(method: Method) -> tuple[Expr, ...]:
    """The expressions that a mixing method was made for. GraftError where it says none."""
    of: tuple[str, ...] = method.of  # type: ignore[attr-defined]
    if not of:
        raise GraftError(f"{method}", "it mixes nothing", f"say what it mixes, {method.name}(of=['a', 'b'])")
    return _members(method.name, of)


def bare(e: Expr) -> Expr:
    """A member as the router knows it: layers that were dropped since do not count."""
    return bare(e.of) if isinstance(e, Drop) else e


def number(e: Fuse | Route, method: Method) -> tuple[int, ...]:
    """For each member of the expression, which of those the method was made for it is."""
    known = made_for(method)
    found = [bare(t) for t in e.of]
    for t in found:
        if t not in known:
            there = ", ".join(map(str, known))
            raise GraftError(f"activate {e}", f"{t} is none of those it mixes: {there}", "mix some of these")
    return tuple(known.index(t) for t in found)


def resolved(e: Expr, adapters: Mapping[str, Adapter]) -> Expr:
    """The expression with mixing adapters in their place: "f" becomes "fuse(a, b, by=f)", and so does fuse(a, b)."""
    if isinstance(e, A):
        part = mixing(adapters[e.name]) if e.name in adapters else None
        return e if part is None else resolved(Fuse(made_for(part.method), e.name), adapters)
    if isinstance(e, Fuse) and e.by is None:
        e = Fuse(e.of, _maker(e, adapters))
    if isinstance(e, Fuse) or (isinstance(e, Route) and e.by in adapters):
        _check_mixing(e, adapters)
    return rebuilt(e, lambda t: resolved(t, adapters))


def _maker(e: Fuse, adapters: Mapping[str, Adapter]) -> str:
    """The name of the adapter that was made to fuse these."""
    wanted = {bare(t) for t in e.of}
    parts = {name: part for name, a in adapters.items() if (part := mixing(a)) is not None}
    fit = [name for name, part in parts.items() if set(made_for(part.method)) == wanted]
    if len(fit) == 1:
        return fit[0]
    found = f"{len(fit)} adapters were made for it: {', '.join(fit)}" if fit else "no adapter was made for it"
    graft = f"gw.graft(model, gw.Fusion(of={[str(bare(t)) for t in e.of]}), 'name')"
    raise GraftError(f"activate {e}", found, "say which: fuse(..., by=name)" if fit else f"{graft}, and train it")


def _check_mixing(e: Fuse | Route, adapters: Mapping[str, Adapter]) -> None:
    assert e.by is not None
    if e.by not in adapters or mixing(adapters[e.by]) is None:
        kind = "not an adapter of a mixing method" if e.by in adapters else "no adapter of that name"
        raise GraftError(f"activate {e}", f"{e.by!r} is {kind}", "give the name of one, such as gw.Fusion")


def parts_of(e: Expr) -> Iterator[Expr]:
    """An expression and all that it is made of."""
    yield e
    for t in _children(e):
        yield from parts_of(t)


def _children(e: Expr) -> list[Expr]:
    """The expressions inside, without the adapter that mixes."""
    return [*e.of] if isinstance(e, Fuse) else [*e.inner()]


def router(e: Route | Fuse, adapters: Mapping[str, Adapter]) -> tuple[Method, Part | None]:
    """The mixing method of an expression, and the part of the adapter that holds its deltas, where one does."""
    part = mixing(adapters[e.by]) if e.by is not None and e.by in adapters else None
    if part is not None:
        return part.method, part
    assert e.by is not None
    try:
        found = flatten(e.by)
    except GraftError as error:
        asked = f"activate {e}"
        raise GraftError(asked, f"by={json.dumps(e.by)}: {error.found}", "name an adapter or a mixing method") from None
    if len(found) != 1 or not found[0].mixes or found[0].trains:
        what = "trains what it mixes by" if len(found) == 1 and found[0].mixes else "mixes nothing"
        do = "graft it, and give the adapter's name" if "trains" in what else "choose a mixing method, such as arrow"
        raise GraftError(f"activate {e}", f"{e.by} {what}", do)
    return found[0], None


def held(e: Expr | None, adapters: Mapping[str, Adapter]) -> set[str]:
    """The adapters that take no gradients because something mixes them that leaves them as they are."""
    if e is None:
        return set()
    out = {name for t in _children(e) for name in held(t, adapters)}
    if isinstance(e, Fuse | Route) and not router(e, adapters)[0].joint:  # type: ignore[attr-defined]
        out |= {name for t in e.of for name in t.names()}
    return out


def mixed_names(e: Expr | None) -> set[str]:
    """The adapters whose own heads take no part."""
    if e is None:
        return set()
    inner = _children(e)
    own = {name for t in inner for name in t.names()} if isinstance(e, Fuse | Route | Split) else set()
    return own.union(*(mixed_names(t) for t in inner))
