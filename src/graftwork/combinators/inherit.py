"""Where a combinator sits when nothing is said."""

from __future__ import annotations

from graftwork.core.method import Method


def inherit(method: Method, of: Method) -> None:
    """Where a combinator names no sites, it sits where the method inside would."""
    if not method.at:
        object.__setattr__(method, "at", of.at)
        if method.layers is None:
            object.__setattr__(method, "layers", of.layers)
