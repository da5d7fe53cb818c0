"""The PEFT config of each component in the header of diffusers' files, under lora_adapter_metadata."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from ...core.errors import GraftError
from ...methods.weight.dora import DoRA
from ...methods.weight.lora import LoRA
from ...sites.body import Body
from ..config import Config
from ..peft.config import ABOUT, ends, pattern
from ..peft.lora import ABSENT, HARMLESS
from ..peft.naming import exact
from .modules import Keys, Module, alpha_of, method_of

HEADER = "lora_adapter_metadata"
# what a PEFT config says that the tensors say too, or that is of training only
KNOWN = (
    *("r", "rank_pattern", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("use_dora", "lora_bias", "lora_dropout", "fan_in_fan_out", "loftq_config", "ensure_weight_tying", *ABSENT),
)


class Header(Config):
    """The PEFT config of one component, in the header of a file."""

    def error(self, found: str, do: str) -> GraftError:
        return GraftError(f"{self.asked}: {HEADER}", found, do)


def configs(texts: Mapping[str, str], asked: str) -> dict[str, Header]:
    """The config of each component, by its name; "" where the header has one for all. GraftError for an option that is not supported."""
    asked_header = f"{asked}: {HEADER}"
    try:
        data = json.loads(texts.get(HEADER, "{}"))
        if not isinstance(data, dict):
            raise ValueError(f"{type(data).__name__}, not an object")
    except (ValueError, RecursionError) as error:
        raise GraftError(asked_header, f"damaged: {error}", "restore the file") from error
    split: dict[str, dict[str, Any]] = {}
    for key, value in data.items():
        component, _, option = key.rpartition(".")
        split.setdefault(component, {})[option] = value
    out = {component: Header(options, asked) for component, options in split.items()}
    for config in out.values():
        start = config.take("init_lora_weights", (bool, str), True)
        if start not in HARMLESS:
            raise config.error(
                f"init_lora_weights = {start!r}", "it changed the base in a way that the file does not tell"
            )
        config.inert(*ABOUT, *KNOWN)
        for name in ("lora_alpha", "alpha_pattern", "use_rslora"):
            config.inert(name)
        config.finish()
    return out


def module(
    name: str, path: str, keys: Keys, tensors: Mapping[str, Tensor], alpha: float | None, said: Mapping[str, Header]
) -> Module:
    """One module of the file. Its scale is what the header says, or the number beside it, or 1."""
    component, _, rest = name.partition(".")
    config = said.get(component, said.get(""))
    if config is None or alpha is not None:
        return path, method_of(keys, tensors, alpha), keys
    default = config.take("lora_alpha", (int, float), 8)
    given = pattern(config, "alpha_pattern", rest if component in said else name, default)
    try:
        alpha = float(given)
    except OverflowError:
        raise config.error(f"an alpha of {str(given)[:20]}...", "restore the file") from None
    return path, method_of(keys, tensors, alpha, config.take("use_rslora", bool, False)), keys


def config_of(modules: Collection[Module], body: Body, asked: str) -> dict[str, Any]:
    """The header: for each component what PEFT needs to build the same modules."""
    split: dict[str, dict[str, Module]] = {}
    for one in modules:
        component, _, rest = one[2]["down"].removesuffix(".lora_A.weight").partition(".")
        split.setdefault(component, {})[rest] = one
    out: dict[str, Any] = {}
    for component, by_path in split.items():
        methods = {path: method for path, (_, method, _) in by_path.items()}
        kinds = {(isinstance(m, DoRA), isinstance(m, LoRA) and m.bias) for m in methods.values()}
        if len(kinds) > 1:
            found = "modules with and without magnitudes or biases"
            raise GraftError(f"{asked}: {component}", found, "diffusers has one of both for all modules")
        (dora, bias), rslora = kinds.pop(), all(isinstance(m, LoRA) and m.rslora for m in methods.values())
        alphas = {p: m.alpha if rslora and isinstance(m, LoRA) else alpha_of(m) for p, m in methods.items()}
        r, alpha = (
            Counter(values).most_common(1)[0][0] for values in ([m.r for m in methods.values()], alphas.values())
        )
        own = {path for path, _, _ in by_path.values()}
        over = any(ends(path, rest) for path in body.modules for rest in by_path if path not in own)
        options = {
            "r": r,
            "lora_alpha": alpha,
            "rank_pattern": {exact(path): m.r for path, m in methods.items() if m.r != r},
            "alpha_pattern": {exact(path): value for path, value in alphas.items() if value != alpha},
            "target_modules": "|".join(map(re.escape, sorted(by_path))) if over else sorted(by_path),
            "use_dora": dora,
            "use_rslora": rslora,
            "lora_bias": bias,
        }
        out |= {f"{component}.{name}": value for name, value in options.items()}
    return out
