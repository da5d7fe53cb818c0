"""AdapterHub's prediction heads: those of transformers' own classes, and the library's flexible ones where they compute the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...core.errors import GraftError
from ...core.method import Method
from ...core.site import Site
from ...methods.weight.full import Full
from ..config import Config
from ..files import read_json, read_tensors
from ..pieces import Slot, one
from .names import Names

CONFIG, SAFE, TORCH = "head_config.json", "model_head.safetensors", "pytorch_model_head.bin"
KINDS = ("classification", "tagging", "multilabel_classification", "image_classification")


def read_head(folder: Path, asked: str) -> tuple[Config, dict[str, Tensor]] | None:
    """(config, tensors) of the head beside an adapter; None where there is none."""
    if not (folder / CONFIG).is_file():
        return None
    found = next((folder / name for name in (SAFE, TORCH) if (folder / name).is_file()), None)
    if found is None:
        raise GraftError(asked, f"{CONFIG} without {SAFE} or {TORCH}", "the folder is half-written: restore it")
    return Config(read_json(folder / CONFIG), asked), read_tensors(found)


def labels(config: Config) -> tuple[str, ...] | None:
    """The class names, in order."""
    inner = config.data.get("config")
    found = (inner if isinstance(inner, dict) else config.data).get("label2id")
    if not isinstance(found, dict) or sorted(found.values(), key=str) != sorted(range(len(found)), key=str):
        return None
    return tuple(sorted(found, key=lambda label: found[label]))


def pieces(config: Config, names: Names, tensors: Mapping[str, Tensor]) -> list[tuple[Method, list[Slot]]]:
    """The head's linear maps, in their order, on those of the backbone's own head."""
    sites = names.body.anatomy.of("head")
    inner = config.data.get("config")
    if inner is None:
        starts = {site.key: names.old[site.path] for site in sites}
    else:
        starts = dict(zip((site.key for site in sites), _flexible(config, inner, names, sites), strict=True))
    rows = next((len(t) for key, t in reversed(list(tensors.items())) if key.endswith(".weight")), None)
    made: list[tuple[Method, list[Slot]]] = []
    for site in sites:
        owned = [name for name, p in site.module._parameters.items() if p is not None]
        outputs = rows if site is sites[-1] else None
        made.append(
            (Full(outputs=outputs), [one(f"{starts[site.key]}.{name}", site, f"values.{name}") for name in owned])
        )
    return made


def _flexible(config: Config, inner: Any, names: Names, sites: Sequence[Site]) -> list[str]:
    """The keys of a flexible head: dropout, linear, non-linearity and again, in one row. GraftError where it is another map."""
    fields = Config(inner, config.asked) if isinstance(inner, dict) else config
    kind, count = fields.data.get("head_type"), fields.take("layers", int, 1)
    name = config.data.get("name")
    token = kind == "tagging"
    pooled = bool(names.body.anatomy.of("pooler")) and not token
    act = fields.data.get("activation_function")
    same_place = token or bool(fields.data.get("use_pooler")) == pooled
    if kind not in KINDS or count != len(sites) or not same_place or (count > 1 and act != "tanh"):
        found = f"a {kind} head of {count} layers, use_pooler = {fields.data.get('use_pooler')}, {act}"
        here = f"{type(names.model).__name__} has one of {len(sites)} layers{' on its pooler' if pooled else ''}"
        do = "load onto a model whose own head computes the same, or leave the head files out"
        raise GraftError(f"{config.asked}: {CONFIG}", f"{found}; {here}", do)
    step = 3 if act else 2
    return [f"heads.{name}.{1 + step * i}" for i in range(count)]


def head_config(names: Names, labelled: Sequence[str] | None, rows: int) -> dict[str, Any]:
    """head_config.json for the head of a transformers class."""
    words = list(labelled) if labelled else [f"LABEL_{i}" for i in range(rows)]
    return {"config": None, "name": None, "num_labels": rows, "label2id": {word: i for i, word in enumerate(words)}}


def is_head(method: Method, site: Site) -> bool:
    """Whether a method at a site is part of a prediction head."""
    return isinstance(method, Full) and site.role == "head" and isinstance(site.module, nn.Module)


def write(
    held: Sequence[Any], names: Names, labelled: Sequence[str] | None, before: Any
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors) of a head: the flexible one it was read from, or that of the transformers class."""
    values = {site.key: one.tensors[site.key] for one in held for site in one.sites}
    sites = [site for site in names.body.anatomy.of("head") if site.key in values]
    last = [t for name, t in values[sites[-1].key].items() if name.endswith("weight")]
    config = before if isinstance(before, dict) else head_config(names, labelled, len(last[0]))
    slots = [slot for _, listed in pieces(Config(config, "save"), names, {}) for slot in listed]
    out = {s.key: values[site.key][name] for s in slots for site, name in s.places if site and site.key in values}
    return config, {key: value.detach().to("cpu", copy=True).contiguous() for key, value in out.items()}
