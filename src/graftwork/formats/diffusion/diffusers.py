"""diffusers' files: <component>.<path>.lora_A.weight and .lora_B.weight, with the PEFT config of each component in the header.

Its older names are read too: .lora.down.weight, .lora_linear_layer.down.weight, .processor.to_q_lora.down.weight, with a
number <path>.alpha beside them or scale 1. Written are the newest, pytorch_lora_weights.safetensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from ...core.adapter import Adapter
from ...methods.weight.dora import DoRA
from ...methods.weight.lora import LoRA
from ...sites.body import Body
from ...store.read import Stored
from ..files import read_tensors
from ..pieces import gather
from . import file
from .header import HEADER, config_of, configs, module
from .modules import Keys, modules_of, pieces, read_alphas, tensors_of, without_mid
from .names import Named, located, main_component, name_of, read_leads

STANDARD = "pytorch_lora_weights"
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
SIDES = {"A": "down", "down": "down", "B": "up", "up": "up"}
NEW = re.compile(r"(.+)\.(?:lora_|lora\.|lora_linear_layer\.)(A|B|down|up)(?:\.default)?\.(weight|bias)")
OLD = re.compile(r"(.+?)(?:\.processor)?\.(to_\w+)_lora\.(down|up)\.weight")
ONE = re.compile(r"(.+)\.(alpha|lora_magnitude_vector)(?:\.weight)?")


class Diffusers:
    """One .safetensors file, or a folder with one (or with the torch file of older versions)."""

    name = "diffusers"

    def recognises(self, folder: Path) -> bool:
        return file.holds(folder, _claims, f"{STANDARD}.bin")

    def read(self, folder: Path, body: Body, partial: bool = False) -> Stored:
        asked = f"load {str(folder)!r}"
        found = file.the_file(folder, _claims, asked, f"{STANDARD}.bin")
        tensors = read_tensors(found)
        modules = _modules(tensors)
        paths, leads = located(map(_named, modules), body, _ways, ".", asked)
        here = {name: modules[name] for name in paths}
        alphas = read_alphas(here, tensors, asked)
        without_mid(here, tensors, asked)
        said = configs(file.metadata(found), asked)
        made = [module(name, paths[name], keys, tensors, alphas[name], said) for name, keys in here.items()]
        methods, by_site, left_out = gather(pieces(made, _magnitudes, body, asked), tensors, asked, partial)
        return Stored(file.stored_name(folder), methods, by_site, None, None, {self.name: leads}, left_out)

    def backbone(self, folder: Path) -> tuple[str | None, str | None]:
        return None, None  # a component of a pipeline that the file does not name

    def write(self, adapter: Adapter, body: Body, folder: Path) -> None:
        asked = f"save {adapter.name!r} as {self.name!r}"
        held = {child: f"{child}." for child in COMPONENTS if child in body.modules}
        leads = {"": f"{main_component(body)}.", **held, **read_leads(adapter.metadata.get(self.name))}

        def keys(path: str, method: LoRA | DoRA) -> Keys:
            name = name_of(path, leads, _ways)
            out = {"down": f"{name}.lora_A.weight", "up": f"{name}.lora_B.weight"}
            if isinstance(method, DoRA):
                return out | {"magnitude": f"{name}.lora_magnitude_vector"}
            return out | ({"shift": f"{name}.lora_B.bias"} if method.bias else {})

        modules = modules_of(adapter, keys, asked)
        tensors = tensors_of(adapter, modules, _magnitudes, body, asked)
        text = json.dumps(config_of(modules, body, asked), indent=2, sort_keys=True)
        file.write(folder, STANDARD, tensors, {HEADER: text})


def _claims(names: Collection[str]) -> bool:
    # PEFT's own file begins with its two modules: its config is needed, so it is a folder
    return any((NEW.fullmatch(n) or OLD.fullmatch(n)) and not n.startswith("base_model.") for n in names)


def _modules(tensors: Mapping[str, Tensor]) -> dict[str, Keys]:
    """The keys of each module, by its name."""
    out: dict[str, dict[str, str]] = {}
    for key in sorted(tensors):  # a file has no order
        if found := OLD.fullmatch(key):
            out.setdefault(f"{found[1]}.{found[2]}", {})[SIDES[found[3]]] = key
        elif found := NEW.fullmatch(key):
            part = SIDES[found[2]] if found[3] == "weight" else "shift" if SIDES[found[2]] == "up" else ""
            out.setdefault(found[1], {})[part or key] = key
        elif found := ONE.fullmatch(key):
            out.setdefault(found[1], {})["alpha" if found[2] == "alpha" else "magnitude"] = key
    for name, keys in out.items():  # what is missing is said to be
        keys.setdefault(
            "down", _beside(keys.get("up"), ("lora_B.", "up."), ("lora_A.", "down."), f"{name}.lora_A.weight")
        )
        keys.setdefault("up", _beside(keys["down"], ("lora_A.", "down."), ("lora_B.", "up."), f"{name}.lora_B.weight"))
    return dict(out)


def _beside(key: str | None, own: tuple[str, ...], other: tuple[str, ...], default: str) -> str:
    """The key of the other factor."""
    for a, b in zip(own, other, strict=True):
        head, found, tail = (key or "").rpartition(a)
        if found:
            return head + b + tail
    return default


def _named(name: str) -> Named:
    word, _, rest = name.partition(".")
    return Named(name, rest, word, (word,))


def _ways(path: str) -> tuple[str, ...]:
    """The path, and what it was called when attention had processors: to_q for q_proj, to_out for to_out.0 and out_proj."""
    above, _, last = path.rpartition(".")
    if path.endswith(".to_out.0"):
        return path, above
    return (path, f"{above}.to_{last.removesuffix('_proj')}") if above and last.endswith("_proj") else (path,)


def _magnitudes(d_out: int, ones: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that PEFT gives them."""
    return (1, d_out, *ones) if ones else (d_out,)
