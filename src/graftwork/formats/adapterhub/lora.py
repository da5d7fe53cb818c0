"""AdapterHub's LoRA, DoRA, VeRA and (IA)^3: one config, told apart by composition_mode, use_dora and vera_d.

Its (IA)^3 scales outputs: those of the first feed-forward layer before the non-linearity. Its VeRA trains whole matrices in
the place of the two vectors, so that a trained one is a LoRA of the same rank; as such it is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from ...core.errors import GraftError
from ...core.method import Method
from ...core.site import Site
from ...methods.weight.dora import DoRA
from ...methods.weight.ia3 import IA3
from ...methods.weight.lora import LoRA
from ...methods.weight.vera import VeRA
from ..config import Config
from ..pieces import Slot, one, shaped
from .family import Held, Made, left_out
from .matrices import apart, together, vectors
from .names import Names

MLP = {"up": "intermediate_lora", "down": "output_lora"}
START = {LoRA: "lora", DoRA: "lora", IA3: "ia3", VeRA: "vera"}


class Loras:
    """`lora`, `dora`, `vera` or `ia3`."""

    def reads(self, config: Mapping[str, Any]) -> bool:
        return config.get("architecture") == "lora"

    def claims(self, method: Method) -> bool:
        return isinstance(method, LoRA | DoRA | VeRA | IA3)

    def pieces(self, config: Config, names: Names, keys: set[str], warnings: list[str]) -> Made:
        config.inert("init_weights", "init_weights_seed", "dtype")
        method = self._method(config, names, keys)
        if isinstance(method, DoRA):
            _warn_dora(method, config, warnings)
        return [(method, _slots(method, site, names)) for site in _sites(config, names, keys, method)]

    def _method(self, config: Config, names: Names, keys: set[str]) -> Method:
        r, alpha = config.take("r", int, 8), float(config.take("alpha", (int, float), 8))
        dropout = float(config.take("dropout", (int, float), 0.0))
        mode = config.take("composition_mode", str, "add")
        vera = [config.take(f"vera_{word}", (int, float), None) for word in "db"]
        dora = config.take("use_dora", bool, False)
        if mode == "scale":
            if alpha != 1 or dropout or dora:
                raise config.error(
                    "composition_mode = 'scale' with alpha, dropout or use_dora", "(IA)^3 has none of them"
                )
            return IA3()
        if mode != "add":
            raise config.error(f"composition_mode = {mode!r}", "expected 'add' or 'scale'")
        if vera != [None, None]:
            if dora:
                raise config.error("use_dora with vera_d", "graftwork has no DoRA of a VeRA")
            if names.shared("lora_A") in keys:
                return VeRA(r=r, d_initial=float(vera[0] or 0.1), dropout=dropout, save_projection=True)
            return LoRA(r=r, alpha=float(r), dropout=dropout)
        return DoRA(r=r, alpha=alpha, dropout=dropout) if dora else LoRA(r=r, alpha=alpha, dropout=dropout)

    def config(self, held: Sequence[Held], names: Names) -> dict[str, Any]:
        first: Any = held[0].method
        sites = [site for one in held for site in one.sites]
        used = {name for site in sites for name in _roles(site)}
        swapped = any(names.parts(block, "gate") for block in names.blocks)
        if swapped and len(used & MLP.keys()) == 1:
            found = f"of the feed-forward layer only {used & MLP.keys()}"
            do = "adapt up and down, or neither: adapters 1.3.0 takes one for the other on some gated models"
            raise GraftError("an AdapterHub config", found, do)
        if isinstance(first, VeRA) and len({(site.weight.d_in, site.weight.d_out) for site in sites}) > 1:
            raise GraftError(
                "an AdapterHub config for VeRA", "weights of several shapes", "its files have one pair for one shape"
            )
        present = {block.index for block in names.blocks for site in sites if _in(site, block.site)}
        ia3 = isinstance(first, IA3)
        alpha = 1 if ia3 else first.r if isinstance(first, VeRA) else first.scale * first.r
        return {
            "architecture": "lora",
            "r": 1 if ia3 else first.r,
            "alpha": int(alpha) if alpha == int(alpha) else alpha,
            "dropout": 0.0 if ia3 else first.dropout,
            "selfattn_lora": bool(used & {"q", "k", "v"}),
            **{flag: role in used for role, flag in MLP.items()},
            "attn_matrices": [role for role in "qkv" if role in used],
            "leave_out": [block.index for block in names.blocks if block.index not in present],
            "composition_mode": "scale" if ia3 else "add",
            "init_weights": START[type(first)],
            "init_weights_seed": None,
            "use_dora": isinstance(first, DoRA),
            "use_gating": False,
            "vera_d": first.d_initial if isinstance(first, VeRA) else None,
            "vera_b": 0.0 if isinstance(first, VeRA) else None,
            "dtype": None,
        }

    def plain(self, method: Method, site: Site) -> Method:
        if isinstance(method, VeRA):
            return dataclasses.replace(method, d_initial=0.1, seed=0, save_projection=True)
        if isinstance(method, DoRA):
            return dataclasses.replace(method, alpha=method.scale * method.r, exact=False)
        if isinstance(method, LoRA):
            return dataclasses.replace(method, alpha=method.scale * method.r, rslora=False)
        return method

    def moved(self, method: Method, site: Site, names: Names) -> tuple[Method, Site]:
        return method, site

    def unpack(self, config: Config, names: Names, tensors: dict[str, Tensor], warnings: list[str]) -> bool:
        apart(config, names, tensors)
        return vectors(config, names, tensors, warnings)

    def pack(self, config: Config, names: Names, tensors: dict[str, Tensor]) -> None:
        together(names, tensors)


def _warn_dora(method: DoRA, config: Config, warnings: list[str]) -> None:
    warnings.append("DoRA: adapters 1.3.0 also scales the bias of a layer, by m / |V|; here only the weight is scaled")
    if method.scale != 1:
        warnings.append(
            f"DoRA: adapters 1.3.0 leaves alpha / r = {method.scale:g} out of the norm |V|; here V = W + (alpha / r) B A"
        )


def _roles(site: Site) -> list[str]:
    """The words of a config that mean this site; the output of a last projection is a site of the role "linear"."""
    if site.role == "linear":
        return ["down"]
    return [site.role]


def _in(site: Site, block: Site) -> bool:
    return (site.tower, site.layer) == (block.tower, block.layer)


def _sites(config: Config, names: Names, keys: set[str], method: Method) -> Iterator[Site]:
    """The projections that a config names.

    Which of up and down "intermediate" and "output" mean differs between AdapterHub's models: where it is one of them, the
    file tells by its keys.
    """
    skip = left_out(config, names)
    attention = config.take("attn_matrices", list, ["q", "v"]) if config.take("selfattn_lora", bool, True) else []
    unknown = [a for a in attention if a not in ("q", "k", "v")]
    if unknown:
        raise config.error(f"attn_matrices = {attention}", "graftwork reads q, k and v")
    config.inert("attn_matrices")
    chosen = [role for role, flag in MLP.items() if config.take(flag, bool, False)]
    for block in names.blocks:
        if block.index in skip:
            continue
        yield from names.parts(block, *attention)
        both = [s for s in names.parts(block, *MLP) if names.old.get(s.path)]
        told = [s for s in both if any(key.startswith(f"{names.old[s.path]}.loras.") for key in keys)]
        for site in told if len(chosen) == 1 and len(told) == 1 else [s for s in both if s.role in chosen]:
            # a scale at the output of the last projection, where `ia3` at "down" scales its input
            yield names.body.sites[f"{site.path}:linear"] if isinstance(method, IA3) and site.role == "down" else site


def _slots(method: Any, site: Site, names: Names) -> list[Slot]:
    w, path = site.weight, f"{names.old[site.path]}.loras.{names.adapter}."
    path += f"{site.role}." if site.rows is not None else ""
    if isinstance(method, IA3):
        return [shaped(f"{path}lora_B", site, "scale", (w.d_out,), (w.d_out, 1))]
    if isinstance(method, VeRA):
        shared = [
            one(names.shared(f"lora_{m}"), None, f"projection.{name}") for m, name in (("A", "down"), ("B", "up"))
        ]
        return [*shared, one(f"{path}vera_D", site, "down_scale"), one(f"{path}vera_B", site, "up_scale")]
    slots = [one(f"{path}lora_A", site, "down"), one(f"{path}lora_B", site, "up")]
    if isinstance(method, DoRA):
        slots.append(shaped(f"{path}m.weight", site, "magnitude", (w.d_out,), (w.d_out, 1)))
    return slots
