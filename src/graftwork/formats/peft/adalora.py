"""PEFT's AdaLoRA: lora_A [r, in], lora_E [r, 1], lora_B [out, r], with the triplets that are left, and the schedule."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch

from ...core.method import Method
from ...methods.weight.adalora import AdaLoRA
from ...sites.body import Body
from ..config import Config
from ..pieces import Held, Piece, grouped, shaped
from . import extras
from .family import PREFIX
from .naming import named

STEPS = 1_000_000  # PEFT counts the schedule in steps, of which it wants to know the number; here it is in shares


class AdaLora:
    """AdaLoRA; how much of the schedule is over is not in a file, so that training does not go on from it."""

    peft_type = "ADALORA"

    def claims(self, method: Method) -> bool:
        return isinstance(method, AdaLoRA)

    def pieces(self, config: Config, body: Body, keys: Collection[str]) -> list[Piece]:
        config.inert("r", "init_lora_weights", "fan_in_fan_out", "megatron_core", "qalora_group_size", "loftq_config")
        method, chosen = self._method(config), extras.adapted(config, body)
        left = self._left(config, method.init_r)
        made = []
        for path, site in chosen.items():
            w, r, key = site.weight, left.get(path, method.init_r), f"{PREFIX}{path}.lora_"
            here = method if w.linear else replace(method, dropout=0.0)
            slots = [
                shaped(f"{key}A", site, "down", (r, w.d_in), (r, w.d_in)),
                shaped(f"{key}E", site, "values", (r,), (r, 1)),
                shaped(f"{key}B", site, "up", (w.d_out, r), (w.d_out, r)),
            ]
            made.append((here, slots))
        state = {"schedule.steps": torch.tensor(0), "schedule.settled": torch.tensor(bool(left))}
        pieces = [replace(piece, given=state) for piece in grouped(made)]
        return [*extras.in_front(config, body, keys, chosen, "lora_only"), *pieces, *extras.behind(config, body)]

    def _method(self, config: Config) -> AdaLoRA:
        r, target = config.take("init_r", int, 12), config.take("target_r", int, 8)
        total = config.take("total_step", int, 0)
        first, last = (config.take(name, int, 0) / total if total > 0 else 0.0 for name in ("tinit", "tfinal"))
        config.take("deltaT", int, 1)
        alpha = float(config.take("lora_alpha", (int, float), 8))
        return AdaLoRA(
            init_r=r,
            target_r=min(target, r),
            alpha=alpha if alpha > 0 else float(r),
            beta1=config.take("beta1", (int, float), 0.85),
            beta2=config.take("beta2", (int, float), 0.85),
            gamma=config.take("orth_reg_weight", (int, float), 0.5),
            t_init=first if first + last < 1 else 0.0,
            t_final=last if first + last < 1 else 0.0,
            every=max(1, config.take("deltaT", int, 1)),
            dropout=config.take("lora_dropout", (int, float), 0.0),
        )

    def _left(self, config: Config, r: int) -> dict[str, int]:
        """How many triplets are left at a path: rank_pattern says of each whether it is."""
        out = {}
        for name, flags in config.take("rank_pattern", dict, {}).items():
            if not isinstance(flags, list) or len(flags) != r or not all(isinstance(flag, bool) for flag in flags):
                raise config.error(f"rank_pattern[{name!r}] = {flags!r}", f"expected {r} times true or false")
            out[name.removesuffix(".lora_E")] = sum(flags)
        return out

    def config(self, held: Held, body: Body) -> dict[str, Any]:
        m = next(m for m, _ in held if isinstance(m, AdaLoRA))
        own = {spot[0]: t for n, tensors in held if isinstance(n, AdaLoRA) for spot, t in tensors.items() if spot}
        left = {path: t["values"].shape[-1] for path, t in own.items()}
        pattern = {f"{path}.lora_E": [i < r for i in range(m.init_r)] for path, r in left.items()}
        return {
            "init_r": m.init_r,
            "target_r": m.target_r,
            "r": m.init_r,
            "lora_alpha": m.alpha,
            "lora_dropout": max(n.dropout for n, _ in held if isinstance(n, AdaLoRA)),
            "beta1": m.beta1,
            "beta2": m.beta2,
            "orth_reg_weight": m.gamma,
            "total_step": STEPS,
            "tinit": round(m.t_init * STEPS),
            "tfinal": round(m.t_final * STEPS),
            "deltaT": m.every,
            "target_modules": named(own, body),
            "rank_pattern": pattern if any(r < m.init_r for r in left.values()) else None,
            **extras.config(held, body, own, "lora_only"),
        }
