"""PEFT's VeRA: vera_lambda_d [r] and vera_lambda_b [out] per module, and vera_A, vera_B for all, stored or drawn from a key."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from ...core.method import Method
from ...methods.weight.vera import VeRA
from ...sites.body import Body
from ..config import Config
from ..pieces import Held, Piece, grouped, one, shaped
from . import extras
from .family import PREFIX
from .naming import named

SHARED = "base_model."


class Vera:
    """VeRA; the projections that PEFT draws from a key are those that are drawn here from the same seed."""

    peft_type = "VERA"

    def claims(self, method: Method) -> bool:
        return isinstance(method, VeRA)

    def pieces(self, config: Config, body: Body, keys: Collection[str]) -> list[Piece]:
        config.inert("init_weights", "fan_in_fan_out")
        method = VeRA(
            r=config.take("r", int, 256),
            d_initial=config.take("d_initial", (int, float), 0.1),
            dropout=config.take("vera_dropout", (int, float), 0.0),
            seed=config.take("projection_prng_key", int, 0),
            save_projection=config.take("save_projection", bool, True),
        )
        chosen, made = extras.adapted(config, body), []
        for path, site in chosen.items():
            sizes = {"d": ("down_scale", method.r), "b": ("up_scale", site.weight.d_out)}
            key = f"{PREFIX}{path}.vera_lambda_"
            made.append((method, [shaped(key + n, site, name, (size,), (size,)) for n, (name, size) in sizes.items()]))
        pieces = grouped(made)
        if method.save_projection:
            both = (("vera_A", "projection.down"), ("vera_B", "projection.up"))
            pieces = [
                replace(p, slots=(*p.slots, *(one(SHARED + key, None, name) for key, name in both))) for p in pieces
            ]
        return [*extras.in_front(config, body, keys, chosen, "vera_only"), *pieces, *extras.behind(config, body)]

    def config(self, held: Held, body: Body) -> dict[str, Any]:
        m, tensors = next((m, tensors) for m, tensors in held if isinstance(m, VeRA))
        paths = [spot[0] for spot in tensors if spot]
        return {
            "r": m.r,
            "d_initial": m.d_initial,
            "vera_dropout": m.dropout,
            "projection_prng_key": m.seed,
            "save_projection": m.save_projection,
            "target_modules": named(paths, body),
            **extras.config(held, body, paths, "vera_only"),
        }
