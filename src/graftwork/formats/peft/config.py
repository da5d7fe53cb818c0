"""The fields of PEFT's adapter_config.json that say which modules an adapter has, and with which options."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ...sites.body import Body
from ..config import Config

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
REPEATS = 4  # unbounded repeats in an expression of a file: each multiplies the time that a hostile one can take


def config_of(data: dict[str, Any], asked: str) -> Config:
    """The fields of adapter_config.json, without those that say nothing about what is computed."""
    config = Config(data, asked)
    config.inert(*ABOUT)
    return config


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
