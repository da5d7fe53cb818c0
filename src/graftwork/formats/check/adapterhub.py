"""What AdapterHub's files say, and what the adapters library leaves out of them: it logs that at a level that nobody sees.

It builds the modules that the config names, and then asks each for the tensors under its own path and the adapter's name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import OFF
from ..files import read_json
from .report import Said, tell

CONFIG, SAFE, TORCH = "adapter_config.json", "adapter.safetensors", "pytorch_adapter.bin"
HEAD, HEADS = "head_config.json", ("model_head.safetensors", "pytorch_model_head.bin")
FILES = ((SAFE, TORCH), HEADS)
# the lists of modules that hold each kind of adapter; what all layers share, and heads, belong to every kind
LISTS = {
    "bottleneck": ("adapters", "invertible_adapters"),
    "lora": ("loras",),
    "prefix_tuning": ("prefix_tunings", "prefix_gates"),
    "reft": ("refts",),
    "prompt_tuning": ("prompt_tunings",),
}
ALWAYS = ("shared_parameters", "heads")


def said(folder: Path, tensors: Mapping[str, Tensor]) -> Said:
    """The architecture and the options that are on; tensors of other names and kinds."""
    made = Said()
    if not (folder / CONFIG).is_file():
        made.problems.append("a composition of several adapters: those in its folders load one by one")
        return made
    about = read_json(folder / CONFIG)
    name, inner = about.get("name"), about.get("config")
    if not isinstance(name, str) or not isinstance(inner, dict):
        made.problems.append(f"{CONFIG}: no name, or no config")
        return made
    parts = inner.get("configs") if inner.get("architecture") == "union" else [inner]
    configs: list[dict[str, Any]] = [one for one in parts if isinstance(one, dict)] if isinstance(parts, list) else []
    kinds = [str(one.get("architecture") or "bottleneck") for one in configs]
    made.methods = [f"{kind} named {name!r}" for kind in kinds]
    for kind, one in zip(kinds, configs, strict=True):
        made.options |= {k if len(kinds) == 1 else f"{kind}.{k}": v for k, v in one.items() if v not in OFF}
    if (folder / SAFE).is_file():
        other = f"{SAFE}, unless load_adapter is told use_safetensors=True" if (folder / TORCH).is_file() else ""
        made.ignored += [other] if other else []
    if (folder / HEAD).is_file() and not any((folder / one).is_file() for one in HEADS):
        made.ignored.append(f"{HEAD}: the head's tensors are missing")
    lists = {word for kind in kinds for word in LISTS.get(kind, ())} if set(kinds) <= LISTS.keys() else None
    _keys(made, name, (folder / HEAD).is_file(), lists, tensors)
    version = about.get("version")
    old = isinstance(version, str) and re.match(r"adapters\.(0\.|1\.0\.)", version) is not None
    if old and any(one.get("architecture") == "lora" and one.get("r") != one.get("alpha") for one in configs):
        made.notes.append(f"made by {version}: the scale of its LoRA is 1, whatever alpha says")
    return made


def _keys(made: Said, name: str, headed: bool, lists: set[str] | None, tensors: Mapping[str, Tensor]) -> None:
    inside = re.compile(rf".*?(\w+)\.{re.escape(name)}\..*")
    found = {key: inside.fullmatch(key) for key in tensors}
    bare = [key for key, m in found.items() if m is None]
    tell(made.ignored, f"not under the name {name!r}", [] if headed else bare)
    others = [key for key, m in found.items() if m is not None and lists is not None and not _own(m[1], lists)]
    tell(made.ignored, "of a kind that the config does not build", others)


def _own(word: str, lists: set[str]) -> bool:
    return word in lists or word in ALWAYS or ("adapters" in lists and word.endswith("_adapters"))
