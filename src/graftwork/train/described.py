"""What adapter.json tells, for people. No backbone is loaded and no tensor is read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import GraftError
from ..store.hub import locate
from ..store.recipe import leading

FILE = "adapter.json"


@dataclass(frozen=True)
class Description:
    """parts: (method, sites by role, how many) for each method of the adapter; the rest are names and values."""

    name: str
    facts: dict[str, Any]
    parts: list[tuple[str, str, int]]
    scores: dict[str, Any]
    data: dict[str, Any]
    training: dict[str, Any]


def metadata_of(folder: str | Path) -> dict[str, Any]:
    """What adapter.json says; of a recipe, that of the adapter that speaks for it. GraftError where there is none, or it
    cannot be read."""
    path = leading(locate(folder).path) / FILE
    asked = f"the adapter {str(folder)!r}"
    if not path.is_file():
        do = "give the folder that graftwork train wrote, or graftwork import that of another library first"
        raise GraftError(asked, f"no {FILE} in it", do)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise GraftError(asked, f"{FILE} is damaged: {error}", "restore the file") from error
    if not isinstance(data, dict) or not isinstance(data.get("metadata"), dict):
        raise GraftError(asked, f"{FILE} is not that of an adapter", "give the folder that graftwork train wrote")
    return data


def describe(data: Mapping[str, Any], folder: str | Path) -> Description:
    """The description that adapter.json holds. GraftError where something is missing in it."""
    from ..core.method import from_json

    try:
        metadata, backbone = data["metadata"], data["backbone"]
        parts = []
        for entry in data["methods"]:
            roles = Counter(site.split(":")[1] for site in entry["sites"])
            parts.append((str(from_json(entry["method"])), ", ".join(roles), len(entry["sites"])))
        size = sum(f.stat().st_size for f in locate(folder).path.iterdir() if f.is_file())
        share = 100 * data["parameters"] / max(backbone["parameters"], 1)
        facts = {
            "backbone": metadata.get("backbone") or backbone["name"],
            "class": backbone["class"],
            "parameters": f"{data['parameters']:,} ({share:.3f}% of {backbone['parameters']:,})",
            "on disk": f"{size:,} bytes",
            "labels": ", ".join(data["labels"] or ()) or "none",
            "versions": ", ".join(f"{k} {v}" for k, v in data["versions"].items()),
        }
        task = metadata.get("task")
        if task:
            facts["task"] = task["task"]
            facts["columns"] = ", ".join(f"{k} = {v}" for k, v in task["columns"].items() if v)
    except GraftError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise GraftError(f"the adapter {str(folder)!r}", f"{FILE} is damaged: {error!r}", "restore the file") from error
    sections = {key: metadata.get(key) or {} for key in ("metrics", "data", "training")}
    return Description(str(data["name"]), facts, parts, sections["metrics"], sections["data"], sections["training"])
