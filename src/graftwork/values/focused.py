"""AA-focused: the layers in which adaptable adapters have switched themselves on.

Moosavi et al. 2022, "Adaptable Adapters", arXiv 2205.01549, section 4.3.
"""

from __future__ import annotations

import dataclasses

from torch import nn

from ..core.errors import GraftError
from ..core.method import Method
from ..core.site import Site
from ..grafting.graft import find
from ..methods.activation.adaptable import AdaptableAdapters, Switched


def focused(model: nn.Module, name: str) -> list[Method]:
    """The methods for new adapters, without switches, in the places where those of adapter `name` are on (z_1 > z_0).

    They are trained from scratch, on the same or on another task: gw.graft(model, gw.focused(model, "aa"), "focused").
    Raises GraftError where there is no switch, or none is on.
    """
    found: list[Method] = []
    switches = 0
    for part in find(model, name).parts:
        method = part.method
        if not isinstance(method, AdaptableAdapters) or not method.switch:
            continue
        places: dict[str, list[str]] = {}
        for site in part.sites:
            delta = part.deltas[site.key]
            assert isinstance(delta, Switched) and delta.logits is not None
            switches += 1
            if delta.logits[1] > delta.logits[0]:
                places.setdefault(_token(site), []).append(str(site.layer))
        found += [dataclasses.replace(method, switch=False, at=at, layers=",".join(n)) for at, n in places.items()]
    if not found:
        reason = f"all {switches} switches are off" if switches else "it has no switches"
        raise GraftError(f"the chosen layers of {name!r}", reason, "train one of gw.AdaptableAdapters first")
    return found


def _token(site: Site) -> str:
    """The place of a site in its layer, as `at` names it."""
    side = ("cross." if site.cross else "self.") if site.role == "attn" else ""
    return (f"{site.tower}." if site.tower else "") + side + site.role
