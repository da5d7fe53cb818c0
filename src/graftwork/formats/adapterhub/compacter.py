"""AdapterHub's Compacter (BnConfig with phm_layer): bottlenecks whose matrices are sums of Kronecker products."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.errors import GraftError
from ...core.method import Method
from ...core.site import Site
from ...methods.activation.compacter import PHM
from ..config import Config
from ..pieces import Slot, one
from .defaults import BOTTLENECK, SCHEMES
from .family import Held, Made, activation, left_out, named_activation
from .names import Names
from .placement import FLAGS, located, place, scheme, widths

# of the plain bottleneck: what a PHM adapter here does not have, and the value that means so
WITHOUT = {
    "ln_before": False,
    "ln_after": False,
    "scaling": 1.0,
    "dropout": 0.0,
    "stochastic_depth": 0.0,
    "is_parallel": False,
    "phm_bias": True,
}
STARTS = ("init_weights", "init_weights_seed", "phm_c_init", "phm_init_range", "hypercomplex_nonlinearity")


class Compacters:
    """`phm`."""

    def reads(self, config: Mapping[str, Any]) -> bool:
        return "architecture" not in config and bool(config.get("phm_layer"))

    def claims(self, method: Method) -> bool:
        return isinstance(method, PHM)

    def pieces(self, config: Config, names: Names, keys: set[str], warnings: list[str]) -> Made:
        config.inert("phm_layer", "adapter_residual_before_ln", *STARTS)
        config.inert("factorized_phm_rule", "shared_W_phm")  # folded by `unpack`
        for option, value in WITHOUT.items():
            if config.take(option, (bool, float, int, str), value) != value:
                raise config.error(
                    f"{option} = {config.data[option]!r} with phm_layer", "graftwork's PHM has no such option"
                )
        if not config.take("learn_phm", bool, True):
            warnings.append("learn_phm = False: the shared rule is not held fixed when training goes on")
        kind, skip = scheme(config), left_out(config, names)
        flags = {which: config.take(flag, bool, False) for which, flag in FLAGS.items()}
        shared = config.take("shared_phm_rule", bool, True)
        whole = not config.take("factorized_phm_W", bool, True)
        rank = 0 if whole else config.take("phm_rank", int, 1)
        config.inert("phm_rank")
        made = []
        for block in names.blocks:
            for which in block.subs if block.index not in skip else ():
                if flags[which]:
                    position, site = place(kind, names, block, which, config)
                    method = PHM(
                        n=config.take("phm_dim", int, 4), d=widths(config, names, block), rank=rank, shared=shared,
                        act=activation(config, "gelu"), position=position,
                    )  # fmt: skip
                    made.append((method, _slots(method, site, names, names.layer(block, which))))
        if shared and len({method for method, _ in made}) > 1:
            raise config.error(
                "a rule shared by adapters of several widths", "graftwork shares a rule among equal adapters"
            )
        return made

    def config(self, held: Sequence[Held], names: Names) -> dict[str, Any]:
        first = held[0].method
        assert isinstance(first, PHM)
        places = [(one.method, site, *located(one.method, site, names)) for one in held for site in one.sites]
        numbers = {which: {block.index for _, _, block, w, _ in places if w == which} for which in FLAGS}
        hidden, m = names.settings.hidden_size, first.width(held[0].sites[0])
        return {
            **BOTTLENECK,
            **SCHEMES[places[0][-1]],
            **{flag: bool(numbers[which]) for which, flag in FLAGS.items()},
            "leave_out": [b.index for b in names.blocks if not any(b.index in found for found in numbers.values())],
            "reduction_factor": hidden // m if hidden % m == 0 else hidden / (m + 0.5),
            "non_linearity": named_activation(first.act),
            "phm_layer": True,
            "phm_dim": first.n,
            "phm_rank": first.rank or 1,
            "factorized_phm_W": bool(first.rank),
            "shared_phm_rule": first.shared,
        }

    def plain(self, method: Method, site: Site) -> Method:
        assert isinstance(method, PHM)
        return dataclasses.replace(method, d=method.width(site), reduction=32, init_std=1e-4)

    def moved(self, method: Method, site: Site, names: Names) -> tuple[Method, Site]:
        return method, site

    def unpack(self, config: Config, names: Names, tensors: dict[str, Tensor], warnings: list[str]) -> bool:
        """A rule kept as two factors becomes their product, and matrices that all layers share are each layer's own."""
        exact = True
        for left in [key for key in tensors if key.endswith("phm_rule_left")]:
            a, b = tensors.pop(left), tensors.pop(left.replace("_left", "_right"), None)
            if b is None or a.dim() != 3 or b.dim() != 3 or a.shape[2] != b.shape[1] or len(a) != len(b):
                raise GraftError(
                    f"{config.asked}: {left!r}", "its other factor is missing or does not fit", "restore the file"
                )
            tensors[left.removesuffix("_left")] = torch.bmm(a, b)
            exact = False
        for side in ("down", "up"):
            for key in [key for key in tensors if key.startswith(names.shared(f"W_{side}"))]:
                word = "down.0" if side == "down" else "up"
                value, rest = tensors.pop(key), key.removeprefix(names.shared(f"W_{side}"))
                for bias in [k for k in tensors if k.endswith(f".adapter_{word}.b")]:
                    tensors[bias.removesuffix("b") + f"W{rest}"] = value.clone()
                exact = False
        if not exact:
            warnings.append(
                "rules in two factors, or matrices shared by all layers, are read as whole ones of each layer"
            )
        return exact

    def pack(self, config: Config, names: Names, tensors: dict[str, Tensor]) -> None:
        pass


def _slots(method: PHM, site: Site, names: Names, layer: str) -> list[Slot]:
    slots = [one(names.shared("phm_rule"), None, "rule.a")] if method.shared else []
    for here, there in (("down", "adapter_down.0"), ("up", "adapter_up")):
        pairs = [("s", "W_left"), ("t", "W_right")] if method.rank else [("s", "W")]
        pairs += [("bias", "b")] + ([] if method.shared else [("own.a", "phm_rule")])
        slots += [one(names.at(layer, "adapters", f"{there}.{leaf}"), site, f"{here}.{name}") for name, leaf in pairs]
    return slots
