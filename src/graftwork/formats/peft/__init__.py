"""HF PEFT's folders: adapter_config.json with adapter_model.safetensors or .bin."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ...core.adapter import Adapter
from ...core.body import Body
from ...core.errors import GraftError, nearest
from ...core.method import Method
from ...methods.weight.full import Full
from ...store.read import Stored
from ..files import read_json, read_tensors, write_files
from ..pieces import Piece, gather, held
from .about import about
from .config import Config
from .family import PREFIX, Family
from .lora import Lora

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
FAMILIES: dict[str, Family] = {family.peft_type: family for family in (Lora(),)}


class Peft:
    """The folders that PeftModel.save_pretrained writes, and that PeftModel.from_pretrained reads."""

    name = "peft"

    def recognises(self, folder: Path) -> bool:
        try:
            return "peft_type" in read_json(folder / CONFIG)
        except GraftError:
            # a damaged config is said to be one, if nothing but PEFT names its files so
            return (folder / CONFIG).is_file() and any((folder / name).is_file() for name in (TENSORS, PICKLE))

    def read(self, folder: Path, body: Body, partial: bool = False) -> Stored:
        asked = f"load {str(folder)!r}"
        config = Config(read_json(folder / CONFIG), asked)
        family = _family(config)
        tensors = _without_copies(_tensors(folder, asked), body)
        pieces = family.pieces(config, body, tensors.keys())
        config.finish()
        methods, by_site, warnings = gather(pieces, tensors, asked, partial)
        return Stored(folder.resolve().name, methods, by_site, None, None, {self.name: config.data}, warnings)

    def write(self, adapter: Adapter, body: Body, folder: Path) -> None:
        asked = f"save {adapter.name!r} as {self.name!r}"
        parts = held(adapter)
        family = next((f for f in FAMILIES.values() for m, _ in parts if f.claims(m)), None)
        if family is None:
            found = ", ".join(sorted({m.name for m, _ in parts}))
            raise GraftError(asked, f"PEFT has no method for {found}", "keep it in graftwork's own format")
        config, pieces = _saying(adapter, family, parts, body, asked)
        tensors = {}
        values = {(m.name, place): t for m, tensors_of in parts for place, t in tensors_of.items()}
        for piece in pieces:
            for slot in piece.slots:
                place = None if slot.site is None else (slot.site.path, slot.site.param)
                t = slot.there(values[piece.method.name, place][slot.name])
                tensors[slot.key] = t.detach().to("cpu", copy=True).contiguous()
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        write_files(folder, {TENSORS: safetensors.torch.save(tensors, {"format": "pt"}), CONFIG: text.encode()})


def _family(config: Config) -> Family:
    kind = config.data.get("peft_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise config.error(f"peft_type = {kind!r}{nearest(str(kind), FAMILIES)}", f"graftwork reads {known}")
    return FAMILIES[kind]


def _tensors(folder: Path, asked: str) -> dict[str, Tensor]:
    for name in (TENSORS, PICKLE):
        if (folder / name).is_file():
            return read_tensors(folder / name)
    raise GraftError(asked, f"neither {TENSORS} nor {PICKLE}", "the folder is half-written: restore it")


def _without_copies(tensors: Mapping[str, Tensor], body: Body) -> dict[str, Tensor]:
    """The tensors without those that only repeat the backbone's own (PEFT stores whole embeddings beside their LoRA)."""
    kept = {}
    for key, value in tensors.items():
        name = key.removeprefix(PREFIX).replace(".base_layer.", ".").replace(".original_module.", ".")
        path, _, leaf = name.rpartition(".")
        own = body.modules[path]._parameters.get(leaf) if path in body.modules else None
        apart = ".original_module." in key  # what was replaced: it is computed with by nobody
        if not (own is not None and (apart or (".base_layer." in key and _equal(own, value)))):
            kept[key] = value
    return kept


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.detach().cpu(), b.to(a.dtype))


def _saying(
    adapter: Adapter, family: Family, parts: Sequence[tuple[Method, Any]], body: Body, asked: str
) -> tuple[dict[str, Any], list[Piece]]:
    """A config that says exactly what the adapter is, and what it says: the one that it was read from, or a new one."""
    wanted = _said((m, place) for m, tensors in parts for place in tensors if place is not None)
    partly = [(m, place) for m, tensors in parts if isinstance(m, Full) and m.only for place in tensors]
    keys = {f"{PREFIX}{p}.{base}{name}" for m, (p, _) in partly for name in m.only for base in ("", "base_layer.")}
    before = adapter.metadata.get(Peft.name)
    if isinstance(before, dict):
        with contextlib.suppress(GraftError):
            pieces = _family(config := Config(before, asked)).pieces(config, body, keys)
            if _said(_places(pieces)) == wanted:
                return before, pieces
    data = {"peft_type": family.peft_type, **about(body), **family.config(parts, body)}
    pieces = family.pieces(Config(data, asked), body, keys)
    said = _said(_places(pieces))
    if said != wanted:
        path, param = min(place for place in said.keys() | wanted.keys() if said.get(place) != wanted.get(place))
        found = f"no config says {', '.join(map(str, wanted.get((path, param), ['nothing'])))} at {path}.{param}"
        raise GraftError(asked, found, "keep it in graftwork's own format")
    return data, pieces


def _places(pieces: Sequence[Piece]) -> Iterator[tuple[Method, tuple[str, str]]]:
    return ((piece.method, (site.path, site.param)) for piece in pieces for site in piece.sites)


def _said(given: Iterable[tuple[Method, tuple[str, str]]]) -> dict[tuple[str, str], list[Method]]:
    """The methods at each place, in order, without what says how the places were chosen."""
    out: dict[tuple[str, str], list[Method]] = {}
    for method, place in given:
        if isinstance(method, Full):
            method = dataclasses.replace(method, outputs=None)
        out.setdefault(place, []).append(dataclasses.replace(method, at="any", layers=None))
    return out
