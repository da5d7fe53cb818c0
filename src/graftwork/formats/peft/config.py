"""adapter_config.json, read field by field: what nobody asked for and is not off is refused by name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ...core.body import Body
from ...core.errors import GraftError

# fields of every config that say nothing about what is computed
ABOUT = (
    "peft_type",
    "peft_version",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "task_type",
    "inference_mode",
)
OFF: tuple[Any, ...] = (None, False, {}, [], "", "none")
LARGEST, LONGEST = 2**53, 300
REPEATS = 4  # unbounded repeats in an expression of a file: each multiplies the time that a hostile one can take


class Config:
    """The fields of a PEFT config. Each is taken with its type and default; `finish` refuses what was not taken."""

    def __init__(self, data: dict[str, Any], asked: str) -> None:
        self.data, self.asked = data, asked
        self.warnings: list[str] = []
        self._taken = set(ABOUT)

    def take(self, name: str, kind: type | tuple[type, ...], default: Any) -> Any:
        """The field's value. GraftError for another type; null is the default."""
        self._taken.add(name)
        value = self.data.get(name)
        if value is None:
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join(k.__name__ for k in kinds)
            raise self.error(f"{name!r} is {value!r}", f"expected {wanted}: restore the file")
        return self.sane(name, value)

    def sane(self, name: str, value: Any) -> Any:
        """The value. GraftError for a number that is not finite, or a whole one beyond what a float can tell apart."""
        if isinstance(value, int | float) and not abs(value) <= LARGEST:  # the words for NaN and infinity too
            raise self.error(f"{name!r} is {value!r}", "no such number has a meaning here: restore the file")
        return value

    def names(self, name: str) -> list[str]:
        """A field that is a list of texts, or one text."""
        value = self.take(name, (list, str), [])
        listed = [value] if isinstance(value, str) else value
        if not all(isinstance(v, str) for v in listed):
            raise self.error(f"{name!r} is {value!r}", "expected names: restore the file")
        return listed

    def inert(self, *names: str) -> None:
        """Fields that change nothing in what a trained adapter computes."""
        self._taken.update(names)

    def finish(self) -> None:
        """GraftError for a field that nobody took, unless it is off."""
        for name, value in self.data.items():
            if name not in self._taken and value not in OFF:
                raise self.error(
                    f"{name} = {value!r}", "this option is not supported; the adapter would compute something else"
                )

    def error(self, found: str, do: str) -> GraftError:
        """The error that reading this config ends in."""
        short = found if len(found) <= LONGEST else f"{found[:LONGEST]} ..."
        return GraftError(f"{self.asked}: adapter_config.json", short, do)


def expression(text: str) -> re.Pattern[str] | None:
    """A regular expression of a file; None for one that is broken, or that could take for ever on some path."""
    try:
        plain = re.sub(r"\\.|\[[^\]]*\]", "x", text)
        if len(text) > 2000 or re.search(r"\)[*+{]", plain) or len(re.findall(r"[*+{]", plain)) > REPEATS:
            return None
        return re.compile(text)
    except (re.error, RecursionError, OverflowError):
        return None


def targets(config: Config, body: Body, kept: Sequence[str] = ()) -> set[str]:
    """Paths of the modules that target_modules, exclude_modules and layers_to_transform name.

    kept: of modules_to_save, which are never targets. As in PEFT, a list matches whole paths and their ends at a dot, a text
    is a regular expression on the whole path, and the first number between dots is the layer.
    """
    wanted = config.take("target_modules", (list, str), [])
    matches = _matcher(config, "target_modules", wanted)
    excluded = config.take("exclude_modules", (list, str), [])
    barred = _matcher(config, "exclude_modules", excluded)
    layers = config.take("layers_to_transform", (list, int), [])
    layers = [layers] if isinstance(layers, int) else layers
    patterns = [
        _compiled(config, "layers_pattern", rf"(?:^|.*?\.){p}\.(\d+)\.") for p in config.names("layers_pattern")
    ]
    patterns = patterns or [re.compile(r".*?\.[^.]*\.(\d+)\.")]
    found = set()
    for path in body.modules:
        if not matches(path) or barred(path) or any(_within(path, name) for name in kept):
            continue
        if layers and not isinstance(wanted, str) and path not in wanted:
            hit = next((m for p in patterns if (m := p.match(path))), None)
            if hit is None or int(hit[1]) not in layers:
                continue
        found.add(path)
    idle = (
        [one for one in wanted if not any(ends(path, one) for path in body.modules)] if isinstance(wanted, list) else []
    )
    if wanted and not found:
        name = type(body.modules[""]).__name__
        raise config.error(
            f"target_modules = {wanted!r} chooses no module of {name}", "load the backbone it was made for"
        )
    if idle:
        config.warnings.append(
            f"target_modules names {', '.join(map(repr, idle))}, which no module of the backbone is called"
        )
    return found


def _matcher(config: Config, name: str, given: list[Any] | str) -> Any:
    if isinstance(given, str):
        pattern = _compiled(config, name, given) if given else re.compile(r"(?!)")
        return lambda path: pattern.fullmatch(path) is not None
    if not all(isinstance(one, str) for one in given):
        raise config.error(f"{name!r} is {given!r}", "expected names: restore the file")
    return lambda path: any(ends(path, one) for one in given)


def _compiled(config: Config, name: str, text: str) -> re.Pattern[str]:
    pattern = expression(text)
    if pattern is None:
        found = f"{name}: the expression {text[:80]!r} is broken, or repeats what repeats"
        raise config.error(found, "list the modules instead")
    return pattern


def ends(path: str, name: str) -> bool:
    """Whether the path is `name`, or ends in it at a dot."""
    return path == name or path.endswith(f".{name}")


def _within(path: str, name: str) -> bool:
    """Whether the path is that of a module called `name`, or lies below one."""
    return f".{name}." in f".{path}."


def pattern(config: Config, name: str, path: str, default: Any) -> Any:
    """The value of rank_pattern or alpha_pattern for a path: of the first expression that matches its end."""
    for key, value in config.take(name, dict, {}).items():
        if _compiled(config, name, rf"(.*\.)?({key})$").match(path):
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise config.error(f"{name}[{key!r}] = {value!r}", "expected a number: restore the file")
            return config.sane(f"{name}[{key!r}]", value)
    return default
