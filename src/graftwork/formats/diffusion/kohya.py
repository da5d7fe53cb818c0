"""kohya's files: lora_<component>_<path, dots as _>.lora_down.weight, .lora_up.weight, .alpha, and .dora_scale of DoRA; read
only, those of LyCORIS's LoHa and LoKr.

Read by sd-scripts, ComfyUI, AUTOMATIC1111, InvokeAI and, converted, diffusers. Where a path has both dots and _ in it, the
backbone's own paths say which is which.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...core.adapter import Adapter
from ...core.errors import GraftError
from ...methods.weight.dora import DoRA
from ...methods.weight.lora import LoRA
from ...sites.body import Body
from ...store.read import Stored
from ..files import read_tensors
from ..pieces import gather, grouped
from ..places import whole_site
from . import file, lycoris
from .modules import Keys, alpha_of, method_of, modules_of, pieces, read_alphas, tensors_of, without_mid
from .names import Named, located, main_component, name_of, read_leads

PARTS = {
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_mid.weight": "mid",
    "alpha": "alpha",
    "dora_scale": "magnitude",
}
LYCORIS = "lycoris"  # in the place of these, any key of LoHa or LoKr
# other methods that stand in such files, by what their keys begin with
OTHERS = {
    "oft_": "OFT",
    "boft_": "BOFT",
    "diff": "full differences",
    "glora_": "GLoRA",
}
# a component in the names of a file -> what it is called in a pipeline
CHILDREN = {
    "unet": ("unet", "transformer"),
    "te": ("text_encoder",),
    "te1": ("text_encoder",),
    "te2": ("text_encoder_2",),
    "te3": ("text_encoder_3",),
}


class Kohya:
    """One .safetensors file, or a folder with one."""

    name = "kohya"

    def recognises(self, folder: Path) -> bool:
        return file.holds(folder, _claims)

    def read(self, folder: Path, body: Body, partial: bool = False) -> Stored:
        asked = f"load {str(folder)!r}"
        tensors = read_tensors(file.the_file(folder, _claims, asked))
        modules = _modules(tensors, asked)
        paths, leads = located(map(_named, modules), body, _flat, "_", asked)
        here = {name: modules[name] for name in paths}
        alphas = read_alphas(here, tensors, asked)
        other = [name for name, keys in here.items() if LYCORIS in keys]
        here = {name: keys for name, keys in here.items() if LYCORIS not in keys}
        without_mid(here, tensors, asked)
        made = [(paths[name], method_of(keys, tensors, alphas[name]), keys) for name, keys in here.items()]
        sites = {name: whole_site(body, paths[name], asked) for name in other}
        rest = grouped(lycoris.module_of(name, site, tensors, alphas[name], asked) for name, site in sites.items())
        found = [*pieces(made, _magnitudes, body, asked), *rest]
        methods, by_site, left_out = gather(found, tensors, asked, partial)
        return Stored(file.stored_name(folder), methods, by_site, None, None, {self.name: leads}, left_out)

    def backbone(self, folder: Path) -> tuple[str | None, str | None]:
        return None, None  # of a diffusion model that is not one of transformers'

    def write(self, adapter: Adapter, body: Body, folder: Path) -> None:
        asked = f"save {adapter.name!r} as {self.name!r}"
        leads = _leads(body) | read_leads(adapter.metadata.get(self.name))

        def keys(path: str, method: LoRA | DoRA) -> Keys:
            if isinstance(method, LoRA) and method.bias:
                raise GraftError(asked, f"{method} at {path!r} changes the bias", "the format holds none")
            dora = isinstance(method, DoRA)
            name = name_of(path, leads, _flat)
            parts = {part: key for key, part in PARTS.items() if part != "mid" and (dora or part != "magnitude")}
            return {part: f"{name}.{key}" for part, key in parts.items()}

        modules = modules_of(adapter, keys, asked)
        tensors = tensors_of(adapter, modules, _magnitudes, body, asked)
        for _, method, own in modules:
            tensors[own["alpha"]] = _number(alpha_of(method), tensors[own["down"]].dtype)
        file.write(folder, "lora", tensors, {})


def _claims(names: Collection[str]) -> bool:
    split = [name.partition(".") for name in names if name.startswith("lora_")]
    return any(
        (part in PARTS and part != "alpha") or part.startswith((*OTHERS, *lycoris.STARTS)) for _, _, part in split
    )


def _modules(tensors: Mapping[str, Tensor], asked: str) -> dict[str, Keys]:
    """The keys of each module, by its name. GraftError for those of another method."""
    out: dict[str, dict[str, str]] = {}
    for key in sorted(tensors):  # a file has no order
        name, _, part = key.partition(".")
        other = next((method for start, method in OTHERS.items() if part.startswith(start)), None)
        if other is not None:
            raise GraftError(
                f"{asked}: {key!r}", f"{other}, a method that is not read", "LoRA, DoRA, LoHa and LoKr are"
            )
        if part in PARTS or part.startswith(lycoris.STARTS):
            out.setdefault(name, {})[PARTS.get(part, LYCORIS)] = key
    for name, keys in out.items():  # what is missing is said to be
        for key, part in PARTS.items():
            if part in ("down", "up") and LYCORIS not in keys:
                keys.setdefault(part, f"{name}.{key}")
    return dict(out)


def _named(name: str) -> Named:
    found = re.fullmatch(r"lora_([^_]+)_(.+)", name)
    word, rest = found.groups() if found else ("", name)
    return Named(name, rest, word, CHILDREN.get(word, (word,) if word else ()))


def _magnitudes(d_out: int, ones: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of dora_scale: of one axis for each of the weight, of which the first tells that it is one per output."""
    return (d_out, 1, *ones)


def _flat(path: str) -> tuple[str]:
    return (path.replace(".", "_"),)


def _leads(body: Body) -> dict[str, str]:
    """What stands in front of a path in a new file: for each component that the backbone holds, and for itself."""
    several = "text_encoder_2" in body.modules
    out = {child: f"lora_{word}_" for word, children in CHILDREN.items() for child in children}
    out["text_encoder"] = "lora_te1_" if several else "lora_te_"
    return {"": out[main_component(body)], **{child: lead for child, lead in out.items() if child in body.modules}}


def _number(value: float, dtype: torch.dtype) -> Tensor:
    """A tensor of no axes, in the precision of the weights where that holds the value."""
    made = torch.tensor(value, dtype=dtype)
    return made if float(made) == value else torch.tensor(value, dtype=torch.float32)
