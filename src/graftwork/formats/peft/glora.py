"""PEFT's GLoRA: glora_A to glora_E per module, each a pair Xd [rows, r], Xu [r, columns], or X.

Where a module has no bias, PEFT has no C, D and E; A and B are of one kind, and so are D and E. What is "none" stands
in the file as a matrix of zeros.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...core.method import Method
from ...core.site import Site
from ...methods.weight.glora import GLoRA
from ...sites.body import Body
from ..config import Config
from ..pieces import Held, Piece, Slot, grouped, shaped
from . import extras
from .family import PREFIX
from .naming import named


class GLora:
    """GLoRA of chosen kinds; a supernet is none of PEFT's."""

    peft_type = "GLORA"

    def claims(self, method: Method) -> bool:
        return isinstance(method, GLoRA) and not method.supernet

    def pieces(self, config: Config, body: Body, keys: Collection[str]) -> list[Piece]:
        config.inert("init_weights")
        matrices, column, vectors = (
            config.take(f"config_{name}", str, kind)
            for name, kind in (("A_B", "lora"), ("C", "lora"), ("D_E", "constant"))
        )
        method = GLoRA(config.take("r", int, 8), matrices, matrices, column, vectors, vectors)
        chosen, made = extras.adapted(config, body), []
        for path, site in chosen.items():
            if not isinstance(site.module, nn.Linear):
                raise config.error(f"{path!r}, a {type(site.module).__name__}", "PEFT has GLoRA for linear layers")
            biased = site.module.bias is not None
            own = method if biased else replace(method, c="none", d="none", e="none")
            made.append((own, _slots(own, site, f"{PREFIX}{path}.glora_", keys)))
        own_bias = extras.in_front(config, body, keys, chosen, "glora_only")
        return [*own_bias, *grouped(made), *extras.behind(config, body)]

    def config(self, held: Held, body: Body) -> dict[str, Any]:
        own = [(m, spot) for m, tensors in held if isinstance(m, GLoRA) for spot in tensors if spot]
        paths = [path for _, (path, _) in own]
        first = next((m for m, (path, _) in own if body.modules[path]._parameters.get("bias") is not None), own[0][0])
        return {
            "r": first.r,
            "config_A_B": first.a,
            "config_C": first.c,
            "config_D_E": first.d,
            "target_modules": named(paths, body),
            **extras.config(held, body, paths, "glora_only"),
        }


def _nothing(t: Tensor) -> list[Tensor]:
    if t.any():
        raise ValueError("numbers, where the config says none")
    return []


def _zeros(size: tuple[int, ...], site: Site, _: object) -> Tensor:
    like = site.weight.like
    return torch.zeros(size, dtype=None if like is None else like.dtype)


def _slots(method: GLoRA, site: Site, key: str, keys: Collection[str]) -> list[Slot]:
    """The tensors of one module."""
    w, slots = site.weight, []
    for name, kind in method.kinds._asdict().items():
        rows, columns = (w.d_in, 1) if name == "c" else (w.d_out, w.d_in)
        if kind == "none":
            idle = f"{key}{name.upper()}.zeros"
            if idle in keys or not any("glora_" in known for known in keys):  # PEFT warns where they are missing
                size = (rows,) if name in "de" else (rows, columns)
                slots.append(Slot(idle, (), _nothing, partial(_zeros, size, site)))
            continue
        at, here = f"{key}{name.upper()}.X", f"support.{name}"
        if name in "de":
            size = (rows if kind == "vector" else 1,)
            slots.append(shaped(at, site, here, size, size))
        elif kind == "lora":
            up, down = (rows, method.r), (method.r, columns)
            slots += [shaped(f"{at}d", site, f"{here}_up", up, up), shaped(f"{at}u", site, f"{here}_down", down, down)]
        else:
            here_size, there = ((rows, 1),) * 2 if kind == "vector" else ((1, 1), (1,))
            slots.append(shaped(at, site, f"{here}_up", here_size, there))
    return slots
