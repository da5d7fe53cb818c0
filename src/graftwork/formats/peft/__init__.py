"""HF PEFT's folders: adapter_config.json with adapter_model.safetensors or .bin."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ...core.adapter import Adapter
from ...core.errors import GraftError, nearest
from ...core.method import Method
from ...methods.input.prompt import Prompt
from ...methods.weight.bitfit import BitFit
from ...methods.weight.dora import DoRA
from ...methods.weight.full import Full
from ...methods.weight.poly import Poly
from ...sites.body import Body
from ...store.read import Stored
from ..config import Config
from ..files import read_json, read_tensors, write_files
from ..pieces import Held, Spot, gather, held, spread
from .about import about, origin
from .config import config_of
from .extras import valued
from .families import FAMILIES
from .family import PREFIX, Family
from .mutated import plain

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
# hyper-parameters that say how an adapter started or is trained, or which sites it took: what is stored computes the same without
FREE = (
    "init",
    "init_std",
    "vocab",
    "d_initial",
    "top",
    "mid",
    "add_missing",
    "stochastic",
    "tau",
    "prior",
    "router_lr",
    "penalty",
    "logits_lr",
    "init_bound",
)


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
        config = config_of(read_json(folder / CONFIG), asked)
        family = _family(config)
        config, tensors = plain(config, _without_copies(_tensors(folder, asked), config, body), body)
        pieces = family.pieces(config, body, tensors.keys())
        config.finish()
        methods, by_site, left_out = gather(pieces, tensors, asked, partial)
        warnings = (*left_out, *config.warnings)
        return Stored(folder.resolve().name, methods, by_site, None, None, {self.name: config.data}, warnings)

    def backbone(self, folder: Path) -> tuple[str | None, str | None]:
        return origin(read_json(folder / CONFIG))

    def write(self, adapter: Adapter, body: Body, folder: Path) -> None:
        asked = f"save {adapter.name!r} as {self.name!r}"
        parts = held(adapter)
        family = next((f for f in FAMILIES.values() if any(f.claims(m) for m, _ in parts)), None)
        if family is None:
            found = ", ".join(sorted({m.name for m, _ in parts}))
            raise GraftError(asked, f"PEFT has no method for {found}", "keep it in graftwork's own format")
        parts = [(m, t) if isinstance(m, BitFit) and family.claims(m) else valued(m, t, body) for m, t in parts]
        config, tensors = _saying(adapter, family, parts, body, asked)
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


def _without_copies(tensors: Mapping[str, Tensor], config: Config, body: Body) -> dict[str, Tensor]:
    """The tensors without those that only repeat the backbone's own (PEFT stores whole embeddings beside their LoRA)."""
    kept = {}
    biased = config.data.get("bias") not in (None, "none")  # a bias that was trained may still be what it was
    for key, value in tensors.items():
        name = key.removeprefix(PREFIX).replace(".base_layer.", ".").replace(".original_module.", ".")
        path, _, leaf = name.rpartition(".")
        own = body.modules[path]._parameters.get(leaf) if path in body.modules else None
        apart = ".original_module." in key  # what was replaced: it is computed with by nobody
        copied = ".base_layer." in key and not (biased and leaf == "bias") and own is not None and _equal(own, value)
        if own is None or not (apart or copied):
            kept[key] = value
    return kept


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.detach().cpu(), b.to(a.dtype))


def _saying(
    adapter: Adapter, family: Family, parts: Held, body: Body, asked: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A config that says exactly what the adapter is, and its tensors: the config that it was read from, or a new one."""
    partly = [(m, spot) for m, tensors in parts if isinstance(m, Full) and m.only for spot in tensors if spot]
    keys = {f"{PREFIX}{p}.{base}{name}" for m, (p, _) in partly for name in m.only for base in ("", "base_layer.")}

    def said(data: dict[str, Any]) -> dict[str, Tensor]:
        config = config_of(data, asked)
        pieces = _family(config).pieces(config, body, keys)
        here, there = _said(parts), _said([(p.method, [(s.path, s.param) for s in p.sites]) for p in pieces])
        if here != there:
            path, param = min(spot for spot in here.keys() | there.keys() if here.get(spot) != there.get(spot))
            found = f"no config says {', '.join(map(str, here.get((path, param), ['nothing'])))} at {path}.{param}"
            raise GraftError(asked, found, "keep it in graftwork's own format")
        return spread(pieces, parts, asked)

    before = adapter.metadata.get(Peft.name)
    if isinstance(before, dict):
        with contextlib.suppress(GraftError):
            return before, said(before)
    made = family.config(parts, body)
    data = {"peft_type": family.peft_type, **about(body, bool(made.get("modules_to_save"))), **made}
    if "num_virtual_tokens" in data and data["task_type"] is None:
        found = "PEFT reads a prompt for a language model, or together with the head of a classifier"
        raise GraftError(asked, found, "train the head with it, or keep it in graftwork's own format")
    return data, said(data)


def _said(given: Iterable[tuple[Method, Iterable[Spot]]]) -> dict[tuple[str, str], list[Method]]:
    """The methods at each place, in order, without what says how the places were chosen."""
    out: dict[tuple[str, str], list[Method]] = {}
    for method, spots in given:
        bare = {f.name: f.default for f in dataclasses.fields(method) if f.name in FREE}
        bare |= {"tokens": ()} if isinstance(method, Prompt) else {"outputs": None} if isinstance(method, Full) else {}
        bare |= (
            {"tasks": tuple(map(str, range(len(method.tasks))))} if isinstance(method, Poly) else {}
        )  # there: numbers
        bare |= {"alpha": method.scale * method.r} if isinstance(method, DoRA) else {}  # it may be left to its default
        for spot in spots:
            if spot is not None:
                out.setdefault(spot, []).append(dataclasses.replace(method, at="any", layers=None, **bare))
    for methods in out.values():  # values for a bias and a change of the weight may stand in either order
        if not any(getattr(m, "bias", False) for m in methods):
            methods.sort(key=lambda m: not (isinstance(m, Full) and m.only == ("bias",)))
    return out
