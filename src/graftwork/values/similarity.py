"""How alike two adapters are, by what they do to the weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.errors import GraftError
from ..core.graft import find
from ..core.root import body_of
from .places import places


@dataclass(frozen=True)
class Similarity:
    """cosine: of all changes together, in [-1, 1], 0 where one adapter changes nothing.  sites: of each weight that both change."""

    cosine: float
    sites: dict[str, float]


@torch.no_grad()
def similarity(model: nn.Module, a: str, b: str) -> Similarity:
    """cos(a, b) = sum_sites <dW_a, dW_b> / (|dW_a| |dW_b|), Frobenius; heads are left out.

    Of LoRAs by the factors: <B A, D C> = <B^T D, A C^T>; it does not depend on how dW is factored.
    Raises GraftError for methods that change activations.
    """
    asked = f"the similarity of {a!r} and {b!r}"
    pair = [find(model, n) for n in dict.fromkeys((a, b))]
    found = places(pair, body_of(model), asked)
    inner, size, sites = 0.0, {a: 0.0, b: 0.0}, {}
    for place in found.matrices:
        changes = {n: place.change(n) for n in place.chains}
        squares = {n: change.inner(change) for n, change in changes.items()}
        for n, square in squares.items():
            size[n] += square
        if a in changes and b in changes:
            product = changes[a].inner(changes[b])
            inner += product
            sites[place.site.key] = _cosine(product, squares[a], squares[b])
    for place in found.vectors:
        shifts: dict[str, Tensor] = {n: place.shift(n) for n in place.chains}
        for n, shift in shifts.items():
            size[n] += float(shift.square().sum())
        if a in shifts and b in shifts:
            inner += float((shifts[a] * shifts[b]).sum())
    if not found.matrices and not found.vectors:
        raise GraftError(asked, "nothing but heads", "compare adapters that change the backbone")
    return Similarity(_cosine(inner, size[a], size[b]), sites)


def _cosine(inner: float, square_a: float, square_b: float) -> float:
    size = math.sqrt(max(square_a, 0.0) * max(square_b, 0.0))
    return max(-1.0, min(1.0, inner / size)) if size else 0.0
