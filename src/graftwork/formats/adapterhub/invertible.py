"""AdapterHub's invertible adapters, which its bottleneck configs name (inv_adapter): one coupling at the embeddings."""

from __future__ import annotations

from typing import Any

from ...core.method import Method
from ...methods.input.invertible import Invertible
from ..config import Config
from ..pieces import Slot, one
from .family import activation
from .names import Names

NETWORK = {"down": "0.weight", "down_bias": "0.bias", "up": "2.weight", "up_bias": "2.bias"}


def invertible(config: Config, names: Names, warnings: list[str]) -> list[tuple[Method, list[Slot]]]:
    """The method of `inv_adapter` and its slots, or nothing. GraftError for "glow", and for a backbone without such a place."""
    kind = config.take("inv_adapter", str, "")
    reduction = config.take("inv_adapter_reduction_factor", int, 2)
    if not kind:
        return []
    if kind != "nice":
        found = f"inv_adapter = {kind!r}"
        do = "the library's own glow is no bijection: its inverse computes something else than the forward edit undone; only nice is read"
        raise config.error(found, do if kind == "glow" else "expected 'nice'")
    if reduction < 1:
        raise config.error(f"inv_adapter_reduction_factor = {reduction}", "expected a number above 0: restore the file")
    sites = names.body.anatomy.of("embedded")
    if not sites:
        raise config.error("an invertible adapter", "this backbone has no place where a sequence is embedded")
    entry = next(s for s in names.body.anatomy.of("entry") if s.tower == sites[0].tower)
    if sites[0].unembed is not None:
        warnings.append(
            "invertible: adapters 1.3.0 has the inverse in front of its own LM heads only; here it is in front of transformers' too"
        )
    method = Invertible(reduction=reduction, act=activation(config, "relu"))
    path = f"{entry.path}." if entry.path else ""
    return [
        (
            method,
            [
                one(f"{path}invertible_adapters.{names.adapter}.{half}.{there}", sites[0], f"coupling.{half}.{here}")
                for half in "FG"
                for here, there in NETWORK.items()
            ],
        )
    ]


def invertible_config(method: Any) -> dict[str, Any]:
    """The fields of a config that say this method. "glow" is said as it is: no config is read as that."""
    return {"inv_adapter": method.coupling, "inv_adapter_reduction_factor": method.reduction}
