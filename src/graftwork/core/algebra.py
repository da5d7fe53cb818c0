"""Expressions over adapters: what is active. `"de >> ner"` applies de, then ner. Every expression has a text form that parses back.

expr := term (">>" term)* ;  term := name | '"' any characters '"' | "(" expr ")"
A name is a word of letters, digits and ._/- ; any other name is written in double quotes.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from .errors import GraftError


@dataclass(frozen=True)
class Expr:
    """Base of expressions."""

    def __rshift__(self, other: Expr | str) -> Expr:
        return Stack((*_terms(self), *_terms(as_expr(other))))

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
        return self.name if re.fullmatch(r"[\w./-]+", self.name) else json.dumps(self.name)


@dataclass(frozen=True)
class Stack(Expr):
    """Several adapters, one after the other at every site."""

    of: tuple[Expr, ...]

    def names(self) -> tuple[str, ...]:
        return tuple(name for e in self.of for name in e.names())

    def __str__(self) -> str:
        return " >> ".join(map(str, self.of))


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


TOKEN = re.compile(r'\s*(?:(?P<arrow>>>)|(?P<open>\()|(?P<close>\))|(?P<quoted>"(?:[^"\\]|\\.)*")|(?P<name>[\w./-]+))')


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


def _refusal(text: str, at: int, found: str) -> GraftError:
    return GraftError(f"the expression\n    {text}\n    {' ' * at}^", found, "write it as in 'de >> ner'")
