"""Expressions over adapters: what is active. `"de >> ner"` applies de, then ner; `"0.7*a + 0.3*b"` adds up what a and b change.

Every expression has a text form (see `grammar`) that parses back: `parse(str(e)) == e`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from numbers import Real
from typing import Any, ClassVar

from ..core.errors import GraftError

WORD, NONE = re.compile(r"[\w./][\w./-]*"), "none"
LAYERS = re.compile(r"\s*-?\d+(\s*-\s*-?\d+)?\s*(,\s*-?\d+(\s*-\s*-?\d+)?\s*)*")


@dataclass(frozen=True)
class Expr:
    """Base of expressions.  binds: how strongly its text holds together (| 0, >> 1, + and - 2, one word or call 3)."""

    binds: ClassVar[int] = 3

    def __rshift__(self, other: Expr | str) -> Expr:
        after = as_expr(other)
        if isinstance(self, Rows) or isinstance(after, Rows):
            return _row_by_row(self, after)
        return Stack(tuple(whole("a stack", e) for e in (*_terms(self), *_terms(after))))

    def __or__(self, other: Expr | str) -> Expr:
        of = [branch for e in (self, as_expr(other)) for branch in (e.of if isinstance(e, Beside) else (e,))]
        return Beside(tuple(whole("|", e) for e in of))

    def __ror__(self, other: str) -> Expr:
        return as_expr(other) | self

    def __rrshift__(self, other: str) -> Expr:
        return as_expr(other) >> self

    def __add__(self, other: Expr | str) -> Expr:
        return add((1.0, self), (1.0, as_expr(other)))

    def __radd__(self, other: str) -> Expr:
        return as_expr(other) + self

    def __sub__(self, other: Expr | str) -> Expr:
        return add((1.0, self), (-1.0, as_expr(other)))

    def __rsub__(self, other: str) -> Expr:
        return as_expr(other) - self

    def __mul__(self, factor: float) -> Expr:
        if isinstance(factor, bool) or not isinstance(factor, Real) or not math.isfinite(factor):
            raise GraftError(f"{factor!r} times {self}", "no finite number", "write it as in 0.5 * gw.A('a')")
        return add((float(factor), self))

    __rmul__ = __mul__

    def __neg__(self) -> Expr:
        return add((-1.0, self))

    def names(self) -> tuple[str, ...]:
        """The adapters it names, each once, in the order in which they stand."""
        return tuple(dict.fromkeys(name for e in self.inner() for name in e.names()))

    def inner(self) -> tuple[Expr, ...]:
        """The expressions it is made of."""
        raise NotImplementedError


@dataclass(frozen=True)
class A(Expr):
    """One adapter by its name."""

    name: str

    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def inner(self) -> tuple[Expr, ...]:
        return ()

    def __str__(self) -> str:
        return self.name if WORD.fullmatch(self.name) and self.name != NONE else json.dumps(self.name)


@dataclass(frozen=True)
class Stack(Expr):
    """Several adapters, one after the other at every site."""

    of: tuple[Expr, ...]
    binds: ClassVar[int] = 1

    def inner(self) -> tuple[Expr, ...]:
        return self.of

    def __str__(self) -> str:
        return " >> ".join(map(_atom, self.of))


@dataclass(frozen=True)
class Sum(Expr):
    """The backbone and, at every site, c times what each adapter changes there. of: pairs (c, expression). Made by + - and *."""

    of: tuple[tuple[float, Expr], ...]
    binds: ClassVar[int] = 2

    def inner(self) -> tuple[Expr, ...]:
        return tuple(e for _, e in self.of)

    def __str__(self) -> str:
        text = ""
        for c, e in self.of:
            minus = math.copysign(1.0, c) < 0
            sign = (" - " if minus else " + ") if text else ("-" if minus else "")
            text += sign + ("" if abs(c) == 1 else f"{_number(abs(c))}*") + _atom(e)
        return text


@dataclass(frozen=True)
class Mean(Expr):
    """What the adapters change on average. Made by `mean`."""

    of: tuple[Expr, ...]

    def inner(self) -> tuple[Expr, ...]:
        return self.of

    def __str__(self) -> str:
        return f"mean({', '.join(map(str, self.of))})"


@dataclass(frozen=True)
class Drop(Expr):
    """An expression without what it does in some layers. Made by `drop`."""

    of: Expr
    layers: str

    def inner(self) -> tuple[Expr, ...]:
        return (self.of,)

    def __str__(self) -> str:
        return f"drop({self.of}, layers={json.dumps(self.layers)})"


@dataclass(frozen=True)
class Beside(Expr):
    """Several expressions over one batch: the model returns {text of an expression: its output}. Made by |."""

    of: tuple[Expr, ...]
    binds: ClassVar[int] = 0

    def inner(self) -> tuple[Expr, ...]:
        return self.of

    def __str__(self) -> str:
        return " | ".join(map(str, self.of))


@dataclass(frozen=True)
class Rows(Expr):
    """One expression per row of the batch, None for the bare backbone. Made by `rows`."""

    of: tuple[Expr | None, ...]

    def inner(self) -> tuple[Expr, ...]:
        return tuple(e for e in self.of if e is not None)

    def __str__(self) -> str:
        return f"rows({', '.join(NONE if e is None else str(e) for e in self.of)})"


def rows(of: Sequence[Expr | str | None]) -> Rows:
    """One adapter per row of a batch: entry i says what row i goes through, None is the bare backbone.

    of: names, expressions or their texts, as many as the batch has rows; they repeat freely.
        gw.using(model, gw.rows(["de", None, "de >> ner"]))
    A stack with rows works row by row: rows([a, None]) >> c is rows([a >> c, c]).
    """
    if isinstance(of, str | Expr) or not isinstance(of, Sequence):
        raise GraftError(f"rows({of!r})", "not a list", "give one name per row, gw.rows(['a', 'b', None])")
    if not of:
        raise GraftError("rows([])", "no row", "give one name per row of the batch, None for the bare backbone")
    return Rows(tuple(None if e is None else whole("rows", _row(e)) for e in of))


def mean(*of: Expr | str) -> Mean:
    """The mean of adapters: the backbone and 1/n of what each of the n changes, at every site. mean("a", "b") is 0.5*a + 0.5*b."""
    if not of:
        raise GraftError("mean()", "no adapter", "give at least one, gw.mean('a', 'b')")
    return Mean(tuple(whole("mean", as_expr(e)) for e in of))


def drop(of: Expr | str, layers: str) -> Drop:
    """An expression without its deltas in these layers (AdapterDrop, Rücklé et al. 2021); what stands in no layer (a head) stays.

    layers: "0-4" or "0-5,-1", counted in each tower from 0, negative numbers from its end.
    """
    if not isinstance(layers, str) or not LAYERS.fullmatch(layers):
        raise GraftError(f"drop(layers={layers!r})", "no layers", "write them as in layers='0-4,-1'")
    return Drop(whole("drop", as_expr(of)), layers)


def add(*terms: tuple[float, Expr]) -> Expr:
    """The sum of c times e over the terms (c, e); sums inside are taken apart."""
    flat: list[tuple[float, Expr]] = []
    for c, e in terms:
        flat += [(c * inner, t) for inner, t in e.of] if isinstance(e, Sum) else [(c, whole("a sum", e))]
    if any(not math.isfinite(c) for c, _ in flat):
        raise GraftError("a sum of adapters", "a factor that is no finite number", "give smaller factors")
    return flat[0][1] if len(flat) == 1 and flat[0][0] == 1 else Sum(tuple(flat))


def linear(e: Expr) -> list[tuple[float, Expr]]:
    """The factor of each different expression that e adds up, zeros left out: exact, so that a - a is nothing and mean(a, a) is a."""
    factors: dict[Expr, Fraction] = {}
    parts: Sequence[tuple[float | Fraction, Expr]] = ()
    if isinstance(e, Sum):
        parts = e.of
    elif isinstance(e, Mean):
        parts = [(Fraction(1, len(e.of)), t) for t in e.of]
    else:
        return [(1.0, e)]
    for c, t in parts:
        for inner, key in linear(t):
            factors[key] = factors.get(key, Fraction(0)) + Fraction(c) * Fraction(inner)
    return [(float(c), t) for t, c in factors.items() if c]


def rebuilt(e: Expr, change: Callable[[Expr], Expr]) -> Expr:
    """The same expression made of change(t) for each expression t that it is made of."""

    def again(value: Any) -> Any:
        if isinstance(value, Expr):
            return change(value)
        return tuple(map(again, value)) if isinstance(value, tuple) else value

    return replace(e, **{field.name: again(getattr(e, field.name)) for field in fields(e)})


def whole(word: str, e: Expr) -> Expr:
    """e, which is made neither of rows nor of branches: these stand outermost."""
    if isinstance(e, Rows):
        do = "write rows outermost, with one whole expression for each row: rows(0.5*a, a + b)"
        raise GraftError(f"{word} with {e}", f"rows inside of {word}", do)
    if isinstance(e, Beside):
        raise GraftError(f"{word} with {e}", f"branches inside of {word}", "write | outermost: a >> b | a >> c")
    return e


def _row(given: Expr | str) -> Expr:
    try:
        return as_expr(given)
    except GraftError:
        if not isinstance(given, str) or not given:
            raise
        return A(given)  # a name may hold characters that an expression's text would quote


def _row_by_row(first: Expr, then: Expr) -> Rows:
    """`first >> then` where one or both are rows."""
    n = len(first.of) if isinstance(first, Rows) else len(then.of)  # type: ignore[attr-defined]
    pairs = [e.of if isinstance(e, Rows) else (e,) * n for e in (first, then)]
    if len(pairs[0]) != len(pairs[1]):
        found = f"{len(pairs[0])} rows, then {len(pairs[1])}"
        raise GraftError(f"{first} >> {then}", found, "give both for the same batch")
    return Rows(tuple(b if a is None else a if b is None else a >> b for a, b in zip(*pairs, strict=True)))


def _terms(e: Expr) -> tuple[Expr, ...]:
    return e.of if isinstance(e, Stack) else (e,)


def _atom(e: Expr) -> str:
    return str(e) if e.binds == Expr.binds else f"({e})"


def _number(c: float) -> str:
    return repr(c).removesuffix(".0").replace("e+", "e")


def as_expr(given: Expr | str) -> Expr:
    """An expression, or its text, as an expression."""
    if isinstance(given, Expr):
        return given
    if not isinstance(given, str):
        do = "give a name, a text such as 'de >> ner', or None"
        raise GraftError("an expression over adapters", f"{given!r}", do)
    from .grammar import parse

    return parse(given)
