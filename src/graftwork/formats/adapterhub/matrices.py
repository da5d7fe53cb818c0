"""Matrices that AdapterHub stores as one and that are several here, or the other way round: fused q, k and v; VeRA's."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.errors import GraftError
from ...core.site import Site
from ..config import Config
from .names import Names


def apart(config: Config, names: Names, tensors: dict[str, Tensor]) -> None:
    """q, k and v of fused projections apart, in place."""
    for _, key in _fused(names):
        _split(config, tensors, key)


def vectors(config: Config, names: Names, tensors: dict[str, Tensor], warnings: list[str]) -> bool:
    """VeRA's matrices as the vectors on their diagonals, or, and then False, as a LoRA."""
    matrices = [key for key in tensors if key.endswith((".vera_B", ".vera_D"))]
    if not matrices:
        return True
    r, alpha = config.take("r", int, 8), config.take("alpha", (int, float), 8)
    square = all(tensors[key].dim() == 2 and tensors[key].shape[0] == tensors[key].shape[1] for key in matrices)
    if square and alpha == r and all(torch.equal(t := tensors[key], t.diagonal().diag()) for key in matrices):
        for key in matrices:
            tensors[key] = tensors[key].diagonal().clone()
        return True
    down, up = (tensors.pop(names.shared(leaf), torch.empty(0)) for leaf in ("lora_A", "lora_B"))
    for key in [key for key in matrices if key.endswith("B")]:
        path = key.removesuffix("vera_B")
        try:
            left, middle = tensors.pop(key), tensors.pop(f"{path}vera_D")
            tensors[f"{path}lora_A"] = middle @ down
            tensors[f"{path}lora_B"] = left @ up * (alpha / r)
        except (KeyError, RuntimeError, ZeroDivisionError) as error:
            raise GraftError(f"{config.asked}: {key!r}", "VeRA's matrices do not fit", "restore the file") from error
    warnings.append("VeRA: adapters 1.3.0 trains whole matrices in the place of VeRA's vectors; read as the LoRA it is")
    return False


def together(names: Names, tensors: dict[str, Tensor]) -> None:
    """`apart` and `vectors` undone, in place."""
    for key in [key for key in tensors if key.endswith((".vera_B", ".vera_D"))]:
        tensors[key] = tensors[key].diag()
    for _, key in _fused(names):
        for leaf in ("lora_A", "lora_B"):
            parts = [tensors.pop(k) for role in "qkv" if (k := f"{key}{role}.{leaf}") in tensors]
            if parts:
                tensors[f"{key}{leaf}"] = torch.cat(parts)


def _fused(names: Names) -> list[tuple[Site, str]]:
    """A site of each projection that makes q, k and v at once, and what the keys there start with."""
    found = {
        site.path: site for site in names.body.anatomy.sites if site.role in ("q", "k", "v") and site.rows is not None
    }
    return [(site, f"{names.old[path]}.loras.{names.adapter}.") for path, site in found.items()]


def _split(config: Config, tensors: dict[str, Tensor], key: str) -> None:
    """q, k and v apart: A [r of each, in] and B [out of each, r] are stored one below the other."""
    if any(f"{key}{leaf}" in tensors for leaf in ("m.weight", "vera_B")):
        found = "DoRA or VeRA on a projection that makes q, k and v at once"
        raise config.error(found, "adapters 1.3.0 stores it and does not compute it")
    roles = [role for role in "qkv" if role in config.take("attn_matrices", list, ["q", "v"])]
    for leaf in ("lora_A", "lora_B"):
        whole = tensors.pop(f"{key}{leaf}", None)
        if whole is None:
            continue
        if whole.dim() != 2 or not roles or whole.shape[0] % len(roles):
            raise GraftError(f"{config.asked}: {key}{leaf}", f"{list(whole.shape)} for {roles}", "restore the file")
        for role, part in zip(roles, whole.chunk(len(roles)), strict=True):
            tensors[f"{key}{role}.{leaf}"] = part.clone()
