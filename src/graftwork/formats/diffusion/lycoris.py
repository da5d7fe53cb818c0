"""LyCORIS's LoHa and LoKr in kohya's files: .hada_w1_a, .lokr_w1, ... and .alpha of each module. They are read, not written.

The rank and the way of dividing are in no key: they follow from the shapes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...core.errors import GraftError
from ...core.site import Site
from ...methods.weight.loha import LoHa
from ...methods.weight.lokr import LoKr
from ..peft.lycoris import loha_slots, lokr_slots
from ..pieces import Slot

STARTS = ("hada_", "lokr_")


def module_of(
    name: str, site: Site, tensors: Mapping[str, Tensor], alpha: float | None, asked: str
) -> tuple[LoHa | LoKr, list[Slot]]:
    """The method of the module of this name, and which tensor is which key. alpha: None is the rank, so that the scale is 1."""
    parts = {key.partition(".")[2]: t for key, t in tensors.items() if key.partition(".")[0] == name}
    if any(part.startswith("hada_") for part in parts):
        core = "hada_t1" in parts
        r = _size(parts, "hada_w1_b", 0, f"{asked}: {name}")
        method = LoHa(r=r, alpha=float(r) if alpha is None else alpha, effective=core)
        return method, loha_slots(method, site, f"{name}.hada_")
    made = _lokr(parts, site, alpha, f"{asked}: {name}")
    return made, lokr_slots(made, site, f"{name}.lokr_")


def _lokr(parts: Mapping[str, Tensor], site: Site, alpha: float | None, asked: str) -> LoKr:
    w = site.weight
    d_in = w.d_in // math.prod(w.kernel)
    left, right = "lokr_w1" not in parts, "lokr_w2" not in parts
    core = "lokr_t2" in parts
    out_l = _size(parts, "lokr_w1_a" if left else "lokr_w1", 0, asked)
    in_m = _size(parts, "lokr_w1_b" if left else "lokr_w1", 1, asked)
    if right or left:
        r = _size(parts, "lokr_w2_b" if right else "lokr_w1_b", 0, asked)
        scale: dict[str, Any] = {"r": r, "alpha": float(r) if alpha is None else alpha}
    else:  # two whole matrices have no rank, and the scale 1 whatever alpha is
        r = max(w.d_out // max(out_l, 1), d_in // max(in_m, 1), 1)
        scale = {"r": r, "alpha": float(r)}
    for factor in (None, out_l or None, in_m or None):
        made = LoKr(decompose_factor=factor, decompose_both=left, effective=core, **scale)
        d = made.shapes(w)
        if (d.out_l, d.in_m, d.left_low, d.right_low, d.core) == (out_l, in_m, left, right, core):
            return made
    found = f"W1 of {out_l} x {in_m} at a weight of {w.d_out} x {w.d_in}"
    raise GraftError(asked, found, "the file was made for another backbone, or by other rules than LyCORIS's")


def _size(parts: Mapping[str, Tensor], key: str, axis: int, asked: str) -> int:
    t = parts.get(key)
    if t is None or t.dim() <= axis or not t.numel():
        raise GraftError(
            f"{asked}.{key}", "missing" if t is None else f"its shape is {list(t.shape)}", "restore the file"
        )
    return t.shape[axis]
