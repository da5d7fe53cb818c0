"""AdapterHub's ReFT: an edit of the first and the last positions of each block's output.

Where R has orthonormal rows, the file holds what torch's parametrization makes it from (`original`, `base`); here R itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.errors import GraftError
from ...core.method import Method
from ...core.site import Site
from ...methods.activation.loreft import LoReFT
from ..config import Config
from ..pieces import Slot, one
from .family import Held, Made, activation, named_activation
from .names import Names

RAW, BASE = "projection.parametrizations.weight.original", "projection.parametrizations.weight.0.base"


class Refts:
    """`loreft` in its variants loreft and noreft; a file cannot say that it is a direft."""

    def reads(self, config: Mapping[str, Any]) -> bool:
        return config.get("architecture") == "reft"

    def claims(self, method: Method) -> bool:
        return isinstance(method, LoReFT)

    def pieces(self, config: Config, names: Names, keys: set[str], warnings: list[str]) -> Made:
        config.inert("init_weights_seed", "dtype", "output_reft")
        orthogonal, tied = config.take("orthogonality", bool, True), config.take("tied_weights", bool, False)
        first, last = config.take("prefix_positions", int, 3), config.take("suffix_positions", int, 0)
        layers = config.take("layers", (str, list), "all")
        if not orthogonal:
            warnings.append(
                "ReFT: adapters 1.3.0 does not store whether an edit takes out the state's own coordinates (NoReFT) or not "
                "(DiReFT); read as NoReFT, as that library itself does when it loads the file"
            )
        if len(names.blocks) and any("cross" in block.subs for block in names.blocks):
            raise config.error(
                "ReFT on an encoder-decoder", "AdapterHub edits the decoder's positions too; graftwork does not"
            )
        method = LoReFT(
            r=config.take("r", int, 1), variant="loreft" if orthogonal else "noreft",
            positions="+".join(f"{word}{n}" for word, n in (("p", first), ("s", last)) if n), tied=tied,
            act=activation(config, "linear"), dropout=float(config.take("dropout", (float, int), 0.05)), drop_state=True,
        )  # fmt: skip
        made = []
        for block in names.blocks:
            if layers == "all" or block.index in layers:
                units = [u for u, n in enumerate((first, last)) if n or (tied and not u)][: method.sets]
                made.append(
                    (
                        method,
                        [s for i, u in enumerate(units) for s in _slots(method, block.site, names, block.path, i, u)],
                    )
                )
        return made

    def config(self, held: Sequence[Held], names: Names) -> dict[str, Any]:
        first: Any = held[0].method
        if first.variant not in ("loreft", "noreft") or first.span is None:
            found = f"variant={first.variant!r}, positions={first.positions!r}"
            raise GraftError(
                "an AdapterHub config for ReFT", found, "its files can say loreft and noreft at 'p..+s..' only"
            )
        present = [b.index for b in names.blocks for one in held if any(b.site.key == s.key for s in one.sites)]
        return {
            "architecture": "reft",
            "layers": "all" if len(present) == len(names.blocks) else present,
            "prefix_positions": first.span[0],
            "suffix_positions": first.span[1],
            "r": first.r,
            "orthogonality": first.variant == "loreft",
            "tied_weights": first.tied,
            "dropout": first.dropout,
            "non_linearity": None if first.act == "none" else named_activation(first.act),
            "dtype": None,
            "output_reft": True,
            "init_weights_seed": None,
        }

    def plain(self, method: Method, site: Site) -> Method:
        assert isinstance(method, LoReFT) and method.span is not None
        positions = "+".join(f"{word}{n}" for word, n in zip("ps", method.span, strict=True) if n)
        return dataclasses.replace(
            method, init="random", positions=positions, drop_state=bool(method.dropout) and method.drop_state
        )

    def moved(self, method: Method, site: Site, names: Names) -> tuple[Method, Site]:
        return method, site

    def unpack(self, config: Config, names: Names, tensors: dict[str, Tensor], warnings: list[str]) -> bool:
        unused = {
            u
            for u, n in enumerate((config.take("prefix_positions", int, 3), config.take("suffix_positions", int, 0)))
            if not n
        }
        unused = {1} if config.take("tied_weights", bool, False) else unused
        for key in [key for key in tensors if any(f".refts.{names.adapter}.units.{u}." in key for u in unused)]:
            del tensors[key]  # allocated by adapters 1.3.0, and computed with by nobody
        for raw in [key for key in tensors if key.endswith(RAW)]:
            path = raw.removesuffix(RAW)
            original, base = tensors.pop(raw), tensors.pop(f"{path}{BASE}", None)
            try:
                tensors[f"{path}rotation"] = _rotation(original, base)
            except (RuntimeError, ValueError) as error:
                raise GraftError(f"{config.asked}: {raw!r}", f"{error}", "restore the file") from error
        return True

    def pack(self, config: Config, names: Names, tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.endswith(".rotation")]:
            path, rotation = key.removesuffix("rotation"), tensors.pop(key)
            tensors[f"{path}{RAW}"], tensors[f"{path}{BASE}"] = _factors(rotation)
        if config.take("tied_weights", bool, False):
            return
        both = ("units.0.", "units.1.")
        for here, other in (both, both[::-1]):  # the library wants both units, also where it uses one
            for key in [key for key in tensors if f".refts.{names.adapter}.{here}" in key]:
                tensors.setdefault(key.replace(here, other), tensors[key].clone())


def _slots(method: LoReFT, site: Site, names: Names, path: str, index: int, unit: int) -> list[Slot]:
    start = names.at(f"{path}.reft_layer", "refts", f"units.{unit}.")
    rotation = "rotation" if method.variant == "loreft" else "projection.weight"
    pairs = [("weight", "learned_source.weight"), ("bias", "learned_source.bias"), ("rotation", rotation)]
    return [one(start + there, site, f"edits.{index}.{here}") for here, there in pairs]


def _rotation(original: Tensor, base: Tensor | None) -> Tensor:
    """R [r, d], r < d: base times a product of Householder reflections whose vectors are the columns of original^T below its diagonal."""
    if (
        original.dim() != 2
        or original.shape[0] >= original.shape[1]
        or base is None
        or base.shape != (original.shape[1],) * 2
    ):
        raise ValueError(f"{list(original.shape)} with a base {None if base is None else list(base.shape)}")
    vectors = original.mT.tril(-1)
    scales = 2 / (1 + vectors.square().sum(-2))
    q = torch.linalg.householder_product(vectors, scales) * original.diagonal().trunc()
    return (base @ q).mT.contiguous()


def _factors(rotation: Tensor) -> tuple[Tensor, Tensor]:
    """An original and base that make exactly this R: no reflection beyond the axes, and R's rows, completed, as the base."""
    r, d = rotation.shape
    base = torch.linalg.qr(rotation.mT.to(torch.promote_types(rotation.dtype, torch.float32)), mode="complete")[0]
    base = base.to(rotation.dtype)
    base[:, :r] = rotation.mT
    return -torch.eye(r, d, dtype=rotation.dtype), base.contiguous()
