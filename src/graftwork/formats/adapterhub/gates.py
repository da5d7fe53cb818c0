"""AdapterHub's gates (use_gating, as in its UniPELT): one Linear(d, 1) beside a bottleneck, a LoRA or the prefix of an attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ...core.method import Method, get
from ...core.site import Site
from ..config import Config
from ..pieces import Slot, one
from .family import Family, Held, Made
from .names import Names

GATED = ("bottleneck", "lora", "prefix")


def ungated(method: Any) -> Method:
    """The method behind its gate, or the method itself."""
    return method.of if method.name == "gated" else method


class Gates:
    """`gated` around the methods of a family."""

    def __init__(self, family: Family) -> None:
        self.family = family

    def reads(self, config: Mapping[str, Any]) -> bool:
        return config.get("use_gating") is True and self.family.reads(config)

    def claims(self, method: Method) -> bool:
        return method.name == "gated" and self.family.claims(ungated(method))

    def pieces(self, config: Config, names: Names, keys: set[str], warnings: list[str]) -> Made:
        config.inert("use_gating")
        if not config.take("shared_gating", bool, True):
            raise config.error("shared_gating = False", "graftwork has one gate for keys and values together")
        made = []
        for method, slots in self.family.pieces(config, names, keys, warnings):
            site = next(site for slot in slots for site, _ in slot.places if site is not None)
            if method.name not in GATED or site.rows is not None:
                found = f"use_gating = True at {site.key}, {method.name}"
                raise config.error(found, "graftwork reads gates of bottlenecks, prefixes and LoRA on whole weights")
            slots = [self._renamed(slot, method) for slot in slots]
            slots += [
                one(f"{_home(method, site, slots, names)}{leaf}", site, f"gate.{leaf}") for leaf in ("weight", "bias")
            ]
            made.append((_gated(_without_alpha(method)), slots))
        return made

    def _renamed(self, slot: Slot, method: Method) -> Slot:
        """A weight method stands inside a delta of its own."""
        if method.name != "lora":
            return slot
        return dataclasses.replace(slot, places=tuple((site, f"delta.{name}") for site, name in slot.places))

    def config(self, held: Sequence[Held], names: Names) -> dict[str, Any]:
        inside = [dataclasses.replace(part, method=ungated(part.method)) for part in held]
        return self.family.config(inside, names) | {"use_gating": True}

    def plain(self, method: Method, site: Site) -> Method:
        of = dataclasses.replace(self.family.plain(ungated(method), site), at="any", layers=None)
        return dataclasses.replace(method, of=of, init="normal", init_std=0.02)  # type: ignore[call-arg]

    def moved(self, method: Method, site: Site, names: Names) -> tuple[Method, Site]:
        of, there = self.family.moved(ungated(method), site, names)
        return dataclasses.replace(method, of=of), there  # type: ignore[call-arg]

    def unpack(self, config: Config, names: Names, tensors: dict[str, Tensor], warnings: list[str]) -> bool:
        return self.family.unpack(config, names, tensors, warnings)

    def pack(self, config: Config, names: Names, tensors: dict[str, Tensor]) -> None:
        self.family.pack(config, names, tensors)


def _gated(method: Method) -> Method:
    made = get("gated")(of=method)
    assert isinstance(made, Method)
    return made


def _without_alpha(method: Any) -> Method:
    """There a gate stands in the place of alpha / r."""
    return dataclasses.replace(method, alpha=float(method.r)) if method.name == "lora" else method


def _home(method: Method, site: Site, slots: Sequence[Slot], names: Names) -> str:
    """Where a gate's tensors are in the file, with a dot: beside those of the bottleneck or LoRA, or in the attention module itself."""
    if method.name == "prefix":
        inside = [s for s in names.body.anatomy.sites if s.role in ("q", "qkv") and s.path.startswith(f"{site.path}.")]
        around = names.old[inside[0].path].rpartition(".")[0]
        return f"{around}.prefix_tuning.prefix_gates.{names.adapter}."
    word = f".{'loras' if method.name == 'lora' else 'adapters'}.{names.adapter}."
    return f"{slots[0].key.partition(word)[0]}{word}gate."
