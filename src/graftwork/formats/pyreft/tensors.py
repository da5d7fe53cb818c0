"""The tensors of one intervention: R, W and b of the edit, under pyreft's names.

LoReFT keeps R itself. DiReFT and the variants without W keep what torch's parametrisation makes R of: a base [d, d] and
Householder vectors, R^T = base H.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from ...core.errors import GraftError
from ...core.site import Site
from ..pieces import Slot, expect, one

ORIGINAL, BASE = "rotate_layer.parametrizations.weight.original", "rotate_layer.parametrizations.weight.0.base"
SIZES = ("embed_dim", "interchange_dim")
FREE = ("noreft", "direft")  # R is a linear layer of its own
WITHOUT_W = ("consreft", "lobireft")


def names(variant: str) -> dict[str, str]:
    """Tensor of an edit -> its name in the file, as `plain` leaves it."""
    if variant == "loreft":
        return {"rotation": "rotate_layer", "weight": "weight", "bias": "bias"}
    if variant in WITHOUT_W:
        return {"rotation": "rotate_layer", "bias": "learned_source"}
    rotation = "proj_layer.weight" if variant in FREE else "rotate_layer"
    return {"rotation": rotation, "weight": "learned_source.weight", "bias": "learned_source.bias"}


def slots(variant: str, key: str, index: int, site: Site, r: int) -> list[Slot]:
    """Which tensor of the edit is which of the file."""
    out = []
    for name, there in names(variant).items():
        turned = there == "rotate_layer"  # R^T [d, r]
        shape = (r,) if name == "bias" else (site.d, r) if turned else (r, site.d)

        def read(t: Tensor, shape: tuple[int, ...] = shape, turned: bool = turned) -> Tensor:
            return expect(t, shape).mT if turned else expect(t, shape)

        def back(t: Tensor, turned: bool = turned) -> Tensor:
            return t.mT if turned else t

        out.append(one(f"{key}/{there}", site, f"edits.{index}.{name}", read, back))
    return out


def plain(found: Mapping[str, Tensor], variant: str, d: int, asked: str) -> dict[str, Tensor]:
    """The tensors of a file without sizes, with R in the place of what it is made of, and one bias."""
    out = dict(found)
    for name in SIZES:
        size = out.pop(name, None)
        if size is not None and (size.numel() != 1 or int(size) != d):
            raise GraftError(
                f"{asked}: {name}", f"{size.tolist()}, the backbone has {d}", "load the one it was made for"
            )
    if ORIGINAL in out and BASE in out and variant != "loreft":
        out["rotate_layer"] = _rotation(out.pop(ORIGINAL), out.pop(BASE), asked)
    second, own = out.pop("proj_layer.bias", None) if variant in FREE else None, out.get("learned_source.bias")
    if second is not None and own is not None and variant == "noreft":  # W h + b - (R h + c); NodiReFT never uses its c
        if second.shape != own.shape:
            found_there = f"{list(second.shape)} beside {list(own.shape)}"
            raise GraftError(f"{asked}: 'proj_layer.bias'", found_there, "restore the file")
        out["learned_source.bias"] = own - second
    return out


def _rotation(original: Tensor, base: Tensor, asked: str) -> Tensor:
    """R^T [d, r], computed as torch does."""
    square = original.dim() == 2 and tuple(base.shape) == (original.shape[0],) * 2
    if not (square and original.shape[0] >= original.shape[1] and original.is_floating_point()):
        found = f"{original.dtype} {list(original.shape)} beside {list(base.shape)}"
        raise GraftError(f"{asked}: {ORIGINAL}", found, "restore the file")
    layer, wide = nn.Linear(1, 1, bias=False), torch.promote_types(original.dtype, torch.float32)
    layer.weight = nn.Parameter(torch.empty_like(original, dtype=wide))
    with torch.no_grad(), torch.random.fork_rng():
        nn.init.orthogonal_(layer.weight)
        parametrizations.orthogonal(layer)
        made = layer.parametrizations["weight"]  # type: ignore[index,union-attr]
        made.original.copy_(original)  # type: ignore[union-attr,operator]
        made[0].base.copy_(base)  # type: ignore[index,union-attr,operator]
        return layer.weight.detach().to(original.dtype).clone()


def file_of(tensors: Mapping[str, Tensor], variant: str, d: int) -> dict[str, Tensor]:
    """What pyreft writes for these tensors, named as `plain` leaves them."""
    out = {name: value.clone() for name, value in tensors.items()}
    if variant == "loreft":
        return out
    if "rotate_layer" in out:
        turned = out.pop("rotate_layer")
        r = turned.shape[1]
        wide = torch.promote_types(turned.dtype, torch.float32)
        rest = torch.linalg.qr(turned.to(wide), mode="complete").Q[:, r:].to(turned.dtype)
        out[ORIGINAL] = -torch.eye(d, r, dtype=turned.dtype)  # of this, torch makes the first r columns of the base
        out[BASE] = torch.cat([turned, rest], dim=1).contiguous()
    return out | {name: torch.tensor(d) for name in SIZES}
