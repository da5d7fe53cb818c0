"""Expressions in the place of names in an expression."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from .algebra import A, Expr, as_expr, rebuilt
from .mixing import Fuse, Route


def substitute(e: Expr, by: Mapping[str, Expr]) -> Expr:
    """e with by[name] in the place of each adapter `name`; GraftError where an expression has no place there."""

    def put(t: Expr) -> Expr:
        if isinstance(t, A):
            return by.get(t.name, t)
        if isinstance(t, Fuse | Route) and isinstance(new := by.get(t.by or ""), A):
            t = replace(t, by=new.name)
        return rebuilt(t, put)

    return as_expr(str(put(e)))  # read again: sums of sums and stacks of stacks are flat
