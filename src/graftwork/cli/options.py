"""Command-line options made from the settings dataclasses: one option per field, typed, with its help, default and
choices."""

from __future__ import annotations

import argparse
import dataclasses
import types
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ..train.settings import flag

S = TypeVar("S")


def add_expression(parser: argparse.ArgumentParser) -> None:
    """The options that say which adapters are active."""
    text = (
        "one more adapter of the same backbone, which --adapter names or the adapter mixes; may be given several times"
    )
    parser.add_argument("--with", dest="more", action="append", default=[], metavar="FOLDER", help=text)
    text = "what is active, each adapter called as its folder: 'a >> b', '0.5*a + 0.5*b', 'drop(a, layers=\"0-4\")'"
    parser.add_argument("--adapter", dest="expression", metavar="EXPRESSION", help=text)


def add_options(parser: argparse.ArgumentParser, settings: type[Any], only: tuple[str, ...] = ()) -> None:
    """An option for each field of `settings` (or for some); a field that is itself a dataclass becomes a group of
    options."""
    hints = get_type_hints(settings)
    for field in dataclasses.fields(settings):
        if only and field.name not in only:
            continue
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            group: Any = parser.add_argument_group(field.metadata["help"])
            add_options(group, kind)  # type: ignore[arg-type]
        else:
            _add(parser, field, kind)


def _add(parser: Any, field: dataclasses.Field[Any], kind: Any) -> None:
    option = flag(field.name)
    required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    text = field.metadata["help"].replace("%", "%%")
    given: dict[str, Any] = {"dest": field.name, "help": text}
    base, default = _bare(kind), field.default
    if base is bool:
        parser.add_argument(option, action="store_true", default=default, **given)
        return
    if get_origin(base) is tuple:
        parser.add_argument(option, action="append", default=[], metavar=field.metadata["metavar"] or "VALUE", **given)
        return
    if get_origin(base) is Literal:
        given["choices"] = get_args(base)
    else:
        given |= {"type": base, "metavar": field.metadata["metavar"] or base.__name__.upper()}
    if not required and default is not None:
        given["help"] += f" (default: {default})".replace("%", "%%")
    parser.add_argument(option, required=required, default=None if required else default, **given)


def _bare(kind: Any) -> Any:
    """X for X | None."""
    if get_origin(kind) in (Union, types.UnionType):
        return next(k for k in get_args(kind) if k is not type(None))
    return kind


def read_options(settings: type[S], parsed: argparse.Namespace) -> S:
    """The settings that parsed options say."""
    hints = get_type_hints(settings)
    given: dict[str, Any] = {}
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            given[field.name] = read_options(kind, parsed)  # type: ignore[arg-type]
        elif hasattr(parsed, field.name):
            value = getattr(parsed, field.name)
            given[field.name] = tuple(value) if isinstance(value, list) else value
    return settings(**given)
