"""The text of expressions over adapters: one grammar, one parser; `str` of an expression is its printer.

expr   := stack ("|" stack)*
stack  := sum (">>" sum)*
sum    := term (("+" | "-") term)*
term   := "-" term | number "*" term | atom
atom   := name | "(" expr ")" | "mean" "(" expr ("," expr)* ")" | "drop" "(" expr "," "layers" "=" text ")"
          | "rows" "(" row ("," row)* ")" | "split" "(" expr "=" tokens ("," expr "=" tokens)* ")"
          | "fuse" "(" expr ("," expr)* ["," "by" "=" text] ")" | "route" "(" expr ("," expr)* "," "by" "=" text ")"
row    := "none" | expr
tokens := number of tokens, or -1 for all that are left;  text := a word, or any text in double quotes
A name is a word of letters, digits and ._/- that does not begin with - ; any other name is written in double quotes, and so is one
called none. Subtraction has a space around it: a - b, while a-b is a name. A number is a word in front of * .
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable
from typing import Any

from ..core.errors import GraftError
from .algebra import LAYERS, NONE, A, Drop, Expr, Mean, Rows, add, whole
from .mixing import fuse, route, split

TOKEN = re.compile(r'\s*(?:(?P<mark>>>|[(),*=+|-])|(?P<quoted>"(?:[^"\\]|\\.)*")|(?P<word>[\w./][\w./-]*))')
NUMBER = re.compile(r"(\d+\.?\d*|\.\d+)([eE]-?\d+)?")


def parse(text: str) -> Expr:
    """The expression of a text; a GraftError points at the character that does not fit."""
    return _Reader(text).whole()


class _Reader:
    """One pass over the tokens of a text; `at` is the next one."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        self.tokens: list[tuple[str, str, int]] = []  # kind, value, column
        self.calls: dict[str, Callable[[], Expr]] = {
            "mean": self.mean,
            "drop": self.drop,
            "rows": self.rows,
            "split": self.split,
            "fuse": lambda: self.mixture("fuse"),
            "route": lambda: self.mixture("route"),
        }
        end = 0
        while rest := text[end:].lstrip():
            found = TOKEN.match(text, end)
            if not found:
                raise self.refusal(len(text) - len(rest), "a character that is no part of an expression")
            kind = found.lastgroup or ""
            self.tokens.append((kind, found.group(kind), found.start(kind)))
            end = found.end()
        self.tokens.append(("end", "", len(text)))

    def whole(self) -> Expr:
        e = self.expr()
        if self.tokens[self.at][0] != "end":
            raise self.refusal(self.column, "expected |, >>, + or -")
        return e

    @property
    def column(self) -> int:
        return self.tokens[self.at][2]

    def sees(self, value: str, ahead: int = 0) -> bool:
        """Whether this mark is the next token, or the one after that."""
        at = min(self.at + ahead, len(self.tokens) - 1)
        return self.tokens[at][:2] == ("mark", value)

    def takes(self, value: str) -> bool:
        """Go past this mark, if it is the next token."""
        seen = self.sees(value)
        self.at += seen
        return seen

    def needs(self, value: str, instead: str = "") -> None:
        if not self.takes(value):
            raise self.refusal(self.column, f"expected {instead or value}")

    def expr(self) -> Expr:
        e, at = self.stack(), self.column
        while self.takes("|"):
            e = self.made(at, e.__or__, self.stack())
            at = self.column
        return e

    def stack(self) -> Expr:
        e, at = self.sum(), self.column
        while self.takes(">>"):
            e = self.made(at, e.__rshift__, self.sum())
            at = self.column
        return e

    def sum(self) -> Expr:
        e = self.term()
        while self.sees("+") or self.sees("-"):
            sign, at = 1.0 if self.sees("+") else -1.0, self.column
            self.at += 1
            e = self.made(at, add, (1.0, e), (sign, self.term()))
        return e

    def term(self) -> Expr:
        at, (kind, value, _) = self.column, self.tokens[self.at]
        if self.takes("-"):
            return self.made(at, add, (-1.0, self.term()))
        if kind == "word" and self.sees("*", 1):
            if not NUMBER.fullmatch(value) or not math.isfinite(float(value)):
                raise self.refusal(at, "expected a finite number in front of *")
            self.at += 2
            return self.made(at, add, (float(value), self.term()))
        return self.atom()

    def atom(self) -> Expr:
        at, (kind, value, _) = self.column, self.tokens[self.at]
        if self.takes("("):
            e = self.expr()
            self.needs(")")
            return e
        if kind not in ("word", "quoted"):
            raise self.refusal(at, "expected the name of an adapter")
        self.at += 1
        if kind == "quoted":
            return A(self.quoted(value, at))
        if not self.sees("("):
            return A(value)
        if value not in self.calls:
            raise self.refusal(at, f"no word {value!r}: there are {', '.join(f'{w}(...)' for w in self.calls)}")
        self.at += 1
        return self.calls[value]()

    def mean(self) -> Expr:
        of = [self.inside("mean")]
        while self.takes(","):
            of.append(self.inside("mean"))
        self.needs(")", ", or )")
        return Mean(tuple(of))

    def drop(self) -> Expr:
        of = self.inside("drop")
        self.needs(",", ', layers="0-4"')
        if self.tokens[self.at][:2] != ("word", "layers"):
            raise self.refusal(self.column, 'expected layers="0-4"')
        self.at += 1
        self.needs("=")
        at, (kind, value, _) = self.column, self.tokens[self.at]
        layers = self.quoted(value, at) if kind == "quoted" else ""
        if not LAYERS.fullmatch(layers):
            raise self.refusal(at, 'expected layers in quotes, such as "0-4,-1"')
        self.at += 1
        self.needs(")")
        return Drop(of, layers)

    def rows(self) -> Expr:
        of = [self.row()]
        while self.takes(","):
            of.append(self.row())
        self.needs(")", ", or )")
        return Rows(tuple(of))

    def row(self) -> Expr | None:
        if self.tokens[self.at][:2] == ("word", NONE) and (self.sees(",", 1) or self.sees(")", 1)):
            self.at += 1
            return None
        return self.inside("rows")

    def split(self) -> Expr:
        at, pairs = self.column, [self.range()]
        while self.takes(","):
            pairs.append(self.range())
        self.needs(")", ", or )")
        return self.made(at, split, *pairs)

    def range(self) -> tuple[Expr, int]:
        e = self.inside("split")
        self.needs("=", "=16, the number of tokens")
        sign = -1 if self.takes("-") else 1
        kind, value, at = self.tokens[self.at]
        if kind != "word" or not value.isdecimal():
            raise self.refusal(at, "expected a number of tokens, or -1 for all that are left")
        self.at += 1
        return e, sign * int(value)

    def mixture(self, word: str) -> Expr:
        at, of, by = self.column, [self.inside(word)], None
        while self.takes(","):
            if self.tokens[self.at][:2] == ("word", "by") and self.sees("=", 1):
                self.at += 2
                by = self.text_here("by=name")
                break
            of.append(self.inside(word))
        self.needs(")", ", or )")
        if word == "fuse":
            return self.made(at, functools.partial(fuse, by=by), *of)
        if by is None:
            raise self.refusal(self.column - 1, 'expected by=..., as in route(a, b, by="arrow")')
        return self.made(at, functools.partial(route, by=by), *of)

    def text_here(self, wanted: str) -> str:
        kind, value, at = self.tokens[self.at]
        if kind not in ("word", "quoted"):
            raise self.refusal(at, f"expected {wanted}")
        self.at += 1
        return self.quoted(value, at) if kind == "quoted" else value

    def inside(self, word: str) -> Expr:
        """An expression inside the brackets of `word`, where rows and branches have no place."""
        at = self.column
        e = self.expr()
        return self.made(at, whole, word, e)

    def quoted(self, value: str, at: int) -> str:
        try:
            return str(json.loads(value))
        except ValueError:
            raise self.refusal(at, "a text in quotes that is not JSON") from None

    def made(self, at: int, make: Callable[..., Expr], *of: Any) -> Expr:
        """make(*of), whose refusal points at its operator."""
        try:
            return make(*of)
        except GraftError as error:
            raise self.refusal(at, error.found) from None

    def refusal(self, at: int, found: str) -> GraftError:
        asked = f"the expression\n    {self.text}\n    {' ' * at}^"
        return GraftError(asked, found, "write it as in 'de >> ner' or '0.5*a + 0.5*b'")
