"""Expressions in the place of names in an expression."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from .algebra import A, Expr, as_expr


def substitute(e: Expr, by: Mapping[str, Expr]) -> Expr:
    """e with by[name] in the place of each adapter `name`; GraftError where an expression has no place there."""
    return as_expr(str(_put(e, by)))  # read again: sums of sums and stacks of stacks are flat


def _put(value: Any, by: Mapping[str, Expr]) -> Any:
    if isinstance(value, A):
        return by.get(value.name, value)
    if isinstance(value, Expr):
        return replace(value, **{field.name: _put(getattr(value, field.name), by) for field in fields(value)})
    return tuple(_put(one, by) for one in value) if isinstance(value, tuple) else value
