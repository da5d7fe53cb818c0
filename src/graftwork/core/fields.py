"""Hyper-parameters of a method: typed dataclass fields that check themselves.

Each helper returns a `dataclasses.field` whose metadata holds the check. `check` runs them all when a method is made, so that a
wrong type or range is one clear error, whether it comes from Python, the command line or a file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from .errors import GraftError

Check = Callable[[Any], str]  # the empty text, or what a good value looks like


def _field(default: Any, check: Check) -> Any:
    return dataclasses.field(default=default, metadata={"check": check})


def positive(default: int | None) -> Any:
    """A whole number >= 1 (or None where None is the default)."""
    return _field(default, lambda v: "" if _whole(v, 1) or (v is None and default is None) else "a whole number >= 1")


def rank(default: int) -> Any:
    """A whole number >= 1, the rank of a matrix at each site: one that is larger than the largest of them is refused (`gw.graft`)."""
    field = positive(default)
    return dataclasses.field(default=default, metadata={**field.metadata, "rank": True})


def count(default: int) -> Any:
    """A whole number >= 0."""
    return _field(default, lambda v: "" if _whole(v, 0) else "a whole number >= 0")


def by_depth(default: int) -> Any:
    """A whole number >= 1, or a tuple of them, from the lowest layers to the highest."""

    def check(v: Any) -> str:
        ok = _whole(v, 1) or (isinstance(v, tuple) and v and all(_whole(n, 1) for n in v))
        return "" if ok else "a whole number >= 1, or some of them, from the lowest layers to the highest"

    return _field(default, check)


def number(default: float | None, low: float = float("-inf"), high: float = float("inf")) -> Any:
    """A real number in [low, high] (or None where None is the default)."""

    def check(v: Any) -> str:
        ok = (v is None and default is None) or (_real(v) and low <= v <= high)
        return "" if ok else f"a number in [{low}, {high}]"

    return _field(default, check)


def fraction(default: float) -> Any:
    """A number in [0, 1)."""
    return _field(default, lambda v: "" if _real(v) and 0 <= v < 1 else "a number in [0, 1)")


def flag(default: bool) -> Any:
    """True or False."""
    return _field(default, lambda v: "" if isinstance(v, bool) else "True or False")


def choice(default: str | None, *options: str | None) -> Any:
    """One of a few words."""
    return _field(default, lambda v: "" if v in options else "one of " + ", ".join(map(repr, options)))


def text(default: str) -> Any:
    """Any text."""
    return _field(default, lambda v: "" if isinstance(v, str) else "a text")


def words(default: tuple[str, ...] = ()) -> Any:
    """A tuple of names; a text with commas is split."""
    return _field(default, lambda v: "" if isinstance(v, tuple) and all(isinstance(w, str) for w in v) else "names")


def shares(default: tuple[float, ...] = ()) -> Any:
    """A tuple of numbers >= 0, not all of them 0: what one is chosen by. Empty: all alike."""

    def check(v: Any) -> str:
        ok = isinstance(v, tuple) and all(_real(n) and 0 <= n < float("inf") for n in v) and (not v or any(v))
        return "" if ok else "numbers >= 0, one of them more"

    return _field(default, check)


def where(default: str) -> Any:
    """Sites: roles, "/regex/", or a callable (see `graftwork.sites.where`)."""

    def check(v: Any) -> str:
        return "" if (isinstance(v, str) and v.strip()) or callable(v) else "roles, '/regex/' or a callable"

    return dataclasses.field(default=default, kw_only=True, metadata={"check": check})


def inner(default: str, **options: Any) -> Any:
    """A method inside a combinator; `default` is the name of a registered method, with these options."""
    from .method import Method, get

    return dataclasses.field(
        default_factory=lambda: get(default)(**options),
        metadata={"check": lambda v: "" if isinstance(v, Method) else "a method, such as LoRA(r=4)"},
    )


def inners(default: str) -> Any:
    """Several methods inside a combinator; `default` is their text."""
    from .method import Method

    def make() -> tuple[Method, ...]:
        from .text import parse_methods

        return parse_methods(default)

    def check(v: Any) -> str:
        ok = isinstance(v, tuple) and v and all(isinstance(m, Method) for m in v)
        return "" if ok else "a list of methods, such as [LoRA(r=4), Bottleneck()]"

    return dataclasses.field(default_factory=make, metadata={"check": check})


def check(method: Any) -> None:
    """GraftError for the first hyper-parameter with a wrong type or range. JSON's lists become tuples, whole floats stay floats."""
    for f in dataclasses.fields(method):
        value = getattr(method, f.name)
        if isinstance(value, list):
            value = tuple(value)
            object.__setattr__(method, f.name, value)
        wanted = f.metadata["check"](value) if "check" in f.metadata else ""
        if wanted:
            raise GraftError(
                f"{type(method).__name__}({f.name}={value!r})",
                f"{value!r} ({type(value).__name__})",
                f"give {f.name} {wanted}",
            )


def ranks(method: Any) -> dict[str, int]:
    """Hyper-parameter -> value of those made by `rank`, also of the methods inside."""
    found: dict[str, int] = {}
    for f in dataclasses.fields(method):
        value = getattr(method, f.name)
        if dataclasses.is_dataclass(value):
            found |= ranks(value)
        elif f.metadata.get("rank"):
            found[f.name] = value
    return found


def _whole(v: Any, low: int) -> bool:
    return isinstance(v, int) and not isinstance(v, bool) and v >= low


def _real(v: Any) -> bool:
    return isinstance(v, int | float) and not isinstance(v, bool) and v == v
