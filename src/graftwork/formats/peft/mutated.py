"""LoRA files whose initialisation changed the backbone (PiSSA, OLoRA): made into plain ones, so that it need not change.

PEFT takes s B_0 A_0 out of the weight, W_0 = W - s B_0 A_0, and trains A and B from there. A file holds A and B only; A_0 and B_0
follow from W. So W_0 + s B A = W + s [B, -B_0] [A; A_0], a plain LoRA of twice the rank.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from ...core.errors import GraftError
from ...core.weight import Weight
from ...methods.weight.forms.starts import Pair, orthonormal, principal
from ...sites.body import Body
from ..config import Config
from ..places import whole_site
from . import extras
from .config import config_of, pattern, targets
from .family import PREFIX


def plain(config: Config, tensors: dict[str, Tensor], body: Body) -> tuple[Config, dict[str, Tensor]]:
    """The same adapter for the backbone as it is; anything but a LoRA of these initialisations stays what it was."""
    start = config.data.get("init_lora_weights")
    found = re.fullmatch(r"(pissa)(_niter_\d+)?|(olora)", start.lower()) if isinstance(start, str) else None
    if config.data.get("peft_type") != "LORA" or found is None:
        return config, tensors
    out = dict(tensors)
    chosen = targets(config, body, extras.saved_modules(config, body))
    rslora = config.take("use_rslora", bool, False)
    if config.names("target_parameters"):
        raise config.error(f"init_lora_weights = {start!r} with target_parameters", "these are not supported together")
    for path in chosen:
        site = whole_site(body, path, config.asked)
        r = pattern(config, "rank_pattern", path, config.take("r", int, 8))
        alpha = pattern(config, "alpha_pattern", path, config.take("lora_alpha", (int, float), 8))
        keys = [f"{PREFIX}{path}.lora_{side}.weight" for side in "AB"]
        if any(key not in out for key in keys):
            continue  # said to be missing with all others
        if not site.weight.linear or (found[3] and not isinstance(site.module, nn.Linear)):
            raise config.error(
                f"init_lora_weights = {start!r} at {path!r}", "the peer defines it for linear layers only"
            )
        stored = site.module._parameters["weight"]
        assert stored is not None
        scale = alpha / (r**0.5 if rslora else r)
        dense = site.weight.dense(stored.detach()).float().cpu()
        first = orthonormal(dense, r) if found[3] else principal(dense, r, scale)
        out |= _joined({key: out[key] for key in keys}, first, site.weight, r, config.asked)
    if found[2]:
        config.warnings.append(
            f"init_lora_weights = {start!r} took a random approximation of the SVD; the exact one stands in"
        )
    times = 2**0.5 if rslora else 2
    data = config.data | {
        "init_lora_weights": True,
        "r": 2 * config.take("r", int, 8),
        "lora_alpha": times * config.take("lora_alpha", (int, float), 8),
        "rank_pattern": {key: 2 * r for key, r in config.take("rank_pattern", dict, {}).items()},
        "alpha_pattern": {key: times * a for key, a in config.take("alpha_pattern", dict, {}).items()},
    }
    made = config_of(data, config.asked)
    made.warnings = config.warnings
    return made, out


def _joined(own: dict[str, Tensor], first: Pair, w: Weight, r: int, asked: str) -> dict[str, Tensor]:
    (key_a, a), (key_b, b) = own.items()
    if tuple(a.shape) != (r, w.d_in) or tuple(b.shape) != (w.d_out, r):
        found = f"shapes {list(a.shape)} and {list(b.shape)}, expected {[r, w.d_in]} and {[w.d_out, r]}"
        raise GraftError(f"{asked}: {key_a!r}, {key_b!r}", found, "the file was made for another backbone")
    return {
        key_a: torch.cat([a, first[0].to(a.dtype)]),
        key_b: torch.cat([b, -first[1].to(b.dtype)], dim=1),
    }
