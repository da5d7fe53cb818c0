"""PEFT's LoHa and LoKr: hada_w1_a, hada_w1_b, ... and lokr_w1, lokr_w2_a, ... per module, with their ranks in the config alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection
from typing import Any

from torch import nn

from ...core.method import Method
from ...core.site import Site
from ...methods.weight.loha import LoHa
from ...methods.weight.lokr import LoKr
from ...sites.body import Body
from ..config import Config
from ..pieces import Held, Piece, Slot, expect, grouped, one, shaped
from . import extras
from .config import pattern
from .family import PREFIX
from .naming import exact, named

Lycoris = LoHa | LoKr


class Loha:
    """LoHa; one of them for each different rank and alpha."""

    peft_type = "LOHA"

    def claims(self, method: Method) -> bool:
        return isinstance(method, LoHa)

    def pieces(self, config: Config, body: Body, keys: Collection[str]) -> list[Piece]:
        made = []
        for path, site in _adapted(config, body).items():
            method = LoHa(**_common(config, path))
            made.append((method, loha_slots(method, site, f"{PREFIX}{path}.hada_")))
        return [*grouped(made), *extras.behind(config, body)]

    def config(self, held: Held, body: Body) -> dict[str, Any]:
        return _config(held, body, LoHa)


class Lokr:
    """LoKr; one of them for each different rank and alpha."""

    peft_type = "LOKR"

    def claims(self, method: Method) -> bool:
        return isinstance(method, LoKr)

    def pieces(self, config: Config, body: Body, keys: Collection[str]) -> list[Piece]:
        both, scaled = (config.take(name, bool, False) for name in ("decompose_both", "rank_dropout_scale"))
        factor = config.take("decompose_factor", int, -1)
        made = []
        for path, site in _adapted(config, body).items():
            method = LoKr(
                decompose_both=both,
                decompose_factor=None if factor < 1 else factor,
                rank_dropout_scale=scaled,
                **_common(config, path),
            )
            shapes = method.shapes(site.weight)
            if len(shapes.kernel) == 1 and not shapes.right_low:
                found = f"{path!r} is a convolution over one axis whose W2 is whole"
                raise config.error(found, "PEFT's update of such a module is no Kronecker product")
            made.append((method, lokr_slots(method, site, f"{PREFIX}{path}.lokr_")))
        return [*grouped(made), *extras.behind(config, body)]

    def config(self, held: Held, body: Body) -> dict[str, Any]:
        m = next(m for m, _ in held if isinstance(m, LoKr))
        return {
            "decompose_both": m.decompose_both,
            "decompose_factor": m.decompose_factor or -1,
            "rank_dropout_scale": m.rank_dropout_scale,
            **_config(held, body, LoKr),
        }


def loha_slots(method: LoHa, site: Site, key: str) -> list[Slot]:
    """Which tensor of the delta is which key, `key` in front of all."""
    w, r, kernel = site.weight, method.r, method.kernel(site.weight)
    d_in = w.d_in // math.prod(kernel)
    slots = []
    for i in (1, 2):
        # beside a core it is stored [r, out]
        slots.append(_turned(f"{key}w{i}_a", site, f"up{i}", (w.d_out, r), bool(kernel)))
        slots.append(shaped(f"{key}w{i}_b", site, f"down{i}", (r, d_in), (r, d_in)))
        if kernel:
            slots.append(_core(f"{key}t{i}", site, f"core{i}", r, kernel))
    return slots


def lokr_slots(method: LoKr, site: Site, key: str) -> list[Slot]:
    """Which tensor of the delta is which key, `key` in front of all."""
    d, r = method.shapes(site.weight), method.r
    n = d.in_n * math.prod(d.kernel)
    if d.left_low:
        left = [
            shaped(f"{key}w1_a", site, "left.up", (d.out_l, r), (d.out_l, r)),
            shaped(f"{key}w1_b", site, "left.down", (r, d.in_m), (r, d.in_m)),
        ]
    else:
        left = [shaped(f"{key}w1", site, "left.whole", (d.out_l, d.in_m), (d.out_l, d.in_m))]
    if not d.right_low:
        right = [shaped(f"{key}w2", site, "right.whole", (d.out_k, n), (d.out_k, d.in_n, *d.kernel))]
    else:
        columns = d.in_n if d.core else n
        right = [
            _turned(f"{key}w2_a", site, "right.up", (d.out_k, r), d.core),
            shaped(f"{key}w2_b", site, "right.down", (r, columns), (r, columns)),
            *([_core(f"{key}t2", site, "right.core", r, d.kernel)] if d.core else []),
        ]
    return [*left, *right]


def _adapted(config: Config, body: Body) -> dict[str, Site]:
    """The sites by path. Convolutions in groups and those that pad otherwise than with zeros: here they are as PEFT merges them."""
    config.inert("init_weights")
    found = extras.adapted(config, body)
    for path, site in found.items():
        conv = isinstance(site.module, nn.modules.conv._ConvNd)
        if conv and site.module.padding_mode != "zeros":
            what = f"{path}: PEFT's own pass pads the update with zeros, not with {site.module.padding_mode!r} as the module does"
            config.warnings.append(f"{what}; here it is as PEFT merges it")
    return found


def _common(config: Config, path: str) -> dict[str, Any]:
    return {
        "r": pattern(config, "rank_pattern", path, config.take("r", int, 8)),
        "alpha": float(pattern(config, "alpha_pattern", path, config.take("alpha", (int, float), 8))),
        "rank_dropout": config.take("rank_dropout", (int, float), 0.0),
        "module_dropout": config.take("module_dropout", (int, float), 0.0),
        "effective": config.take("use_effective_conv2d", bool, False),
    }


def _turned(key: str, site: Site, name: str, shape: tuple[int, int], turned: bool) -> Slot:
    if not turned:
        return shaped(key, site, name, shape, shape)
    return one(key, site, name, lambda t: expect(t, shape[::-1]).T, lambda t: t.T)


def _core(key: str, site: Site, name: str, r: int, kernel: tuple[int, ...]) -> Slot:
    """Of a kernel of one axis there is a second of length 1 there."""
    return shaped(key, site, name, (r, r, *kernel), (r, r, *kernel, *((1,) if len(kernel) == 1 else ())))


def _config(held: Held, body: Body, kind: type[Lycoris]) -> dict[str, Any]:
    own = [(m, spot[0]) for m, tensors in held if isinstance(m, kind) for spot in tensors if spot]
    ranks, alphas = Counter(m.r for m, _ in own), Counter(m.alpha for m, _ in own)
    (r, _), (alpha, _) = ranks.most_common(1)[0], alphas.most_common(1)[0]
    m = own[0][0]
    return {
        "r": r,
        "alpha": _whole(alpha),
        "rank_pattern": {exact(path): m.r for m, path in own if m.r != r},
        "alpha_pattern": {exact(path): _whole(m.alpha) for m, path in own if m.alpha != alpha},
        "rank_dropout": m.rank_dropout,
        "module_dropout": m.module_dropout,
        "use_effective_conv2d": m.effective,
        "target_modules": named([path for _, path in own], body),
        "modules_to_save": extras.config(held, body, [], "none")["modules_to_save"],
    }


def _whole(alpha: float) -> int | float:
    return int(alpha) if alpha == int(alpha) else alpha
