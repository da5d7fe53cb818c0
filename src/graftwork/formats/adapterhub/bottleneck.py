"""AdapterHub's bottleneck adapters (BnConfig): Houlsby's, Pfeiffer's, parallel ones, Adapter+, MAD-X with an invertible one.

With h the sub-layer's output, x the residual stream, N the backbone's norm behind the residual add (post-norm blocks only):
    original_ln_before=False                              h + A(h)
    original_ln_before, residual_before_ln=True           h + A(N(h + x)), then + x and N again
    original_ln_before, residual_before_ln=False,
        original_ln_after=False                           z + A(z),  z = N(h + x)
    is_parallel                                           h + A(x)
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ...core.errors import GraftError
from ...core.method import Method
from ...core.site import Site
from ...methods.activation.bottleneck import Bottleneck
from ...methods.input.invertible import Invertible
from ..config import Config
from ..pieces import Slot, one
from .defaults import BOTTLENECK, SCHEMES
from .family import Held, Made, activation, left_out, named_activation
from .invertible import invertible, invertible_config
from .names import Block, Names
from .placement import FLAGS, located, place, scheme, widths

STARTS = {"bert": ("bert", 0.02), "mam_adapter": ("lora", 0.02), "houlsby": ("houlsby", 0.01)}
PHM_OPTIONS = (
    "phm_dim",
    "factorized_phm_W",
    "shared_W_phm",
    "shared_phm_rule",
    "factorized_phm_rule",
    "phm_c_init",
    "phm_init_range",
    "learn_phm",
    "hypercomplex_nonlinearity",
    "phm_rank",
    "phm_bias",
)
COPIED_NORM = ("weight", "bias")


class Bottlenecks:
    """`bottleneck`, one for each different width and position, and `invertible`."""

    def reads(self, config: Mapping[str, Any]) -> bool:
        return "architecture" not in config and "reduction_factor" in config and not config.get("phm_layer")

    def claims(self, method: Method) -> bool:
        return isinstance(method, Bottleneck | Invertible)

    def pieces(self, config: Config, names: Names, keys: set[str], warnings: list[str]) -> Made:
        config.inert("init_weights_seed", *PHM_OPTIONS)
        common, skip = self._common(config, warnings), left_out(config, names)
        kind = scheme(config)
        flags = {which: config.take(flag, bool, False) for which, flag in FLAGS.items()}
        made = invertible(config, names, warnings)
        for block in names.blocks:
            for which in block.subs if block.index not in skip else ():
                if flags[which]:
                    position, site = place(kind, names, block, which, config)
                    m = widths(config, names, block)
                    method = Bottleneck(d=m, position=position, **common)
                    made.append((method, _slots(method, site, names, names.layer(block, which))))
        return made

    def _common(self, config: Config, warnings: list[str]) -> dict[str, Any]:
        scaling = config.take("scaling", (float, int, str), 1.0)
        if isinstance(scaling, str) and scaling not in ("learned", "channel"):
            raise config.error(f"scaling = {scaling!r}", "expected a number, 'learned' or 'channel'")
        before, after = config.take("ln_before", bool, False), config.take("ln_after", bool, False)
        around = config.take("adapter_residual_before_ln", bool, False)
        parallel = config.take("is_parallel", bool, False)
        if before and after:
            raise config.error("ln_before with ln_after", "graftwork has one norm of its own in an adapter")
        if after and around and not parallel:
            raise config.error("adapter_residual_before_ln with ln_after", "graftwork has no norm around the skip")
        if after and scaling != 1.0:
            raise config.error(
                f"ln_after with scaling = {scaling!r}", "graftwork scales behind the norm, not before it"
            )
        drop = config.take("stochastic_depth", (float, int), 0.0)
        if parallel and drop:
            warnings.append("stochastic_depth: adapters 1.3.0 does not apply it to parallel adapters; it is left out")
            drop = 0.0
        init, std = STARTS.get(config.take("init_weights", str, "bert"), ("bert", 0.02))
        kinds = {"learned": "scalar", "channel": "channel"}
        return {
            "act": activation(config, "relu"),
            "norm": "before" if before else "after" if after else "none",
            "scale": 1.0 if isinstance(scaling, str) else float(scaling),
            "scaling": kinds[scaling] if isinstance(scaling, str) else "fixed",
            "out_dropout": float(config.take("dropout", (float, int), 0.0)),
            "drop_path": float(drop),
            "init": init,
            "init_std": std,
        }

    def config(self, held: Sequence[Held], names: Names) -> dict[str, Any]:
        around, held = (
            [one for one in held if isinstance(one.method, Invertible)],
            [one for one in held if isinstance(one.method, Bottleneck)],
        )
        if not held:
            raise GraftError("an AdapterHub config", "an invertible adapter alone", "give it bottlenecks with it")
        first = held[0].method
        assert isinstance(first, Bottleneck)
        places = [(one.method, site, *located(one.method, site, names)) for one in held for site in one.sites]
        numbers = {which: {block.index for _, _, block, w, _ in places if w == which} for which in FLAGS}
        kinds = {kind for *_, kind in places}
        if len(kinds) > 1:
            raise GraftError(
                "an AdapterHub config", f"adapters that read {' and '.join(sorted(kinds))}", "split the adapter"
            )
        starts = {init: there for there, (init, _) in STARTS.items()}
        scaling: float | str = {"scalar": "learned", "channel": "channel"}.get(first.scaling, float(first.scale))
        return {
            **BOTTLENECK,
            **SCHEMES[kinds.pop()],
            **{flag: bool(numbers[which]) for which, flag in FLAGS.items()},
            "leave_out": [b.index for b in names.blocks if not any(b.index in found for found in numbers.values())],
            "reduction_factor": _reduction([(b, m.widths(s)[1]) for m, s, b, _, _ in places], names),  # type: ignore[attr-defined]
            "non_linearity": named_activation(first.act),
            "ln_before": first.norm == "before",
            "ln_after": first.norm == "after",
            "scaling": scaling,
            "dropout": first.out_dropout,
            "stochastic_depth": first.drop_path,
            "init_weights": starts.get(first.init, "bert"),
            **(invertible_config(around[0].method) if around else {}),
        }

    def plain(self, method: Method, site: Site) -> Method:
        if isinstance(method, Invertible):
            return dataclasses.replace(method, init_std=0.02)
        assert isinstance(method, Bottleneck)
        scale = 1.0 if method.scaling != "fixed" else method.scale  # where it is learned, this is how it started
        return dataclasses.replace(
            method, d=method.widths(site)[1], scale=scale, init="lora", init_std=0.02, lora_bias=False, reduction=16
        )

    def moved(self, method: Method, site: Site, names: Names) -> tuple[Method, Site]:
        if isinstance(method, Invertible):
            return method, site
        assert isinstance(method, Bottleneck)
        block = next((b for b in names.blocks if b.site.key == site.key), None)
        if block is None or method.position != "after" or "mlp" not in block.subs:
            return method, site
        if names.normed_after(block, "mlp"):
            return method, names.norm_site(block, "mlp") or site
        return dataclasses.replace(method, position="sum"), block.subs["mlp"]

    def unpack(self, config: Config, names: Names, tensors: dict[str, Tensor], warnings: list[str]) -> bool:
        """The norm before D is stored twice, under its own name and as the first of the modules in a row."""
        for key in [key for key in tensors if ".adapter_norm_before." in key]:
            copy = tensors.pop(key.replace(".adapter_norm_before.", ".adapter_down.0."), None)
            if copy is not None and not (copy.shape == tensors[key].shape and bool((copy == tensors[key]).all())):
                raise config.error(f"two different copies of {key!r}", "restore the file")
        return True

    def pack(self, config: Config, names: Names, tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if ".adapter_norm_before." in key]:
            tensors[key.replace(".adapter_norm_before.", ".adapter_down.0.")] = tensors[key].clone()


def _slots(method: Bottleneck, site: Site, names: Names, layer: str) -> list[Slot]:
    own = {"before": "adapter_norm_before", "after": "adapter_norm_after"}.get(method.norm)
    down = f"adapter_down.{int(method.norm == 'before')}"
    pairs = [("down", f"{down}.weight"), ("down_bias", f"{down}.bias")]
    pairs += [("up", "adapter_up.weight"), ("up_bias", "adapter_up.bias")]
    pairs += [(f"norm_{leaf}", f"{own}.{leaf}") for leaf in COPIED_NORM if own]
    pairs += [("scale", "scaling")] if method.scaling != "fixed" else []
    return [one(names.at(layer, "adapters", there), site, here) for here, there in pairs]


def _reduction(places: Sequence[tuple[Block, int]], names: Names) -> float | dict[str, float]:
    """The factor of hidden_size // factor = width; one for each block where they differ."""
    hidden = names.settings.hidden_size
    factors = {b.index: hidden // m if hidden % m == 0 else hidden / (m + 0.5) for b, m in places}
    common = Counter(factors.values()).most_common(1)[0][0]
    other = {str(i): f for i, f in factors.items() if f != common}
    return {**other, "default": common} if other else common
