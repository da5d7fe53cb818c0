"""PEFT's LoRA in all its forms: rsLoRA, DoRA, patterns of ranks, embeddings, convolutions, experts' parameters, biases."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from ...core.errors import GraftError
from ...core.method import Method
from ...core.site import Site
from ...core.weight import is_conv1d
from ...methods.weight.dora import DoRA
from ...methods.weight.lora import LoRA
from ...sites.body import Body
from ..config import Config
from ..pieces import Held, Piece, Slot, grouped, shaped
from ..places import whole_site
from . import extras, tokens
from .config import ends, pattern, targets
from .family import PREFIX
from .naming import exact, named
from .parameters import factors

# how A and B started: it changes no number of a trained file, where the base was left as it was (see mutated.py)
HARMLESS = (True, False, "gaussian", "eva", "orthogonal", "mica")
ABSENT = (
    "megatron_config",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
)
MODULES = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Lora:
    """LoRA(r, alpha, dropout, rslora, bias) and DoRA; one of them for each different rank and alpha."""

    peft_type = "LORA"

    def claims(self, method: Method) -> bool:
        return isinstance(method, LoRA | DoRA)

    def pieces(self, config: Config, body: Body, keys: Collection[str]) -> list[Piece]:
        start = config.take("init_lora_weights", (bool, str), True)
        if start not in HARMLESS:
            raise config.error(
                f"init_lora_weights = {start!r}", "it changed the base in a way that the file does not tell"
            )
        config.inert(*ABSENT, "loftq_config", "ensure_weight_tying", "fan_in_fan_out")
        whole = extras.saved_modules(config, body)
        chosen = targets(config, body, whole)
        modules = [path for path in body.modules if path in chosen]
        made = [pair for path in modules for pair in self._modules(config, body, path)]
        made += self._parameters(config, body)
        front = extras.in_front(config, body, keys, modules, "lora_only")
        return [*front, *tokens.inside(config, body), *grouped(made), *extras.behind(config, body)]

    def _modules(self, config: Config, body: Body, path: str) -> Iterator[tuple[Method, list[Slot]]]:
        key = f"{PREFIX}{path}."
        if not isinstance(body.modules[path], nn.MultiheadAttention):
            yield self._module(config, path, whole_site(body, path, config.asked), key)
            return
        # PEFT adapts the packed projection and the output's together, and merges the latter twice for every pass
        twice = f"{path}.out_proj: PEFT applies this update twice; here its alpha is doubled, so as to compute the same"
        config.warnings.append(twice)
        yield self._module(config, path, whole_site(body, path, config.asked, "in_proj_weight"), key)
        out = whole_site(body, f"{path}.out_proj", config.asked)
        method, slots = self._module(config, path, out, f"{key}base_layer.out_proj.")
        yield replace(method, alpha=2 * float(_alpha(method))), slots

    def _module(self, config: Config, path: str, site: Site, key: str) -> tuple[LoRA | DoRA, list[Slot]]:
        method = self._method(config, path, site)
        w, r = site.weight, method.r
        a, b = ("lora_embedding_A", "lora_embedding_B") if w.lookup else ("lora_A.weight", "lora_B.weight")
        kernel = _kernel(site, config)
        deep = (r, w.d_in // math.prod(kernel), *kernel)  # A is a convolution as the host is, B one of 1 x 1
        slots = [
            shaped(key + a, site, "down", (r, w.d_in), deep),
            shaped(key + b, site, "up", (w.d_out, r), (w.d_out, r, *(1 for _ in kernel))),
        ]
        if isinstance(method, DoRA):
            shape = (1, w.d_out, *(1 for _ in kernel)) if kernel else (w.d_out,)
            slots.append(shaped(f"{key}lora_magnitude_vector", site, "magnitude", (w.d_out,), shape))
        elif method.bias:
            slots.append(shaped(f"{key}lora_B.bias", site, "shift", (w.d_out,), (w.d_out,)))
        return method, slots

    def _method(self, config: Config, path: str, site: Site) -> LoRA | DoRA:
        r = pattern(config, "rank_pattern", path, config.take("r", int, 8))
        alpha = float(pattern(config, "alpha_pattern", path, config.take("lora_alpha", (int, float), 8)))
        dropout = config.take("lora_dropout", (int, float), 0.0) if site.weight.linear else 0.0
        rslora, bias = config.take("use_rslora", bool, False), config.take("lora_bias", bool, False)
        if not config.take("use_dora", bool, False):
            return LoRA(r=r, alpha=alpha, dropout=dropout, rslora=rslora, bias=bias)
        if bias:
            raise config.error("lora_bias with use_dora", "these are not supported together")
        return DoRA(r=r, alpha=alpha * r**0.5 if rslora else alpha, dropout=dropout)

    def _parameters(self, config: Config, body: Body) -> Iterator[tuple[Method, list[Slot]]]:
        names = config.names("target_parameters")
        for path, module in body.modules.items() if names else ():
            chosen = [name for name in module._parameters if any(ends(f"{path}.{name}", one) for one in names)]
            for depth, name in enumerate(reversed(chosen)):  # the first of a module is wrapped first, so the innermost
                site = whole_site(body, path, config.asked, name)
                method = self._method(config, f"{path}.{name}", site)
                key = f"{PREFIX}{path}." + "base_layer." * depth
                yield method, factors(site, method.r, key)

    def config(self, held: Held, body: Body) -> dict[str, Any]:
        own = [(m, list(t)) for m, t in held if isinstance(m, LoRA | DoRA)]
        places = [(m, place) for m, listed in own for place in listed if place is not None]
        dora = {isinstance(m, DoRA) for m, _ in own}
        if len(dora) > 1:
            raise GraftError(
                "write LoRA and DoRA as one PEFT adapter", "PEFT has one of them for all modules", "split it"
            )
        ranks = Counter(m.r for m, _ in places)
        alphas = Counter(_alpha(m) for m, _ in places)
        r, alpha = ranks.most_common(1)[0][0], alphas.most_common(1)[0][0]
        first = own[0][0]
        heads = {path for path, m in body.modules.items() if isinstance(m, nn.MultiheadAttention)}
        places = [
            (m, (path, param)) for m, (path, param) in places if path.removesuffix(".out_proj") not in heads - {path}
        ]
        modules = [path for _, (path, param) in places if _is_module(body, path, param)]
        parameters = [f"{path}.{param}" for _, (path, param) in places if not _is_module(body, path, param)]
        paths = {place: place[0] if _is_module(body, *place) else ".".join(place) for _, place in places}
        return {
            "r": r,
            "lora_alpha": alpha,
            "lora_dropout": max(m.dropout for m, _ in own),
            "use_dora": dora == {True},
            "use_rslora": isinstance(first, LoRA) and first.rslora,
            "lora_bias": isinstance(first, LoRA) and first.bias,
            "fan_in_fan_out": any(is_conv1d(body.modules[path]) for path in modules),
            "target_modules": named(modules, body),
            "target_parameters": parameters or None,
            "rank_pattern": {exact(paths[place]): m.r for m, place in places if m.r != r},
            "alpha_pattern": {exact(paths[place]): _alpha(m) for m, place in places if _alpha(m) != alpha},
            **extras.config(held, body, modules, "lora_only"),
            **tokens.config_inside(held),
        }


def _kernel(site: Site, config: Config) -> tuple[int, ...]:
    """The kernel of a convolution, () for other modules. GraftError for one whose update PEFT defines otherwise."""
    module = site.module
    if not isinstance(module, nn.modules.conv._ConvNd):
        return ()
    if module.groups > 1 or module.transposed:
        found = f"{site.path!r} is a convolution in {module.groups} groups" + (
            ", transposed" if module.transposed else ""
        )
        raise config.error(found, "PEFT's update of such a module is no change of its weight")
    if module.padding_mode != "zeros":
        found = f"{site.path}: PEFT's own pass pads the update with zeros, not with {module.padding_mode!r} as the module does"
        config.warnings.append(f"{found}; here it is as PEFT merges it")
    return tuple(module.kernel_size)


def _is_module(body: Body, path: str, param: str) -> bool:
    """Whether PEFT adapts the place as a module, not as a parameter."""
    if isinstance(body.modules[path], nn.MultiheadAttention):
        return param == "in_proj_weight"
    return param == "weight" and (isinstance(body.modules[path], MODULES) or is_conv1d(body.modules[path]))


def _alpha(method: LoRA | DoRA) -> float:
    alpha = method.scale * method.r if isinstance(method, DoRA) else method.alpha
    return int(alpha) if alpha == int(alpha) else alpha
