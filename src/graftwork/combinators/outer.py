"""What combinators share: a delta that holds other deltas hands them what it is given when it is attached."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from graftwork.core.delta import Delta
from graftwork.core.method import Method


class Outer:
    """Mixin of a delta around others: the runtime, the site's key and the view reach the inner ones too."""

    def inner(self) -> Iterable[Delta]:
        """The deltas inside."""
        raise NotImplementedError

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in ("runtime", "key", "view"):
            for delta in self.inner():
                setattr(delta, name, value)


def inherit(method: Method, of: Method) -> None:
    """Where a combinator names no sites, it sits where the method inside would."""
    if not method.at:
        object.__setattr__(method, "at", of.at)
        if method.layers is None:
            object.__setattr__(method, "layers", of.layers)
