"""README.md of a saved adapter: what a person wants to know before using it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core.adapter import Adapter

LOAD = "gw.load(model, folder)  # model: the backbone above; folder: where this file lies"


def card(adapter: Adapter, description: dict[str, Any]) -> str:
    """The model card, as Markdown."""
    backbone, metadata = description["backbone"], description["metadata"]
    of = backbone["name"] or backbone["class"]
    kind = f" ({backbone['class']})" if backbone["name"] else ""
    size = f"{backbone['parameters']:,}"
    percent = 100 * description["parameters"] / max(backbone["parameters"], 1)
    lines = [
        *_front(adapter, backbone["name"]),
        "",
        f"# {description['name']}",
        "",
        f"An adapter for {of}{kind}, made with graftwork: {description['parameters']:,} trained parameters, "
        f"{percent:.3f}% of the backbone's {size} (its heads and poolers not counted).",
        "",
        "| method | sites | parameters |",
        "| --- | --- | ---: |",
    ]
    for part in adapter.parts:
        roles = Counter((site.tower + " " if site.tower else "") + site.role for site in part.sites)
        where = ", ".join(f"{n} {role}" for role, n in roles.items())
        lines.append(f"| `{_cell(part.method)}` | {where} | {part.num_parameters:,} |")
    if adapter.labels:
        lines += ["", f"Labels: {', '.join(map(_cell, adapter.labels))}."]
    for key, value in metadata.items():
        lines += ["", f"## {key}", "", *_told(value)]
    lines += [
        "",
        "## Use",
        "",
        "```python",
        "import graftwork as gw",
        "",
        LOAD,
        "```",
        "",
        "Made with " + ", ".join(f"{name} {version}" for name, version in description["versions"].items()) + ".",
        "",
    ]
    return "\n".join(lines)


def of_recipe(expression: str, members: Sequence[tuple[Any, ...]]) -> str:
    """The card of an expression and its adapters. members: name, methods, parameters."""
    lines = ["---", "library_name: graftwork", "tags:", "- graftwork", "---", "", f"# {_cell(expression)}", ""]
    lines += ["Adapters that act together, kept with graftwork, each in its own folder.", ""]
    lines += ["| adapter | methods | parameters |", "| --- | --- | ---: |"]
    lines += [f"| {_cell(name)} | `{_cell(methods)}` | {size:,} |" for name, methods, size in members]
    return "\n".join([*lines, "", "## Use", "", "```python", "import graftwork as gw", "", LOAD, "```", ""])


def for_hub(text: str, address: str) -> str:
    """The card of an adapter that is loaded from this address."""
    return text.replace(LOAD, f"gw.load(model, {json.dumps(address)})  # model: the backbone above")


def _front(adapter: Adapter, backbone: str) -> list[str]:
    """What the hub reads of a card, as YAML. A backbone that is a folder of this machine has no page to link to."""
    named = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", backbone) and not Path(backbone).exists()
    about = ["base_model: " + json.dumps(backbone), "base_model_relation: adapter"] if named else []
    tags = dict.fromkeys(["graftwork", *(part.method.name for part in adapter.parts)])
    return ["---", "library_name: graftwork", *about, "tags:", *(f"- {tag}" for tag in tags), "---"]


def _told(value: Any) -> list[str]:
    if isinstance(value, dict) and value:
        return ["| | |", "| --- | --- |", *(f"| {_cell(k)} | {_cell(v)} |" for k, v in value.items())]
    return [_cell(value)]


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
