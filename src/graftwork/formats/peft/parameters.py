"""PEFT's target_parameters: LoRA on a bare parameter, one matrix or those of many experts."""

from __future__ import annotations

from torch import Tensor

from ...core.site import Site
from ..pieces import Slot, View, expect, one


def factors(site: Site, r: int, key: str) -> list[Slot]:
    """A and B of a bare parameter. Of E experts: A [r E, in], an expert's rows together; B [out, r E], a rank's columns together."""
    w = site.weight
    e, (d_in, d_out) = w.copies, (w.d_in, w.d_out)
    # a weight that PEFT takes for [out, in] and the dense view does not: its B A is the transpose of ours
    turned = (w.layout == "transposed") != bool(w.batch and getattr(site.module, "is_transposed", False))
    if turned:
        d_in, d_out = d_out, d_in

    def slot(there: str, name: str, stored: tuple[int, int], here: View, back: View) -> Slot:
        def read(t: Tensor) -> Tensor:
            made = here(expect(t, stored))
            return made.mT if turned else made

        return one(f"{key}{there}.weight", site, name, read, lambda t: back(t.mT if turned else t))

    down, up = ("up", "down") if turned else ("down", "up")
    return [
        slot("lora_A", down, (r * e, d_in), lambda t: t.reshape(*w.batch, r, d_in), lambda t: t.reshape(r * e, d_in)),
        slot(
            "lora_B",
            up,
            (d_out, r * e),
            lambda t: t.reshape(d_out, r, e).permute(2, 0, 1).reshape(*w.batch, d_out, r),
            lambda t: t.reshape(e, d_out, r).permute(1, 2, 0).reshape(d_out, r * e),
        ),
    ]
