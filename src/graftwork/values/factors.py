"""LoRAs merged factor by factor. What comes out is near the sum of their changes only where they are nearly alike."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..core.errors import GraftError
from ..methods.weight.lora import LowRank
from .change import weighted_sum
from .hold import Piece, piece
from .places import Place


def merged(place: Place, weights: Mapping[str, float], how: str, asked: str) -> Piece:
    """ "linear": A = sum_e sign(w_e) sqrt|w_e s_e| A_e, B = sum_e sqrt|w_e s_e| B_e.  "linear_b": A, B = sum_e w_e s_e B_e."""
    given = {n: _factors(place, n, asked) for n in weights if n in place.chains}
    ranks = {n: down.shape[-2] for n, (down, _, _) in given.items()}
    if len(set(ranks.values())) > 1:
        text = ", ".join(f"{n} has r={r}" for n, r in ranks.items())
        raise GraftError(f"{asked}: {place.site.key}", text, "factors of one rank only: use how='cat' or 'svd'")
    if how == "linear_b":
        down = next(iter(given.values()))[0]
        if any(not torch.equal(a, down) for a, _, _ in given.values()):
            raise GraftError(f"{asked}: {place.site.key}", "factors A that differ", "use how='cat' or 'svd'")
        up = _sum(weights[n] * s * b for n, (_, b, s) in given.items())
    else:
        roots = {n: math.sqrt(abs(weights[n] * s)) for n, (_, _, s) in given.items()}
        down = _sum(math.copysign(roots[n], weights[n] * s) * a for n, (a, _, s) in given.items())
        up = _sum(roots[n] * b for n, (_, b, _) in given.items())
    return piece(place.site, weighted_sum((weights[n], place.change(n)) for n in given), down, up)


def _factors(place: Place, name: str, asked: str) -> tuple[Tensor, Tensor, float]:
    """(A, B, s) of a LoRA that has this place to itself."""
    chain = place.chains[name]
    delta = chain[0]
    if len(chain) > 1 or not isinstance(delta, LowRank) or delta.view.rows != place.site.rows:
        found = f"{name!r} has no single pair of LoRA factors at {place.site.key}"
        raise GraftError(asked, found, "use how='cat' or 'svd', which work on what it does to the weight")
    down, up = (t.detach().to("cpu", torch.float64) for t in (delta.down, delta.up))
    return down, up, delta.scale


def _sum(terms: object) -> Tensor:
    total = sum(terms)  # type: ignore[call-overload]
    assert isinstance(total, Tensor)
    return total
