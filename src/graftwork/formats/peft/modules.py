"""PEFT's LN tuning, which trains copies of whole modules: their values stand in the place of the backbone's."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ...core.body import Body
from ...core.method import Method
from ...methods.weight.full import Full
from ..pieces import Held, Piece, grouped, one
from ..places import owner_sites
from . import extras
from .config import Config, targets
from .family import PREFIX
from .naming import covering, named


class LnTuning:
    """`full` on the norms, or on whatever modules the config names."""

    peft_type = "LN_TUNING"

    def claims(self, method: Method) -> bool:
        return isinstance(method, Full) and not method.only

    def pieces(self, config: Config, body: Body, keys: Collection[str]) -> list[Piece]:
        chosen = targets(config, body, extras.saved_modules(config, body))
        made = []
        for path in (path for path in body.modules if path in chosen):
            for site in owner_sites(body, path):
                inner = f"{PREFIX}{path}.ln_tuning_layers{site.path[len(path) :]}."
                owned = [name for name, p in site.module._parameters.items() if p is not None]
                made.append((Full(), [one(inner + name, site, f"values.{name}") for name in owned]))
        return [*grouped(made), *extras.behind(config, body)]

    def config(self, held: Held, body: Body) -> dict[str, Any]:
        norms = {site.path for site in body.anatomy.of("norm")}
        paths = [spot[0] for m, tensors in held if self.claims(m) for spot in tensors if spot]
        own = [path for path in paths if path in norms] or covering(paths, body)
        rest = covering([path for path in paths if path in set(paths) - norms], body) if set(paths) & norms else []
        return {"target_modules": named(own, body), "modules_to_save": rest or None}
