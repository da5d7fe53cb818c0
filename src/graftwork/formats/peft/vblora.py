"""PEFT's VB-LoRA: vblora_logits_A [r, in / length, vectors], vblora_logits_B [out / length, r, vectors], or of each the numbers
and weights of the vectors that are mixed (_topk_indices, _topk_weights), and one vector bank for all."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from ...core.method import Method
from ...core.site import Site
from ...methods.weight.vblora import VBLoRA
from ...sites.body import Body
from ..config import Config
from ..pieces import Held, Piece, Slot, grouped, one, shaped
from . import extras
from .family import PREFIX
from .naming import named

BANK = "base_model.vblora_vector_bank"


class VbLora:
    """VBLoRA, with all logits or with the topk of each stretch."""

    peft_type = "VBLORA"

    def claims(self, method: Method) -> bool:
        return isinstance(method, VBLoRA)

    def pieces(self, config: Config, body: Body, keys: Collection[str]) -> list[Piece]:
        config.inert("fan_in_fan_out")
        method = VBLoRA(
            r=config.take("r", int, 4),
            vectors=config.take("num_vectors", int, 256),
            length=config.take("vector_length", int, 256),
            topk=config.take("topk", int, 2),
            dropout=config.take("vblora_dropout", (int, float), 0.0),
            init_bound=config.take("init_vector_bank_bound", (int, float), 0.02),
            init_std=config.take("init_logits_std", (int, float), 0.1),
            only_topk=config.take("save_only_topk_weights", bool, False),
        )
        chosen = extras.adapted(config, body)
        made = [(method, _slots(f"{PREFIX}{path}.vblora_logits_", site, method)) for path, site in chosen.items()]
        pieces = [replace(p, slots=(*p.slots, one(BANK, None, "bank.vectors"))) for p in grouped(made)]
        return [*extras.in_front(config, body, keys, chosen, "vblora_only"), *pieces, *extras.behind(config, body)]

    def config(self, held: Held, body: Body) -> dict[str, Any]:
        m, tensors = next((m, tensors) for m, tensors in held if isinstance(m, VBLoRA))
        paths = [spot[0] for spot in tensors if spot]
        return {
            "r": m.r,
            "num_vectors": m.vectors,
            "vector_length": m.length,
            "topk": m.topk,
            "vblora_dropout": m.dropout,
            "init_vector_bank_bound": m.init_bound,
            "init_logits_std": m.init_std,
            "save_only_topk_weights": m.only_topk,
            "target_modules": named(paths, body),
            **extras.config(held, body, paths, "vblora_only"),
        }


def _slots(key: str, site: Site, m: VBLoRA) -> list[Slot]:
    places = {"A": ("down", (m.r, site.weight.d_in // m.length)), "B": ("up", (site.weight.d_out // m.length, m.r))}
    slots = []
    for side, (name, shape) in places.items():
        whole = {"": (f"logits_{name}", m.vectors)}
        parts = {"_topk_indices": (f"index_{name}", m.topk), "_topk_weights": (f"share_{name}", m.topk - 1)}
        for end, (own, last) in (parts if m.only_topk else whole).items():
            slots.append(shaped(f"{key}{side}{end}", site, own, (*shape, last), (*shape, last)))
    return slots
