"""PEFT's orthogonal methods: OFT's and BOFT's blocks, HRA's reflections, RoAd's angles."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from torch import nn

from ...core.method import Method
from ...core.site import Site
from ...methods.weight.boft import BOFT
from ...methods.weight.hra import HRA
from ...methods.weight.oft import OFT
from ...methods.weight.road import RoAd
from ...sites.body import Body
from ..config import Config
from ..pieces import Held, Piece, Slot, expect, grouped, one, shaped
from . import extras
from .family import PREFIX
from .naming import named

NEUMANN = (0, 18)  # the first version whose Neumann series is the one that is read here


class Oft:
    """OFT. Without the Neumann series PEFT turns the other way than with it, so that those q are the negatives of ours."""

    peft_type = "OFT"

    def claims(self, method: Method) -> bool:
        return isinstance(method, OFT)

    def pieces(self, config: Config, body: Body, keys: Collection[str]) -> list[Piece]:
        config.inert("init_weights", "fan_in_fan_out")
        method = self._method(config)
        chosen, made = extras.adapted(config, body), []
        for path, site in chosen.items():
            _only(config, site, nn.Linear, nn.Embedding)
            n, b = method.sizes(site.weight)
            shape = (1 if method.share else n, b * (b - 1) // 2)
            key = f"{PREFIX}{path}.oft_{'embedding_' if site.weight.lookup else ''}R.weight"
            made.append((method, [_signed(key, site, shape, -1 if method.exact else 1)]))
        return [*extras.in_front(config, body, keys, chosen, "oft_only"), *grouped(made), *extras.behind(config, body)]

    def _method(self, config: Config) -> OFT:
        exact = not config.take("use_cayley_neumann", bool, True)
        terms = config.take("num_cayley_neumann_terms", int, 5)
        said = re.findall(r"\d+", str(config.data.get("peft_version") or ""))
        if not exact and tuple(map(int, said[:2])) < NEUMANN:
            raise config.error(
                f"peft_version = {'.'.join(said) or None!r}", "PEFT < 0.18 had another series: convert it there"
            )
        if not exact and terms == 2:
            raise config.error(
                "num_cayley_neumann_terms = 2", "its I + 2 Q is no such series: there is no method for it"
            )
        return OFT(
            block_size=config.take("oft_block_size", int, 32) or OFT.block_size,
            blocks=config.take("r", int, 0) or None,
            terms=4 if terms == 3 and not exact else terms,  # PEFT computes the same for both
            exact=exact,
            share=config.take("block_share", bool, False),
            coft=config.take("coft", bool, False),
            eps=float(config.take("eps", (int, float), 6e-5)),
            block_dropout=config.take("module_dropout", (int, float), 0.0),
        )

    def config(self, held: Held, body: Body) -> dict[str, Any]:
        m, paths = next((m, [spot[0] for spot in tensors if spot]) for m, tensors in held if isinstance(m, OFT))
        return {
            "peft_version": ".".join(map(str, (*NEUMANN, 0))),
            "r": m.blocks or 0,
            "oft_block_size": 0 if m.blocks else m.block_size,
            "use_cayley_neumann": not m.exact,
            "num_cayley_neumann_terms": m.terms,
            "block_share": m.share,
            "coft": m.coft,
            "eps": m.eps,
            "module_dropout": m.block_dropout,
            "target_modules": named(paths, body),
            **extras.config(held, body, paths, "oft_only"),
        }


class Boft:
    """BOFT."""

    peft_type = "BOFT"

    def claims(self, method: Method) -> bool:
        return isinstance(method, BOFT)

    def pieces(self, config: Config, body: Body, keys: Collection[str]) -> list[Piece]:
        config.inert("init_weights", "fan_in_fan_out")
        method = BOFT(
            block_size=config.take("boft_block_size", int, 4) or BOFT.block_size,
            blocks=config.take("boft_block_num", int, 0) or None,
            factors=config.take("boft_n_butterfly_factor", int, 1),
            block_dropout=config.take("boft_dropout", (int, float), 0.0),
        )
        chosen, made = extras.adapted(config, body), []
        for path, site in chosen.items():
            _only(config, site, nn.Linear)
            (d_out, d), b, key = site.weight.shape, method.size(site.weight), f"{PREFIX}{path}.boft_"
            blocks = shaped(f"{key}R", site, "blocks", (method.factors * d, b), (method.factors, d // b, b, b))
            made.append((method, [blocks, shaped(f"{key}s", site, "scale", (d_out,), (d_out, 1))]))
        return [*extras.in_front(config, body, keys, chosen, "boft_only"), *grouped(made), *extras.behind(config, body)]

    def config(self, held: Held, body: Body) -> dict[str, Any]:
        m, paths = next((m, [spot[0] for spot in tensors if spot]) for m, tensors in held if isinstance(m, BOFT))
        return {
            "boft_block_size": 0 if m.blocks else m.block_size,
            "boft_block_num": m.blocks or 0,
            "boft_n_butterfly_factor": m.factors,
            "boft_dropout": m.block_dropout,
            "target_modules": named(paths, body),
            **extras.config(held, body, paths, "boft_only"),
        }


class Hra:
    """HRA."""

    peft_type = "HRA"

    def claims(self, method: Method) -> bool:
        return isinstance(method, HRA)

    def pieces(self, config: Config, body: Body, keys: Collection[str]) -> list[Piece]:
        config.inert("init_weights", "fan_in_fan_out")
        method = HRA(r=config.take("r", int, 8), gram_schmidt=config.take("apply_GS", bool, False))
        chosen, made = extras.adapted(config, body), []
        for path, site in chosen.items():
            _only(config, site, nn.Linear, nn.Conv2d)
            shape = (site.weight.d_in, method.r)
            made.append((method, [shaped(f"{PREFIX}{path}.hra_u", site, "columns", shape, shape)]))
        return [*extras.in_front(config, body, keys, chosen, "hra_only"), *grouped(made), *extras.behind(config, body)]

    def config(self, held: Held, body: Body) -> dict[str, Any]:
        m, paths = next((m, [spot[0] for spot in tensors if spot]) for m, tensors in held if isinstance(m, HRA))
        behind = extras.config(held, body, paths, "hra_only")
        return {"r": m.r, "apply_GS": m.gram_schmidt, "target_modules": named(paths, body), **behind}


class Road:
    """RoAd."""

    peft_type = "ROAD"

    def claims(self, method: Method) -> bool:
        return isinstance(method, RoAd)

    def pieces(self, config: Config, body: Body, keys: Collection[str]) -> list[Piece]:
        config.inert("init_weights")
        variant = config.take("variant", str, "road_1").removeprefix("road_")
        method, made = RoAd(variant=variant, group=config.take("group_size", int, 64)), []
        for path, site in extras.adapted(config, body).items():
            _only(config, site, nn.Linear)
            size, key = (method.count(site) // 2,), f"{PREFIX}{path}.road_"
            made.append((method, [shaped(key + name, site, name, size, size) for name in ("theta", "alpha")]))
        return [*grouped(made), *extras.behind(config, body)]

    def config(self, held: Held, body: Body) -> dict[str, Any]:
        m, paths = next((m, [spot[0] for spot in tensors if spot]) for m, tensors in held if isinstance(m, RoAd))
        saved = extras.config(held, body, paths, "none")["modules_to_save"]
        said = {"variant": f"road_{m.variant}", "group_size": m.group}
        return {**said, "target_modules": named(paths, body), "modules_to_save": saved}


def _signed(key: str, site: Site, shape: tuple[int, ...], sign: int) -> Slot:
    """A slot for a tensor that has the other sign in the file, or the same."""
    return one(key, site, "q", lambda t: sign * expect(t, shape), lambda t: sign * t)


def _only(config: Config, site: Site, *kinds: type[nn.Module]) -> None:
    """GraftError unless PEFT has the method for the module, and computes there what it merges."""
    module, kernel = site.module, getattr(site.module, "kernel_size", (1, 1))
    if not isinstance(module, kinds) or getattr(module, "groups", 1) > 1 or len(set(kernel)) > 1:
        found = f"{site.path!r}, a {type(module).__name__} with a weight {list(site.weight.stored)}"
        raise config.error(found, "PEFT has the method for other modules only; keep it in graftwork's own format")
