"""pyreft's intervention folders: config.json, one intkey_*.bin per intervention, and args.json with the edited positions.

Wu et al. 2024, "ReFT"; stanfordnlp/pyreft on stanfordnlp/pyvene. Read as they were trained: pyvene itself rounds W and b to
bfloat16 when it loads, and takes no activation from any file.
"""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.adapter import Adapter
from ...core.errors import GraftError
from ...core.site import Site
from ...methods.activation.forms.nonlinear import ACTIVATIONS
from ...methods.activation.loreft import LoReFT
from ...sites.body import Body
from ...store.read import Stored
from ..files import read_json, read_tensors, write_files
from ..pieces import Piece, Slot, gather, grouped, held, spread
from . import tensors as parts
from .representations import ARGUMENTS, CONFIG, Intervention, component_of, config_of, interventions, key_of, site_of


class Pyreft:
    """The folders that ReftModel.save writes, with the args.json that pyreft's training script puts beside them."""

    name = "pyreft"

    def recognises(self, folder: Path) -> bool:
        return (folder / CONFIG).is_file() and any(folder.glob("intkey_*.bin"))

    def read(self, folder: Path, body: Body, partial: bool = False) -> Stored:
        asked = f"load {str(folder)!r}"
        listed = interventions(read_json(folder / CONFIG), asked)
        said = _arguments(folder, asked)
        found: dict[str, Tensor] = {}
        made: list[tuple[LoReFT, list[Slot]]] = []
        for place in dict.fromkeys(one.place for one in listed):
            here, site = [one for one in listed if one.place == place], site_of(place, body, asked)
            files = {one.key: _tensors(folder / one.file, one, site, asked) for one in here}
            found |= {f"{key}/{name}": value for key, own in files.items() for name, value in own.items()}
            method = _method(here, files[here[0].key], said, asked)
            made.append(
                (method, [s for one in here for s in parts.slots(one.variant, one.key, one.turn, site, method.r)])
            )
        methods, by_site, left_out = gather(grouped(made), found, asked, partial)
        return Stored(folder.resolve().name, methods, by_site, None, None, {}, left_out)

    def backbone(self, folder: Path) -> tuple[str | None, str | None]:
        kind = read_json(folder / CONFIG).get("model_type")
        return None, kind.rpartition(".")[2].rstrip("'>") if isinstance(kind, str) and "." in kind else None

    def write(self, adapter: Adapter, body: Body, folder: Path) -> None:
        asked = f"save {adapter.name!r} as {self.name!r}"
        method = _one(adapter, asked)
        sites = [site for part in adapter.parts for site in part.sites]
        pieces, listed, width = [], [], {}
        for turn in range(method.sets):
            for site in sites:
                place = component_of(site, body, asked)
                one = Intervention(key_of(*place, turn), place, method.variant, turn)
                pieces.append(Piece(method, tuple(parts.slots(one.variant, one.key, turn, site, method.r))))
                listed.append(one)
                width[one.key] = site.d
        values = spread(pieces, held(adapter), asked)
        files = {CONFIG: _text(config_of(listed, width, method.r)), ARGUMENTS: _text(_positions(method))}
        for one in listed:
            own = {name: values[f"{one.key}/{name}"] for name in parts.names(one.variant).values()}
            buffer = io.BytesIO()
            torch.save(parts.file_of(own, one.variant, width[one.key]), buffer)
            files[one.file] = buffer.getvalue()
        write_files(folder, files)


def _arguments(folder: Path, asked: str) -> dict[str, Any]:
    if not (folder / ARGUMENTS).is_file():
        found = f"no {ARGUMENTS}: nothing else says which positions of a prompt are edited"
        raise GraftError(asked, found, f'write {{"position": "f1+l1"}} into {ARGUMENTS} there, as it was trained')
    return read_json(folder / ARGUMENTS)


def _tensors(path: Path, one: Intervention, site: Site, asked: str) -> dict[str, Tensor]:
    if not path.is_file():
        raise GraftError(asked, f"no {path.name}", "the folder is half-written: restore it")
    return parts.plain(read_tensors(path), one.variant, site.d, f"{asked}: {path.name}")


def _method(here: list[Intervention], own: dict[str, Tensor], said: dict[str, Any], asked: str) -> LoReFT:
    """The method of one place: of one intervention there, or of two, the first positions' and the last positions'."""
    positions, act = said.get("position"), said.get("act_fn") or "none"
    if not (isinstance(positions, str) and isinstance(act, str) and act in ACTIVATIONS):
        found = f"position = {positions!r}, act_fn = {act!r}"
        raise GraftError(
            f"{asked}: {ARGUMENTS}", found, f"expected a text such as 'f1+l1', and {', '.join(ACTIVATIONS)}"
        )
    bias = own.get(parts.names(here[0].variant)["bias"])
    if bias is None or bias.dim() != 1 or len({one.variant for one in here}) > 1:
        raise GraftError(asked, f"the tensors of {here[0].file}: {', '.join(own) or 'none'}", "restore the folder")
    made = LoReFT(r=len(bias), positions=positions, variant=here[0].variant, act=act)
    method = replace(made, tied=len(here) == 1) if made.span is not None and 0 not in made.span else made
    if method.sets != len(here):
        found = f"{len(here)} interventions at {here[0].place[1]!r} of layer {here[0].place[0]}"
        raise GraftError(asked, f"{found}, positions {positions!r}", "expected one, or one for each end of the prompt")
    return method


def _one(adapter: Adapter, asked: str) -> LoReFT:
    """The only method of an adapter that pyreft can hold."""
    made = {replace(m, at="block", layers=None, init="random") if isinstance(m, LoReFT) else m for m in adapter.methods}
    method = next(iter(made))
    if len(made) > 1 or not isinstance(method, LoReFT):
        raise GraftError(asked, " + ".join(map(str, adapter.methods)), "pyreft holds one kind of LoReFT in an adapter")
    if method.act != "none":
        raise GraftError(
            asked, f"act = {method.act!r}", "pyvene's folder keeps no activation: it would load another one"
        )
    return method


def _positions(method: LoReFT) -> dict[str, Any]:
    text = (
        method.positions
        if method.span is None
        else "+".join(f"{end}{n}" for end, n in zip("fl", method.span, strict=True) if n)
    )
    return {"position": text, "share_weights": method.sets == 1}


def _text(data: dict[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, sort_keys=True) + "\n").encode()
