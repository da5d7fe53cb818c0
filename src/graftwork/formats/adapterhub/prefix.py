"""AdapterHub's prefix tuning: one table, or one MLP, for all layers of a kind of attention, read as those of each layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.adapter import quoted
from ...core.errors import GraftError
from ...core.method import Method
from ...core.site import Site
from ...methods.activation.forms.nonlinear import ACTIVATIONS
from ...methods.attention.prefix import Prefix, kind_of
from ..config import Config
from ..pieces import Slot, one
from .family import Held, Made, activation, left_out
from .names import Names

SHARED = {"table": "wte.weight", "weight": "control_trans.0.weight", "bias": "control_trans.0.bias"}
OWN = {"weight": "control_trans.2.weight", "bias": "control_trans.2.bias"}


class Prefixes:
    """`prefix`, flat or made by an MLP."""

    def reads(self, config: Mapping[str, Any]) -> bool:
        return config.get("architecture") == "prefix_tuning"

    def claims(self, method: Method) -> bool:
        return isinstance(method, Prefix)

    def pieces(self, config: Config, names: Names, keys: set[str], warnings: list[str]) -> Made:
        config.inert("shared_gating", "init_weights_seed", "non_linearity", "bottleneck_size")
        flat = config.take("flat", bool, False) or not any(".wte." in key for key in keys)
        mid = {} if flat else {"mid": config.take("bottleneck_size", int, 512)}
        method = Prefix(
            length=config.take("prefix_length", int, 30), reparam="flat" if flat else "mlp",
            dropout=float(config.take("dropout", (float, int), 0.0)), **mid,
        )  # fmt: skip
        made: list[tuple[Method, list[Slot]]] = []
        for group, sites in _groups(config, names).items():
            if group == "self_prefix" and any(
                getattr(m, "has_relative_attention_bias", 0) for m in names.body.modules.values()
            ):
                warnings.append(
                    "prefix: adapters 1.3.0 lets the prefix shift the relative positions of the real tokens (T5); here they stay"
                )
            for i, site in enumerate(sites):
                key = f"{_pool(names, group)}{i}."
                if flat:
                    made.append((method, [one(f"{key}keys", site, "keys"), one(f"{key}values", site, "values")]))
                    continue
                slots = [one(f"{key}{there}", site, here) for here, there in OWN.items()]
                home = quoted(kind_of(site))
                slots += [
                    one(f"{_pool(names, group)}{there}", None, f"{home}.{here}") for here, there in SHARED.items()
                ]
                made.append((method, slots))
        return made

    def config(self, held: Sequence[Held], names: Names) -> dict[str, Any]:
        first: Any = held[0].method
        present = {names_ for one in held for site in one.sites for names_ in [site.key]}
        blocks = {b.index for b in names.blocks if any(s.key in present for s in b.subs.values())}
        every = _groups(None, names)
        return {
            "architecture": "prefix_tuning",
            "encoder_prefix": any(site.key in present for site in every.get("encoder_prefix", [])),
            "cross_prefix": any(site.key in present for site in every.get("cross_prefix", []))
            or "cross_prefix" not in every,
            "leave_out": [b.index for b in names.blocks if b.index not in blocks],
            "flat": first.reparam == "flat",
            "prefix_length": first.length,
            "bottleneck_size": first.mid,
            "non_linearity": "tanh",
            "dropout": first.dropout,
            "use_gating": False,
            "shared_gating": True,
            "init_weights_seed": None,
        }

    def plain(self, method: Method, site: Site) -> Method:
        assert isinstance(method, Prefix)
        return dataclasses.replace(method, init_std=1.0, mid=512 if method.reparam == "flat" else method.mid)

    def moved(self, method: Method, site: Site, names: Names) -> tuple[Method, Site]:
        return method, site

    def unpack(self, config: Config, names: Names, tensors: dict[str, Tensor], warnings: list[str]) -> bool:
        """One of the copies that every layer keeps of the pool, and that apart by layers; MLPs with another g than tanh made flat."""
        for key in [key for key in tensors if f".prefix_tuning.pool.prefix_tunings.{names.adapter}." in key]:
            own = f"{names.base}prefix_tuning.{key.partition('.prefix_tuning.pool.')[2]}"
            copy = tensors.pop(key)
            if own in tensors and not torch.equal(tensors[own], copy):
                raise config.error(f"two different copies of {own!r}", "restore the file")
        tanh = activation(config, "tanh") == "tanh"
        length = config.take("prefix_length", int, 30)
        for group, sites in _groups(config, names).items():
            pool = _pool(names, group)
            try:
                if not (tanh or config.take("flat", bool, False)):
                    _fold(pool, activation(config, "tanh"), tensors)
                _apart(pool, tensors, length, len(sites))
            except (RuntimeError, ValueError) as error:
                raise GraftError(f"{config.asked}: {pool}*", f"{error}", "restore the file") from error
        if not tanh:
            warnings.append(
                "prefix: its MLP has another non-linearity than tanh; read as the flat prefix that it makes"
            )
        return tanh

    def pack(self, config: Config, names: Names, tensors: dict[str, Tensor]) -> None:
        for group, sites in _groups(config, names).items():
            pool = _pool(names, group)
            if f"{pool}0.keys" in tensors:
                rows = [tensors.pop(f"{pool}{i}.{word}") for i in range(len(sites)) for word in ("keys", "values")]
                tensors[f"{pool}control_trans"] = torch.stack(rows, 1).flatten()
            for there in OWN.values():
                parts = [tensors.pop(key) for i in range(len(sites)) if (key := f"{pool}{i}.{there}") in tensors]
                if parts:
                    tensors[f"{pool}{there}"] = torch.cat(parts)


def _pool(names: Names, group: str) -> str:
    return f"{names.base}prefix_tuning.prefix_tunings.{names.adapter}.{group}."


def _groups(config: Config | None, names: Names) -> dict[str, list[Site]]:
    """The attentions of each kind, in the order of their layers: an encoder's, the others to themselves, cross-attention."""
    skip = left_out(config, names) if config else set()
    crossing = {b.site.tower for b in names.blocks if "cross" in b.subs}
    found: dict[str, list[Site]] = {}
    for block in names.blocks:
        for which in ("self", "cross"):
            encoder = crossing and block.site.tower not in crossing
            group = "cross_prefix" if which == "cross" else "encoder_prefix" if encoder else "self_prefix"
            wanted = config is None or group == "self_prefix" or config.take(group, bool, True)
            if which in block.subs and block.index not in skip and wanted:
                found.setdefault(group, []).append(block.subs[which])
    if config:
        config.inert("encoder_prefix", "cross_prefix")
    return found


def _apart(pool: str, tensors: dict[str, Tensor], length: int, layers: int) -> None:
    """Numbers in the order [length, layer, keys then values, width]; of an MLP its last matrix [layer, keys then values, width]."""
    flat = tensors.pop(f"{pool}control_trans", None)
    if flat is not None:
        for i, part in enumerate(flat.reshape(length, 2 * layers, -1).unbind(1)):
            tensors[f"{pool}{i // 2}.{'values' if i % 2 else 'keys'}"] = part.clone()
    for there in OWN.values():
        whole = tensors.pop(f"{pool}{there}", None)
        if whole is not None:
            if whole.shape[0] % layers:
                raise ValueError(f"{there}: {whole.shape[0]} rows for {layers} layers")
            for i, part in enumerate(whole.chunk(layers)):
                tensors[f"{pool}{i}.{there}"] = part.clone()


def _fold(pool: str, act: str, tensors: dict[str, Tensor]) -> None:
    words = (*SHARED.values(), *OWN.values())
    if not all(f"{pool}{word}" in tensors for word in words):
        return
    table, w1, b1, w2, b2 = (tensors.pop(f"{pool}{word}") for word in words)
    tensors[f"{pool}control_trans"] = F.linear(ACTIVATIONS[act](F.linear(table, w1, b1)), w2, b2).flatten()
