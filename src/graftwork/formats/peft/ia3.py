"""PEFT's (IA)^3: ia3_l of the outputs [out, 1], or of the inputs [1, in] of what the config calls feed-forward."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from ...core.method import Method
from ...core.site import Site
from ...methods.weight.ia3 import IA3
from ...sites.body import Body
from ..config import Config
from ..pieces import Held, Piece, grouped, shaped
from ..places import whole_site
from . import extras
from .config import targets
from .family import PREFIX
from .naming import named


class Ia3:
    """IA3, which side of a module is scaled as the config says."""

    peft_type = "IA3"

    def claims(self, method: Method) -> bool:
        return isinstance(method, IA3)

    def pieces(self, config: Config, body: Body, keys: Collection[str]) -> list[Piece]:
        config.inert("init_ia3_weights", "fan_in_fan_out")
        fed = config.names("feedforward_modules")
        whole = isinstance(config.data.get("feedforward_modules"), str)
        inputs = targets(Config({"target_modules": fed[0]}, config.asked), body) if whole else None
        made = []
        for path, site in extras.adapted(config, body).items():
            # a list is matched by the end of the path, wherever it begins
            at_input = path in inputs if inputs is not None else any(path.endswith(name) for name in fed)
            method, w = IA3(side=_side(site, at_input)), site.weight
            if at_input and isinstance(site.module, nn.modules.conv._ConvNd):
                raise config.error(
                    f"feedforward_modules with the convolution {path!r}", "its inputs cannot be scaled here"
                )
            flat = (1,) * (len(w.stored) - 2) if isinstance(site.module, nn.modules.conv._ConvNd) else None
            size = w.d_in if at_input else w.d_out
            there = (1, size, *flat) if flat is not None else (1, size) if at_input else (size, 1)
            made.append((method, [shaped(f"{PREFIX}{path}.ia3_l", site, "scale", (size,), there)]))
        return [*grouped(made), *extras.behind(config, body)]

    def config(self, held: Held, body: Body) -> dict[str, Any]:
        own = {spot: m for m, tensors in held if isinstance(m, IA3) for spot in tensors if spot}
        paths = {path for path, _ in own}
        inputs = [path for (path, param), m in own.items() if m.at_input(whole_site(body, path, "write IA3", param))]
        fed = named(inputs, body) if inputs else []
        if isinstance(fed, list) and {p for p in paths if any(p.endswith(name) for name in fed)} != set(inputs):
            fed = sorted(inputs)
        behind = extras.config(held, body, paths, "ia3_only")
        return {
            "target_modules": named(paths, body),
            "feedforward_modules": fed,
            "modules_to_save": behind["modules_to_save"],
        }


def _side(site: Site, at_input: bool) -> str:
    """The shortest word for it: most often the role of the site says which side is meant."""
    if IA3().at_input(site) == at_input:
        return "role"
    return "input" if at_input else "output"
