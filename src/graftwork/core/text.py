"""The text form of methods: `lora(r=8) + bottleneck(reduction=16)`. `parse_methods(str(m))` gives m back.

The grammar is a small part of Python's (calls with keyword arguments, literals, +), read with `ast` and never evaluated.
"""

from __future__ import annotations

import ast
import re
from typing import Any

from .errors import GraftError
from .method import Method, flatten, get

# a method's name as papers write it: llama-adapter(...)
HYPHENATED = re.compile(r"(?<![\w'\"-])[A-Za-z]\w*(?:-[A-Za-z]\w*)+(?=\s*(?:[(+]|$))")


def parse_methods(text: str) -> tuple[Method, ...]:
    """The methods that a text names, e.g. "lora(r=8)", "prefix(length=30) + parallel(d=512)", "mixture(of=lora(r=4))"."""
    try:
        tree = ast.parse(HYPHENATED.sub(lambda m: m[0].replace("-", "_"), text.strip()), mode="eval").body
    except SyntaxError as error:
        raise _refusal(text, (error.offset or 1) - 1, "not a method") from None
    return flatten(_terms(tree, text))


def _terms(node: ast.expr, text: str) -> list[Any]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [*_terms(node.left, text), *_terms(node.right, text)]
    return [_call(node, text)]


def _call(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Name):
        return get(node.id)()
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        raise _refusal(text, node.col_offset, "expected name(option=value, ...)")
    if node.args:
        raise _refusal(text, node.args[0].col_offset, "options have names: option=value")
    given = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise _refusal(text, keyword.value.col_offset, "expected option=value")
        given[keyword.arg] = _value(keyword.value, text)
    return get(node.func.id)(**given)


def _value(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Call):
        return _call(node, text)
    if isinstance(node, ast.List) and any(isinstance(n, ast.Call) for n in node.elts):
        return [_value(n, text) for n in node.elts]
    try:
        return ast.literal_eval(node)
    except ValueError:
        if isinstance(node, ast.Name):
            # a bare word is a method without options inside a combinator, and a text everywhere else
            from .method import PRESETS, REGISTRY

            return get(node.id)() if node.id in REGISTRY or node.id in PRESETS else node.id
        raise _refusal(text, node.col_offset, "expected a number, a text, True, False, None or a method") from None


def _refusal(text: str, column: int, found: str) -> GraftError:
    return GraftError(
        f"the method text\n    {text}\n    {' ' * max(column, 0)}^",
        found,
        "write it as in 'lora(r=8) + prefix(length=30)'",
    )
