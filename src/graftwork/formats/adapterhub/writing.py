"""What an adapter is, said as AdapterHub's config and tensors: the config it was read from where that still holds, or a new one."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ...core.adapter import Adapter, Part
from ...core.errors import GraftError
from ...core.method import Method
from ...core.site import Site
from ...methods.attention.prefix import Prefix
from ...methods.weight.vera import VeRA
from ..config import Config
from ..pieces import Piece, grouped
from .family import Family, Held
from .gates import ungated
from .heads import is_head
from .names import Names

Configs = Callable[[Mapping[str, Any], str], list[dict[str, Any]]]


def held(adapter: Adapter, names: Names, families: Sequence[Family], asked: str) -> tuple[list[Held], list[Held]]:
    """The adapter's methods, moved to the places that AdapterHub has, and those that are its head."""
    methods: list[Held] = []
    head: list[Held] = []
    for part in adapter.parts:
        method, per_site, shared = _stored(part)
        if all(is_head(method, site) for site in part.sites):
            head.append(Held(method, part.sites, part.deltas, per_site, shared))
            continue
        family = next((f for f in families if f.claims(method)), None)
        if family is None:
            raise GraftError(asked, f"AdapterHub has no method for {method.name}", "keep it in graftwork's own format")
        moved: dict[Method, dict[str, Site]] = {}
        values: dict[str, Mapping[str, Tensor]] = {}
        for site in part.sites:
            other, there = family.moved(method, site, names)
            moved.setdefault(other, {})[there.key] = there
            values[there.key] = per_site[site.key]
        methods += [Held(m, list(sites.values()), part.deltas, values, shared) for m, sites in moved.items()]
    if not methods:
        raise GraftError(asked, "a head alone", "keep it in graftwork's own format")
    return methods, head


def _stored(part: Part) -> tuple[Method, dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    if isinstance(ungated(part.method), Prefix):  # AdapterHub keeps the MLP that makes a prefix
        tensors = {key: dict(delta.state_dict()) for key, delta in part.deltas.items()}
        return part.method, tensors, dict(part.shared_modules.state_dict())
    if isinstance(part.method, VeRA):  # its files hold the random pair itself
        method, tensors, _ = part.method.fold(part)
        return method, tensors, {f"projection.{k}": t for k, t in part.shared_modules["projection"].named_buffers()}
    return part.method.fold(part)


def configured(
    parts: Sequence[Held], names: Names, configs: Configs, before: Any, families: Sequence[Family], asked: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors) of the file. GraftError where no config says exactly what the adapter is."""
    wanted = _said([(one.method, site) for one in parts for site in one.sites], families)
    if isinstance(before, dict):
        with contextlib.suppress(GraftError):
            tensors = _filled(configs(before, asked), parts, names, families, wanted, asked)
            return before, tensors
    groups = [(f, [one for one in parts if f.claims(one.method)]) for f in families]
    made = [f.config(ones, names) for f, ones in groups if ones]
    tensors = _filled(made, parts, names, families, wanted, asked)
    return (made[0] if len(made) == 1 else {"architecture": "union", "configs": made}), tensors


def _filled(
    configs: Sequence[Mapping[str, Any]],
    parts: Sequence[Held],
    names: Names,
    families: Sequence[Family],
    wanted: dict[str, list[Method]],
    asked: str,
) -> dict[str, Tensor]:
    """The tensors that go with these configs."""
    fields = [Config(dict(config), asked) for config in configs]
    mine = [next(f for f in families if f.reads(config.data)) for config in fields]
    keys = _keys(parts, names)
    pieces = [(f, c, grouped(f.pieces(c, names, keys, []))) for f, c in zip(mine, fields, strict=True)]
    said = _said([(p.method, site) for _, _, ps in pieces for p in ps for site in p.sites], families)
    if said != wanted:
        place = min(key for key in said.keys() | wanted.keys() if said.get(key) != wanted.get(key))
        found = f"no config says {', '.join(map(str, wanted.get(place, ['nothing'])))} at {place}"
        raise GraftError(asked, found, "keep it in graftwork's own format")
    tensors: dict[str, Tensor] = {}
    for family, config, listed in pieces:
        own = {key: value for piece in listed for key, value in _values(piece, parts, family)}
        family.pack(config, names, own)
        tensors |= {key: value.detach().to("cpu", copy=True).contiguous() for key, value in own.items()}
    return tensors


def _keys(parts: Sequence[Held], names: Names) -> set[str]:
    """What `pieces` looks for among the keys of a file: which modules it speaks of, and which form of a method it holds."""
    keys = {
        f"{names.old[site.path]}.loras.{names.adapter}."
        for one in parts
        for site in one.sites
        if site.path in names.old
    }
    keys |= {
        f"{names.base}.wte.weight"
        for one in parts
        if isinstance(method := ungated(one.method), Prefix) and method.reparam == "mlp"
    }
    return keys | {names.shared("lora_A") for one in parts if one.method.name == "vera"}


def _values(piece: Piece, parts: Sequence[Held], family: Family) -> list[tuple[str, Tensor]]:
    """The numbers of a piece's slots, by their keys."""
    mine = [part for part in parts if family.claims(part.method)]
    shared = {name: t for part in mine for name, t in part.shared.items()}
    own = {(site.key, name): t for part in mine for site in part.sites for name, t in part.tensors[site.key].items()}
    return [
        (slot.key, slot.there([shared[name] if site is None else own[site.key, name] for site, name in slot.places]))
        for slot in piece.slots
    ]


def _said(given: Sequence[tuple[Method, Site]], families: Sequence[Family]) -> dict[str, list[Method]]:
    """The methods at each site, in order, without what says how the sites were chosen."""
    out: dict[str, list[Method]] = {}
    for method, site in given:
        plain = next(f for f in families if f.claims(method)).plain(method, site)
        out.setdefault(site.key, []).append(dataclasses.replace(plain, at="any", layers=None))
    return {key: sorted(methods, key=str) for key, methods in out.items()}
