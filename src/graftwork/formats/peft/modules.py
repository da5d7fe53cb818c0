"""PEFT's LN tuning, which trains copies of whole modules (their values stand in the place of the backbone's), and BEFT's biases."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ...core.method import Method
from ...methods.weight.bitfit import BitFit
from ...methods.weight.full import Full
from ...methods.weight.ln_tuning import LNTuning
from ...sites.body import Body
from ..config import Config
from ..pieces import Held, Piece, grouped, one, shaped
from ..places import owner_sites
from . import extras
from .config import targets
from .family import PREFIX
from .naming import covering, named


class LnTuning:
    """`full` on the norms, or on whatever modules the config names."""

    peft_type = "LN_TUNING"

    def claims(self, method: Method) -> bool:
        return isinstance(method, LNTuning) or (isinstance(method, Full) and not method.only)

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


class Beft:
    """A difference for the bias of each linear layer that the config names, which need not have one."""

    peft_type = "BEFT"

    def claims(self, method: Method) -> bool:
        return isinstance(method, BitFit)

    def pieces(self, config: Config, body: Body, keys: Collection[str]) -> list[Piece]:
        config.inert("init_weights", "fan_in_fan_out")
        method, made = BitFit(add_missing=True), []
        for path, site in extras.adapted(config, body).items():
            d = site.weight.d_out
            made.append((method, [shaped(f"{PREFIX}{path}.beft_bias", site, "shift.bias", (d,), (1, d))]))
        return [*grouped(made), *extras.behind(config, body)]

    def config(self, held: Held, body: Body) -> dict[str, Any]:
        paths = [spot[0] for m, tensors in held if isinstance(m, BitFit) for spot in tensors if spot]
        behind = extras.config(held, body, [], "none")["modules_to_save"]
        return {"target_modules": named(paths, body), "modules_to_save": behind}
