"""Task heads, and other modules that are trained as they are, of several adapters in one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.adapter import Adapter
from ..core.errors import GraftError
from ..core.site import Site
from .places import Place


def summed_values(
    whole: list[Place], weights: Mapping[str, float], head: str | None, adapters: list[Adapter], asked: str
) -> dict[str, tuple[Site, dict[str, Tensor]]]:
    """The values of modules that are trained as they are, by path.

    head: the adapter whose own ones are taken; None: sums. GraftError where they are for different labels, or of
    shapes that have no sum.
    """
    if head is not None and not any(head in place.chains for place in whole):
        raise GraftError(asked, f"head={head!r}, which has no head among these", f"choose among {', '.join(weights)}")
    labels = {a.name: a.labels for a in adapters if a.labels}
    if whole and head is None and len(set(labels.values())) > 1:
        said = "; ".join(f"{n}: {', '.join(words)}" for n, words in labels.items())
        raise GraftError(asked, f"heads for different labels ({said})", f"keep one adapter's own: head={min(labels)!r}")
    out: dict[str, tuple[Site, dict[str, Tensor]]] = {}
    for place in whole:
        given = {n: chain[-1].adapted(place.param, None) for n, chain in place.chains.items()}
        known = {n: v.detach().to("cpu", torch.float64) for n, v in given.items() if v is not None}
        base = place.stored
        base = None if base is None else base.to("cpu", torch.float64)
        if head is not None:
            value = known.get(head, base)
        else:
            value = _summed(known, weights, base, f"{asked}: {place.site.key}")
        if value is not None:
            out.setdefault(place.site.path, (place.site, {}))[1][place.param] = value
    return out


def _summed(known: Mapping[str, Tensor], weights: Mapping[str, float], base: Tensor | None, asked: str) -> Tensor:
    """V_0 + sum_e w_e (V_e - V_0); where the backbone has no V_0 of that shape, the weights must add up to one."""
    shapes = {tuple(v.shape) for v in known.values()}
    if len(shapes) > 1:
        raise GraftError(asked, f"shapes {sorted(shapes)}", "keep one adapter's own: head='name'")
    total = sum(weights[n] for n in known)
    first: Any = sum(weights[n] * v for n, v in known.items())
    if abs(total - 1) < 1e-9:
        return first  # type: ignore[no-any-return]
    if base is None or base.shape != first.shape:
        found = f"heads that are not the backbone's, with weights that add up to {total:g}"
        raise GraftError(asked, found, "use weights that add up to 1, or keep one adapter's own: head='name'")
    return first + (1 - total) * base  # type: ignore[no-any-return]
