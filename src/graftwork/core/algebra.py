"""Expressions over adapters: what is active. `"de >> ner"` applies de, then ner. Every expression has a text form that parses back.

expr := term (">>" term)* ;  term := name | '"' any characters '"' | "(" expr ")" | "rows" "(" row ("," row)* ")"
row  := "none" | expr
A name is a word of letters, digits and ._/- ; any other name is written in double quotes, and so is one called none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import GraftError

WORD, NONE, ROWS = re.compile(r"[\w./-]+"), "none", "rows"


@dataclass(frozen=True)
class Expr:
    """Base of expressions."""

    def __rshift__(self, other: Expr | str) -> Expr:
        after = as_expr(other)
        if isinstance(self, Rows) or isinstance(after, Rows):
            return _row_by_row(self, after)
        return Stack((*_terms(self), *_terms(after)))

    def __rrshift__(self, other: str) -> Expr:
        return as_expr(other) >> self

    def names(self) -> tuple[str, ...]:
        """The adapters it names, in the order they are applied."""
        raise NotImplementedError


@dataclass(frozen=True)
class A(Expr):
    """One adapter by its name."""

    name: str

    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def __str__(self) -> str:
        return self.name if WORD.fullmatch(self.name) and self.name != NONE else json.dumps(self.name)


@dataclass(frozen=True)
class Stack(Expr):
    """Several adapters, one after the other at every site."""

    of: tuple[Expr, ...]

    def names(self) -> tuple[str, ...]:
        return tuple(name for e in self.of for name in e.names())

    def __str__(self) -> str:
        return " >> ".join(map(str, self.of))


@dataclass(frozen=True)
class Rows(Expr):
    """One expression per row of the batch, None for the bare backbone. Made by `rows`."""

    of: tuple[Expr | None, ...]

    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for e in self.of if e is not None for name in e.names()))

    def __str__(self) -> str:
        return f"{ROWS}({', '.join(NONE if e is None else str(e) for e in self.of)})"


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
    entries = tuple(None if e is None else _row(e) for e in of)
    if any(isinstance(e, Rows) for e in entries):
        raise GraftError("rows", "rows inside of rows", "give one list, with an entry for every row of the batch")
    return Rows(entries)


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


def as_expr(given: Expr | str) -> Expr:
    """An expression, or its text, as an expression."""
    if isinstance(given, Expr):
        return given
    if not isinstance(given, str):
        raise GraftError(
            "an expression over adapters", f"{given!r}", "give a name, a text such as 'de >> ner', or None"
        )
    return parse(given)


TOKEN = re.compile(
    r'\s*(?:(?P<arrow>>>)|(?P<open>\()|(?P<close>\))|(?P<comma>,)|(?P<quoted>"(?:[^"\\]|\\.)*")|(?P<name>[\w./-]+))'
)


def parse(text: str) -> Expr:
    """The expression of a text; a GraftError points at the character that does not fit."""
    tokens: list[tuple[str, str, int]] = []
    at = 0
    while text[at:].strip():
        found = TOKEN.match(text, at)
        if not found:
            raise _refusal(
                text, at + len(text[at:]) - len(text[at:].lstrip()), "a character that is no part of an expression"
            )
        kind = found.lastgroup or ""
        tokens.append((kind, found.group(kind), found.start(kind)))
        at = found.end()
    tokens.append(("end", "", len(text)))
    e, rest = _expr(text, tokens, 0)
    if tokens[rest][0] != "end":
        raise _refusal(text, tokens[rest][2], "expected >>")
    return e


def _expr(text: str, tokens: list[tuple[str, str, int]], i: int) -> tuple[Expr, int]:
    e, i = _term(text, tokens, i)
    while tokens[i][0] == "arrow":
        other, i = _term(text, tokens, i + 1)
        e = e >> other
    return e, i


def _term(text: str, tokens: list[tuple[str, str, int]], i: int) -> tuple[Expr, int]:
    kind, value, at = tokens[i]
    if kind == "name" and value == ROWS and tokens[i + 1][0] == "open":
        return _rows(text, tokens, i + 1)
    if kind == "name":
        return A(value), i + 1
    if kind == "quoted":
        return A(json.loads(value)), i + 1
    if kind == "open":
        e, i = _expr(text, tokens, i + 1)
        if tokens[i][0] != "close":
            raise _refusal(text, tokens[i][2], "expected )")
        return e, i + 1
    raise _refusal(text, at, "expected the name of an adapter")


def _rows(text: str, tokens: list[tuple[str, str, int]], i: int) -> tuple[Expr, int]:
    """What follows the word "rows", from its opening bracket on."""
    entries: list[Expr | None] = []
    while not entries or tokens[i][0] == "comma":
        i += 1
        if tokens[i][:2] == ("name", NONE) and tokens[i + 1][0] in ("comma", "close"):
            e: Expr | None = None
            i += 1
        else:
            at = tokens[i][2]
            e, i = _expr(text, tokens, i)
            if isinstance(e, Rows):
                raise _refusal(text, at, "rows inside of rows")
        entries.append(e)
    if tokens[i][0] != "close":
        raise _refusal(text, tokens[i][2], "expected , or )")
    return Rows(tuple(entries)), i + 1


def _refusal(text: str, at: int, found: str) -> GraftError:
    return GraftError(f"the expression\n    {text}\n    {' ' * at}^", found, "write it as in 'de >> ner'")
