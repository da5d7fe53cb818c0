"""AdapterHub's folders: adapter_config.json with pytorch_adapter.bin or adapter.safetensors, and prediction heads beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from ...core.adapter import Adapter
from ...core.errors import GraftError
from ...expressions.mixing import mixing
from ...sites.body import Body
from ...store.read import Stored
from ..config import Config
from ..files import read_json, read_tensors, write_files
from ..pieces import Piece, gather, grouped
from . import fusion, heads
from .bottleneck import Bottlenecks
from .compacter import Compacters
from .family import Family
from .gates import Gates
from .lora import Loras
from .names import Names, as_here
from .prefix import Prefixes
from .reft import Refts
from .writing import configured, held

CONFIG, SAFE, TORCH = "adapter_config.json", "adapter.safetensors", "pytorch_adapter.bin"
SETUP = "adapter_setup.json"
PLAIN: tuple[Family, ...] = (Bottlenecks(), Compacters(), Loras(), Prefixes(), Refts())
FAMILIES: tuple[Family, ...] = (*(Gates(family) for family in PLAIN), *PLAIN)
VERSION = "adapters.1.3.0"


class AdapterHub:
    """The folders that adapters' save_adapter writes, and that its load_adapter(..., use_safetensors=True) reads."""

    name = "adapterhub"

    def recognises(self, folder: Path) -> bool:
        if any((folder / name).is_file() for name in (SETUP, fusion.CONFIG)):
            return True
        return (folder / CONFIG).is_file() and any((folder / name).is_file() for name in (SAFE, TORCH))

    def read(self, folder: Path, body: Body, partial: bool = False) -> Stored:
        asked = f"load {str(folder)!r}"
        if (folder / fusion.CONFIG).is_file():
            return self._read_fusion(folder, body, asked, partial)
        if (folder / SETUP).is_file():
            do = "load the adapters inside one by one, then the folder of their fusion"
            raise GraftError(asked, f"{SETUP}: several adapters in folders of their own", do)
        about = read_json(folder / CONFIG)
        name, inner = about.get("name"), about.get("config")
        if not (isinstance(name, str) and name and isinstance(inner, dict)):
            raise GraftError(f"{asked}: {CONFIG}", "no name, or no config", "restore the file")
        names = Names(body, name)
        tensors = as_here(_read(folder, asked), names)
        configs = [Config(one, asked) for one in _configs(_upright(inner, about), asked)]
        families = [_family(config, asked) for config in configs]
        warnings: list[str] = []
        exact = [f.unpack(c, names, tensors, warnings) for f, c in zip(families, configs, strict=True)]
        made = []
        for family, config in zip(families, configs, strict=True):
            made += grouped(family.pieces(config, names, set(tensors), warnings))
            config.inert("architecture")
            config.finish()
        metadata: dict[str, Any] = {"about": {k: v for k, v in about.items() if k != "config"}} | (
            {"config": inner} if all(exact) else {}
        )
        return self._stored(folder, names, made, tensors, metadata, warnings, asked, partial)

    def _read_fusion(self, folder: Path, body: Body, asked: str, partial: bool) -> Stored:
        about = fusion.read_config(folder, asked)
        names, warnings = Names(body, about["name"]), []
        method = fusion.method_of(about, names, asked)
        tensors = as_here(fusion.read_layers(folder, asked), names)
        made = grouped([(method, fusion.slots(method, names, asked))])
        for key in fusion.unused(tensors, {slot.key for piece in made for slot in piece.slots}, names):
            del tensors[key]
            warnings = ["layers of the fusion where no adapter acts are left out"]
        metadata = {"about": {k: v for k, v in about.items() if k != "config"}, "config": about["config"]}
        return self._stored(folder, names, made, tensors, metadata, warnings, asked, partial)

    def _stored(
        self,
        folder: Path,
        names: Names,
        made: list[Piece],
        tensors: dict[str, Tensor],
        metadata: dict[str, Any],
        warnings: list[str],
        asked: str,
        partial: bool,
    ) -> Stored:
        """All that was read, with the head beside it."""
        head, labels = heads.read_head(folder, asked), None
        if head is not None:
            made = made + grouped(heads.pieces(head[0], names, head[1]))
            tensors = tensors | head[1]
            labels, metadata["head"] = heads.labels(head[0]), head[0].data
        methods, by_site, left = gather(made, tensors, asked, partial)
        warned = tuple(dict.fromkeys((*warnings, *left)))
        return Stored(names.adapter, methods, by_site, labels, None, {self.name: metadata}, warned)

    def backbone(self, folder: Path) -> tuple[str | None, str | None]:
        about = read_json(folder / (fusion.CONFIG if (folder / fusion.CONFIG).is_file() else CONFIG))
        found = [about.get(field) for field in ("model_name", "model_class")]
        name, kind = (word if isinstance(word, str) and word else None for word in found)
        return name, None if kind is None or kind.endswith("AdapterModel") else kind

    def write(self, adapter: Adapter, body: Body, folder: Path) -> None:
        asked = f"save {adapter.name!r} as {self.name!r}"
        names = Names(body, adapter.name)
        before = adapter.metadata.get(self.name)
        before = before if isinstance(before, dict) else {}
        about = {**(before.get("about") or {}), **_about(names), "name": adapter.name}
        if mixing(adapter) is not None:
            inner, of, tensors, head = fusion.written(adapter, names, before.get("config"), asked)
            about |= {"config": inner, "adapter_names": of}
            files = {fusion.SAFE: safetensors.torch.save(tensors), fusion.CONFIG: _text(about)}
        else:
            parts, head = held(adapter, names, FAMILIES, asked)
            inner, tensors = configured(parts, names, _configs, before.get("config"), FAMILIES, asked)
            files = {SAFE: safetensors.torch.save(tensors), CONFIG: _text(about | {"config": inner})}
        if head:
            said, values = heads.write(head, names, adapter.labels, before.get("head"))
            files |= {heads.SAFE: safetensors.torch.save(values), heads.CONFIG: _text({**_about(names), **said})}
        write_files(folder, files)


def _text(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, sort_keys=True) + "\n").encode()


def _about(names: Names) -> dict[str, Any]:
    settings = names.settings
    return {
        "model_type": settings.model_type,
        "model_name": getattr(settings, "_name_or_path", "") or "",
        "model_class": type(names.model).__name__,
        "hidden_size": settings.hidden_size,
        "version": VERSION,
    }


def _configs(inner: Mapping[str, Any], asked: str) -> list[dict[str, Any]]:
    """The configs of a union, or the one."""
    found = inner.get("configs") if inner.get("architecture") == "union" else [inner]
    if not isinstance(found, list) or not found or not all(isinstance(one, dict) for one in found):
        raise GraftError(f"{asked}: {CONFIG}", "a union without configs", "restore the file")
    return found


def _family(config: Config, asked: str) -> Family:
    found = next((family for family in FAMILIES if family.reads(config.data)), None)
    if found is None:
        kind = config.data.get("architecture")
        raise GraftError(
            f"{asked}: {CONFIG}", f"architecture = {kind!r}", "graftwork does not read this kind of adapter"
        )
    return found


def _upright(inner: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """The config in today's words: before versions were stored "gelu" was the approximate one, before 1.1.0 LoRA left alpha / r out."""
    version = about.get("version")
    made = dict(inner)
    nested = made.pop("invertible_adapter", None)
    if isinstance(nested, dict):  # before there were two fields for it
        made |= {
            "inv_adapter": nested.get("block_type"),
            "inv_adapter_reduction_factor": nested.get("reduction_factor"),
        }
    if version is None and isinstance(made.get("non_linearity"), str):
        made["non_linearity"] = {"gelu": "gelu_new", "gelu_orig": "gelu"}.get(
            made["non_linearity"], made["non_linearity"]
        )
    if isinstance(version, str) and version.startswith("adapters.0.") and made.get("architecture") == "lora":
        made["alpha"] = made.get("r", 8)
    return made


def _read(folder: Path, asked: str) -> dict[str, Tensor]:
    for name in (SAFE, TORCH):
        if (folder / name).is_file():
            return read_tensors(folder / name)
    raise GraftError(asked, f"neither {SAFE} nor {TORCH}", "the folder is half-written: restore it")
